from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification, BertConfig, BertModel

from mlflow_tdeploy.core.errors import BuildError, ExportError, InvalidInputError
from mlflow_tdeploy.runtime.backends._torch_modules import load_module
from mlflow_tdeploy.source.resolve import resolve
from tests.served import task_of
from tests.words import SIZE, word_tokenizer


def _feeds(source, folder):
    return task_of(source, folder).example_feeds("opt", ragged=True)


def test_resolve_reads_the_signature_when_given_a_classifier_and_its_tokenizer(classifier, tokenizer):
    source = resolve(classifier, tokenizer=tokenizer)
    assert source.task == "text-classification"
    assert [str(spec) for spec in source.signature.inputs] == [
        "input_ids: int64[batch, sequence]",
        "attention_mask: int64[batch, sequence]",
        "token_type_ids: int64[batch, sequence]",
    ]
    assert [str(spec) for spec in source.signature.outputs] == ["logits: float32[batch, 3]"]
    assert source.signature.dim("sequence").max == 64  # the model's positions, not the tokenizer's 512
    assert source.task_config["max_length"] == 64
    assert source.task_config["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert source.task_config["function_to_apply"] == "softmax"
    assert (source.record.kind, source.record.name) == ("transformers", "BertForSequenceClassification")


def test_resolve_asks_for_the_tokenizer_when_a_text_model_comes_without(encoder):
    with pytest.raises(InvalidInputError, match=r"tokenizer=AutoTokenizer\.from_pretrained"):
        resolve(encoder)


def test_resolve_refuses_a_tokenizer_when_it_belongs_to_another_model(small, tokenizer):
    from transformers import BertConfig, BertModel

    with pytest.raises(InvalidInputError, match="do not belong together"):
        resolve(BertModel(BertConfig(**{**small, "vocab_size": 100})), tokenizer=tokenizer)


def test_resolve_refuses_a_tokenizer_when_its_ids_cannot_be_reproduced(encoder, minilm_path):
    from transformers import BertTokenizerFast

    class Shouting(BertTokenizerFast):
        def __call__(self, text, *args, **kwargs):
            return super().__call__(text.replace("plain", "loud"), *args, **kwargs)

    with pytest.raises(ExportError, match="cannot be reproduced.*A plain sentence"):
        resolve(encoder, tokenizer=Shouting.from_pretrained(minilm_path))


def test_resolve_leaves_out_token_types_when_the_tokenizer_makes_none(small, tokenizer):
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=30522, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    source = resolve(DistilBertModel(config), tokenizer=tokenizer)
    assert [spec.name for spec in source.signature.inputs] == ["input_ids", "attention_mask"]


def test_resolve_leaves_the_padding_positions_out_when_the_model_is_a_roberta(small, tokenizer):
    from transformers import RobertaConfig, RobertaModel

    source = resolve(RobertaModel(RobertaConfig(**small, pad_token_id=1)), tokenizer=tokenizer)
    assert source.signature.dim("sequence").max == 62
    ids = np.full((1, 62), 5, np.int64)
    feeds = {spec.name: np.ones_like(ids) if "mask" in spec.name else ids * 0 for spec in source.signature.inputs}
    assert source.reference({**feeds, "input_ids": ids})["last_hidden_state"].shape == (1, 62, 32)


def test_resolve_says_why_when_the_model_cannot_run_on_texts(tokenizer):
    from transformers import T5Config, T5Model

    model = T5Model(T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(InvalidInputError, match="cannot be run on input_ids, attention_mask of two texts"):
        resolve(model, tokenizer=tokenizer)


def test_resolve_names_tasks_when_the_architecture_has_none(small, tokenizer):
    from transformers import BertConfig, BertForMultipleChoice

    model = BertForMultipleChoice(BertConfig(**small))
    with pytest.raises(InvalidInputError, match="BertForMultipleChoice.*text-classification"):
        resolve(model, tokenizer=tokenizer)


def test_resolve_takes_the_base_model_when_hidden_states_of_a_classifier_are_wanted(classifier, tokenizer, tmp_path):
    source = resolve(classifier, tokenizer=tokenizer, task="feature-extraction")
    feeds = _feeds(source, tmp_path)
    with torch.inference_mode():
        want = classifier.eval().base_model(**{n: torch.from_numpy(a) for n, a in feeds.items()})[0].numpy()
    np.testing.assert_allclose(source.reference(feeds)["last_hidden_state"], want, atol=1e-6)


def test_resolve_refuses_scores_when_the_checkpoint_has_no_head(encoder, tokenizer, tmp_path):
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="is no .…ForSequenceClassification.: the head"):
        resolve(tmp_path, task="text-classification")


def test_resolve_changes_nothing_of_the_callers_model(classifier, tokenizer):
    classifier.train()
    before = classifier.config.to_dict()
    source = resolve(classifier, tokenizer=tokenizer)
    source.module_for("eager")
    assert classifier.training
    assert classifier.config.to_dict() == before
    assert classifier.config._attn_implementation == "sdpa"
    assert not source.module.training


def test_module_for_eager_shares_the_weights_and_gives_the_same(encoder, tokenizer, tmp_path):
    source = resolve(encoder, tokenizer=tokenizer)
    eager = source.module_for("eager")
    assert eager.model.config._attn_implementation == "eager"
    assert source.module.model.config._attn_implementation == "sdpa"
    assert eager.model.pooler.dense.weight is encoder.pooler.dense.weight
    feeds = {name: torch.from_numpy(array) for name, array in _feeds(source, tmp_path).items()}
    with torch.inference_mode():
        mask = feeds["attention_mask"].bool()
        torch.testing.assert_close(eager(**feeds)[0][mask], source.module(**feeds)[0][mask], atol=1e-5, rtol=1e-5)


def test_reference_computes_in_fp32_when_the_weights_are_half(classifier, tokenizer, tmp_path):
    half = classifier.half()
    source = resolve(half, tokenizer=tokenizer)
    assert "float16" in source.notes[0]
    assert half.dtype == torch.float16
    feeds = _feeds(source, tmp_path)
    got = source.reference(feeds)["logits"]
    want = classifier.float().eval()(**{n: torch.from_numpy(a) for n, a in feeds.items()}).logits
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)


def test_write_source_loads_again_with_the_same_answers_and_no_pickle(classifier, tokenizer, tmp_path):
    source = resolve(classifier, tokenizer=tokenizer)
    assert source.write_source(tmp_path / "source")
    names = {path.name for path in (tmp_path / "source").rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    feeds = _feeds(source, tmp_path / "assets")
    again = load_module(tmp_path / "source", source.signature, source.task)
    with torch.inference_mode():
        logits = again(**{n: torch.from_numpy(a) for n, a in feeds.items()})[0].numpy()
    np.testing.assert_allclose(logits, source.reference(feeds)["logits"], atol=1e-6)


def test_write_source_keeps_half_precision_weights_as_they_are(classifier, tokenizer, tmp_path):
    source = resolve(classifier.half(), tokenizer=tokenizer)
    source.write_source(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_write_source_keeps_nothing_when_the_class_is_the_users_own(small, tokenizer, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    class MyBertForSequenceClassification(BertForSequenceClassification):
        pass

    source = resolve(MyBertForSequenceClassification(BertConfig(**small)), tokenizer=tokenizer)
    with pytest.raises(BuildError, match="MyBertForSequenceClassification' is no class of transformers"):
        source.write_source(tmp_path / "source")
    assert not (tmp_path / "source").exists()


def test_write_source_says_why_a_model_cannot_be_written_as_safetensors(classifier, tokenizer, tmp_path):
    classifier.bert.encoder.layer[1].output.dense = classifier.bert.encoder.layer[0].output.dense
    source = resolve(classifier, tokenizer=tokenizer)
    with pytest.raises(BuildError, match="cannot be written as safetensors: .*shared tensors"):
        source.write_source(tmp_path / "source")


def test_resolve_takes_a_subclass_that_hands_all_arguments_on(small, tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    class Handing(BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    source = resolve(Handing(BertConfig(**small)), tokenizer=tokenizer, task="text-classification")
    assert [spec.name for spec in source.signature.inputs] == ["input_ids", "attention_mask", "token_type_ids"]


def test_resolve_takes_a_subclass_whose_forward_takes_its_inputs_only(small, tokenizer, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    class Plain(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            return super().forward(input_ids, attention_mask, token_type_ids)

    class Bare(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None):
            return (super().forward(input_ids, attention_mask).logits,)

    source = resolve(Plain(BertConfig(**small)), tokenizer=tokenizer, task="text-classification")
    assert source.reference(_feeds(source, tmp_path))["logits"].shape[1] == 2
    with pytest.raises(InvalidInputError, match=r"Bare.forward returns tuple, not outputs by name"):
        resolve(Bare(BertConfig(**small)), tokenizer=tokenizer, task="text-classification")


def test_resolve_refuses_a_model_that_reads_no_token_ids(small, tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    class Other(BertForSequenceClassification):
        def forward(self, pixels):
            return pixels

    with pytest.raises(InvalidInputError, match="forward takes pixels, and no input_ids"):
        resolve(Other(BertConfig(**small)), tokenizer=tokenizer, task="text-classification")


def test_resolve_computes_double_precision_in_fp32(classifier, tokenizer, tmp_path):
    source = resolve(classifier.double(), tokenizer=tokenizer)
    assert "float64" in source.notes[0]
    assert source.signature.outputs[0].dtype == "float32"
    assert classifier.dtype == torch.float64
    source.write_source(tmp_path / "source")
    again = load_module(tmp_path / "source", source.signature, source.task)
    assert {tensor.dtype for tensor in again.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "function"),
    [
        ({"num_labels": 3}, "softmax"),
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, "none"),
    ],
)
def test_resolve_chooses_the_function_as_the_pipeline_does(small, tokenizer, settings, function):
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**small, **settings))
    assert resolve(model, tokenizer=tokenizer).task_config["function_to_apply"] == function


def test_resolve_uses_the_given_labels_and_refuses_a_wrong_number(classifier, tokenizer):
    assert resolve(classifier, tokenizer=tokenizer, labels=["a", "b", "c"]).task_config["labels"] == ["a", "b", "c"]
    with pytest.raises(InvalidInputError, match="2 names, the model has 3 classes"):
        resolve(classifier, tokenizer=tokenizer, labels=["a", "b"])


def test_resolve_keeps_the_settings_of_a_pipeline(classifier, tokenizer):
    from transformers import pipeline

    pipe = pipeline(
        "text-classification", model=classifier, tokenizer=tokenizer, function_to_apply="sigmoid", max_length=16,
        truncation=True,
    )  # fmt: skip
    source = resolve(pipe)
    assert source.task_config["function_to_apply"] == "sigmoid"
    assert source.task_config["max_length"] == 16


def test_resolve_refuses_a_pipeline_when_its_task_or_settings_cannot_be_kept(encoder, tokenizer, small):
    from transformers import BertConfig, BertLMHeadModel, pipeline

    model = BertLMHeadModel(BertConfig(**small, is_decoder=True))
    with pytest.raises(InvalidInputError, match="'text-generation' are not supported"):
        resolve(pipeline("text-generation", model=model, tokenizer=tokenizer))
    pipe = pipeline(
        "feature-extraction", model=encoder, tokenizer=tokenizer, tokenize_kwargs={"add_special_tokens": False}
    )
    with pytest.raises(InvalidInputError, match="add_special_tokens"):
        resolve(pipe)


def test_corners_are_rows_that_texts_give_when_the_model_counts_the_ends(tmp_path):
    """BART's classifier reads the last ``</s>`` of each row and refuses rows that have none, or more than others."""
    config = BartConfig(
        vocab_size=SIZE, max_position_embeddings=40, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=0, num_labels=3,
    )  # fmt: skip
    shapes = {"batch": (1, 4, 8), "sequence": (1, 2, 32)}
    tokenizer = word_tokenizer("right", frame=True)
    source = resolve(BartForSequenceClassification(config), tokenizer=tokenizer, shapes=shapes)
    assert str(source.signature.dim("sequence")) == "sequence 3..32 (opt 3)"
    task = task_of(source, tmp_path)
    for at in ("min", "opt", "max"):
        for seed, items in enumerate([None, ["a film", "of <eos> two", "<eos>"]] * 3):
            feeds = task.example_feeds(at, ragged=True, seed=seed, items=items)
            source.signature.bind(feeds)
            assert source.reference(feeds)["logits"].shape == (len(feeds["input_ids"]), 3)


@pytest.mark.parametrize(("frame", "shortest"), [(False, 1), (True, 3)])
def test_sequence_begins_at_the_special_tokens_and_one_more(small, frame, shortest):
    model = BertModel(BertConfig(**{**small, "vocab_size": SIZE}))
    signature = resolve(model, tokenizer=word_tokenizer("right", frame=frame)).signature
    assert signature.dim("sequence").min == shortest


def test_resolve_refuses_a_model_of_images(tokenizer):
    """Its forward takes any keyword, and none of its classes reads token ids."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    with pytest.raises(InvalidInputError, match="ViTModel.forward takes .*, and no input_ids"):
        resolve(ViTModel(config), tokenizer=tokenizer, task="feature-extraction")
