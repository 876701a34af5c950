"""Left padding: a text's answer is the same alone and beside others, whatever kind of positions a model has."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.core.pipeline import Pipeline
from mlflow_tdeploy.source.resolve import resolve
from tests.served import pipeline_of, task_of
from tests.words import SIZE, TEXTS, word_tokenizer


def gpt2(cls=transformers.GPT2Model, **settings):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SIZE, n_positions=32, n_embd=32, n_layer=2, n_head=2, pad_token_id=1, **settings
    )
    return cls(config).eval()


def _alone(model, tokenizer):
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt"))[0].numpy() for text in TEXTS]


def test_resolve_gives_positions_when_a_model_with_absolute_ones_is_padded_on_the_left(tmp_path):
    model, tokenizer = gpt2(), word_tokenizer()
    source = resolve(model, tokenizer=tokenizer)
    assert [spec.name for spec in source.signature.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert source.task_config["padding_side"] == "left"
    serve = pipeline_of(source, tmp_path)
    for together, text, expected in zip(serve(TEXTS), TEXTS, _alone(model, tokenizer), strict=True):
        np.testing.assert_allclose(together, expected, atol=1e-5)
        np.testing.assert_allclose(serve([text])[0], expected, atol=1e-5)


def test_exported_graph_answers_as_the_model_does_alone_when_padded_on_the_left(tmp_path):
    model, tokenizer = gpt2(), word_tokenizer()
    source = resolve(model, tokenizer=tokenizer)
    task = task_of(source, tmp_path / "assets")
    result = export_module(source.module, task.example_feeds("opt", ragged=True), source.signature, tmp_path / "m.onnx")
    session = ort.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in source.signature.outputs]
    serve = Pipeline(task, lambda feeds: dict(zip(names, session.run(names, feeds), strict=True)))
    for together, expected in zip(serve(TEXTS), _alone(model, tokenizer), strict=True):
        np.testing.assert_allclose(together, expected, atol=1e-4)


def test_classifier_scores_do_not_depend_on_neighbours_when_padded_on_the_left(tmp_path):
    model = gpt2(transformers.GPT2ForSequenceClassification, num_labels=3)
    tokenizer = word_tokenizer()
    serve = pipeline_of(resolve(model, tokenizer=tokenizer), tmp_path)
    expected = [torch.from_numpy(logits).softmax(-1).max().item() for logits in _alone(model, tokenizer)]
    np.testing.assert_allclose([answer["score"] for answer in serve(TEXTS)], expected, atol=1e-6)


def test_sentence_embeddings_do_not_depend_on_neighbours_when_padded_on_the_left(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    gpt2().save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    model = SentenceTransformer(
        modules=[Transformer(str(tmp_path / "gpt2")), Pooling(32, pooling_mode="lasttoken")], device="cpu"
    )
    expected = np.concatenate([model.encode([text]) for text in TEXTS])
    source = resolve(model)
    assert "position_ids" in {spec.name for spec in source.signature.inputs}
    np.testing.assert_allclose(pipeline_of(source, tmp_path / "assets")(TEXTS), expected, atol=1e-5)


def _sizes(**settings):
    return {
        "vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 40, "pad_token_id": 1, **settings,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (
            transformers.Qwen3Model,
            transformers.Qwen3Config(**_sizes(intermediate_size=64, head_dim=16, num_key_value_heads=1)),
        ),
        (transformers.OPTModel, transformers.OPTConfig(**_sizes(ffn_dim=64, word_embed_proj_dim=32))),
        (transformers.RobertaModel, transformers.RobertaConfig(**_sizes(intermediate_size=64))),
        (
            transformers.XLNetModel,
            transformers.XLNetConfig(vocab_size=SIZE, d_model=32, n_layer=2, n_head=2, d_inner=64),
        ),
    ],
)
def test_resolve_gives_no_positions_when_padding_on_the_left_changes_nothing(model, config):
    source = resolve(model(config), tokenizer=word_tokenizer())
    assert "position_ids" not in {spec.name for spec in source.signature.inputs}
    assert source.task_config["padding_side"] == "left"


def test_resolve_pads_on_the_right_when_a_model_with_absolute_positions_takes_none(tmp_path, caplog):
    config = transformers.BartConfig(
        vocab_size=SIZE, max_position_embeddings=40, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = transformers.BartModel(config).eval(), word_tokenizer(frame=True)
    source = resolve(model, tokenizer=tokenizer)
    assert source.task_config["padding_side"] == "right"
    assert "padded on the right" in caplog.text
    serve = pipeline_of(source, tmp_path)
    for together, expected in zip(serve(TEXTS), _alone(model, tokenizer), strict=True):
        np.testing.assert_allclose(together, expected, atol=1e-5)


def fnet(cls=transformers.FNetModel, **settings):
    config = transformers.FNetConfig(
        vocab_size=SIZE, hidden_size=32, num_hidden_layers=1, intermediate_size=64, max_position_embeddings=40,
        **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return cls(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_different_lengths_share_no_batch_when_every_padding_changes_the_answer(tmp_path, caplog, side):
    model, tokenizer = fnet(), word_tokenizer()
    tokenizer.padding_side = side
    source = resolve(model, tokenizer=tokenizer)
    assert source.task_config["pads"] is False
    assert "only texts of one length share a batch" in caplog.text
    widths = []

    def infer(feeds):
        widths.append(feeds["input_ids"].shape)
        return source.reference(feeds)

    texts = [*TEXTS, *TEXTS]
    answers = Pipeline(task_of(source, tmp_path), infer)(texts)
    for together, expected in zip(answers, 2 * _alone(model, tokenizer), strict=True):
        np.testing.assert_allclose(together, expected, atol=1e-5)
    assert all(rows % 2 == 0 for rows, _ in widths)  # equal ones still do


def test_scores_do_not_depend_on_neighbours_when_a_classifier_heeds_no_mask(tmp_path):
    model, tokenizer = fnet(transformers.FNetForSequenceClassification, num_labels=3), word_tokenizer()
    serve = pipeline_of(resolve(model, tokenizer=tokenizer), tmp_path)
    expected = [torch.from_numpy(logits).softmax(-1).max().item() for logits in _alone(model, tokenizer)]
    np.testing.assert_allclose([answer["score"] for answer in serve(TEXTS)], expected, atol=1e-6)


def test_every_variant_of_a_model_that_heeds_no_mask_is_checked_without_padding(tmp_path):
    source = resolve(fnet(), tokenizer=word_tokenizer())
    task = task_of(source, tmp_path)
    feeds = task.example_feeds("opt", ragged=True, sizes={"batch": 4, "sequence": 9})
    assert (feeds["input_ids"] != 1).all()  # no padding token in any row


def _counting_graph():
    """A graph whose logits are the sum of ids by their column, so that padding on the left changes them."""
    node = onnx.helper.make_node
    nodes = [
        node("Mul", ["input_ids", "attention_mask"], ["ids"]),
        node("Add", ["attention_mask", "one"], ["some"]),
        node("Div", ["some", "some"], ["ones"]),
        node("CumSum", ["ones", "axis"], ["columns"]),
        node("Mul", ["ids", "columns"], ["weighed"]),
        node("ReduceSum", ["weighed", "axes"], ["sum"]),
        node("Cast", ["sum"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array([1], np.int64), "one"),
        onnx.numpy_helper.from_array(np.array(1, np.int64), "axis"),
        onnx.numpy_helper.from_array(np.array([1], np.int64), "axes"),
    ]
    value = onnx.helper.make_tensor_value_info
    inputs = [value(name, onnx.TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    outputs = [value("logits", onnx.TensorProto.FLOAT, ["b", 1])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_resolve_pads_on_the_right_when_a_graph_counts_columns():
    source = resolve(_counting_graph(), tokenizer=word_tokenizer(), labels=["yes"])
    assert source.task_config["padding_side"] == "right"
