from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError
from mlflow_tdeploy.runtime.backends._torch_modules import load_module, run_module
from mlflow_tdeploy.source.resolve import resolve
from tests.served import pipeline_of, task_of, texts


@pytest.fixture
def chain(encoder, tokenizer, tmp_path):
    """Make a SentenceTransformer of a tiny BERT and more modules."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Transformer

    encoder.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")

    def make(*modules, **keywords):
        return SentenceTransformer(modules=[Transformer(str(tmp_path / "tiny")), *modules], device="cpu", **keywords)

    return make


def _pooling(mode="mean", width=32):
    from sentence_transformers.models import Pooling

    return Pooling(width, pooling_mode=mode)


def test_resolve_reads_a_folder_when_it_is_in_sentence_transformers_format(minilm_path):
    source = resolve(minilm_path)
    assert source.task == "sentence-embedding"
    assert source.packages == ("sentence-transformers",)
    assert (source.record.kind, source.record.architecture) == ("sentence-transformers", "BertModel")
    assert [str(spec) for spec in source.signature.outputs] == ["sentence_embedding: float32[batch, 384]"]
    assert source.signature.dim("sequence").max == source.task_config["max_length"] == 256


def test_resolve_allows_the_models_positions_when_shapes_asks_for_more_than_the_texts_limit(minilm_path):
    source = resolve(minilm_path, shapes={"sequence": (1, 128, 512)})
    assert source.signature.dim("sequence").max == 512
    assert source.task_config["max_length"] == 256  # texts are still cut where encode cuts them
    with pytest.raises(InvalidInputError, match="512 positions"):
        resolve(minilm_path, shapes={"sequence": (1, 128, 513)})


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_reference_equals_encode_for_every_pooling(chain, mode, tmp_path):
    model = chain(_pooling(mode))
    texts = ["a", "a much longer text than the first one", "", "three more words"]
    got = pipeline_of(resolve(model), tmp_path / "assets")(texts)
    np.testing.assert_allclose(got, model.encode(texts), atol=1e-5)


def test_reference_equals_encode_after_reloading_when_the_chain_is_long_and_cut(chain, tmp_path):
    from sentence_transformers.models import Dense, Normalize

    model = chain(_pooling(("mean", "cls"), 32), Dense(64, 24), Normalize(), truncate_dim=10)
    source = resolve(model)
    texts = ["one", "two words", "and a third text"]
    want = model.encode(texts)
    assert want.shape == (3, 10)
    np.testing.assert_allclose(pipeline_of(source, tmp_path / "assets")(texts), want, atol=1e-5)
    assert source.write_source(tmp_path / "source")
    assert not [path for path in (tmp_path / "source").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    feeds = task_of(source, tmp_path / "assets").encode(texts).collate([0, 1, 2])
    again = run_module(load_module(tmp_path / "source", source.signature, source.task), feeds, ["sentence_embedding"])
    np.testing.assert_allclose(again["sentence_embedding"], want, atol=1e-5)


@pytest.mark.parametrize("kind", ["layers", "words"])
def test_answers_are_those_of_encode_when_layers_or_words_have_weights(chain, tokenizer, kind, tmp_path):
    from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling, WordWeights

    if kind == "layers":
        weights = torch.nn.Parameter(torch.tensor([0.2, 1.5]))
        model = chain(WeightedLayerPooling(32, 2, layer_start=1, layer_weights=weights), _pooling())
        model[0].auto_model.config.output_hidden_states = True
    else:
        words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])]
        model = chain(WordWeights(words, {"word": 3.0, "third": 0.2}), _pooling("mean"))
    texts = ["one", "two word and a third text", "three more words of a text that is longer"]
    want, plain = model.encode(texts), chain(_pooling()).encode(texts)
    assert np.abs(want - plain).max() > 1e-3  # they do something
    mlflow_tdeploy.save_model(model, tmp_path / "model", precisions=["fp32"], shapes={"sequence": (3, 16, 64)})
    with mlflow_tdeploy.load_model(str(tmp_path / "model")) as loaded:
        assert loaded.decision.chosen.variant == "ort-cpu-fp32"
        np.testing.assert_allclose(loaded.predict(texts), want, atol=1e-5)
        np.testing.assert_allclose(loaded.predict(texts, variant="hf"), want, atol=1e-5)


def test_resolve_lower_cases_when_the_model_does(small, encoder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "hello": 2, "world": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.save_pretrained(tmp_path / "cased")
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "cased"
    )
    model = SentenceTransformer(
        modules=[Transformer(str(tmp_path / "cased"), do_lower_case=True), _pooling()], device="cpu"
    )
    task = task_of(resolve(model), tmp_path / "assets")
    assert task.encode(["HELLO World"]).collate([0])["input_ids"].tolist() == [[2, 3]]


@pytest.mark.parametrize("default", [None, "query"])
def test_prompts_come_before_texts_as_in_encode(chain, default, tmp_path):
    prompts = {"query": "query: ", "passage": "passage: ", "nothing": ""}
    model = chain(_pooling(), prompts=prompts, default_prompt_name=default)
    ours, some = pipeline_of(resolve(model), tmp_path), texts(20)
    for asked in ({}, {"prompt_name": "query"}, {"prompt_name": "passage"}, {"prompt_name": "nothing"}, {"prompt": ""},
                  {"prompt": "about "}, {"prompt": "about ", "prompt_name": "query"}):  # fmt: skip
        np.testing.assert_allclose(ours(some, asked), model.encode(some, **asked), atol=1e-5)
    np.testing.assert_allclose(ours(some, {"prompt_name": "query"}), model.encode_query(some), atol=1e-5)
    assert not np.allclose(ours(some, {"prompt_name": "query"}), ours(some, {"prompt": ""}), atol=1e-3)
    with pytest.raises(InvalidInputError, match="prompt_name is 'other', and the model's prompts are: .*passage"):
        ours(some, {"prompt_name": "other"})


def test_prompts_that_are_left_out_of_pooling_are_refused(chain):
    model = chain(_pooling(), prompts={"query": "query: "})
    model.set_pooling_include_prompt(False)
    with pytest.raises(InvalidInputError, match="include_prompt=False.*model.prompts = {}"):
        resolve(model)
    model.prompts = {}
    assert "prompts" not in resolve(model).task_config


def test_resolve_refuses_a_module_when_it_cannot_be_exported(chain, minilm_path, tmp_path):
    class Shift(torch.nn.Module):
        def forward(self, features):
            return features

    with pytest.raises(InvalidInputError, match=r"Shift.*cannot be exported.*Pooling"):
        resolve(chain(_pooling(), Shift()))
    folder = tmp_path / "named"
    shutil.copytree(minilm_path, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "subprocess.Popen"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InvalidInputError, match=r"subprocess\.Popen"):
        resolve(folder)
    (folder / "modules.json").write_text("[{]")
    with pytest.raises(InvalidInputError, match="damaged"):
        resolve(folder)


def test_resolve_refuses_a_folder_when_a_later_module_is_pickled(chain, tmp_path):
    from sentence_transformers.models import Dense

    folder = tmp_path / "saved"
    chain(_pooling(), Dense(32, 8)).save(str(folder), create_model_card=False)
    dense = next(path for path in folder.iterdir() if path.name.endswith("Dense"))
    (dense / "model.safetensors").unlink()
    torch.save({}, dense / "pytorch_model.bin")
    with pytest.raises(InvalidInputError, match=r"Dense \(only pytorch_model\.bin\)"):
        resolve(folder)


@pytest.mark.parametrize("extra", [None, "other.safetensors"])
def test_resolve_refuses_a_folder_when_a_pickled_module_is_in_a_folder_of_any_name(chain, tmp_path, extra):
    from sentence_transformers.models import Dense

    folder = tmp_path / "saved"
    chain(_pooling(), Dense(32, 8)).save(str(folder), create_model_card=False)
    modules = json.loads((folder / "modules.json").read_text())
    dense = (folder / modules[2]["path"]).rename(folder / "dense")
    modules[2]["path"] = "dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert resolve(folder).signature.outputs[0].shape[-1] == 8
    (dense / "model.safetensors").rename(dense / (extra or "away"))
    torch.save({}, dense / "pytorch_model.bin")
    with pytest.raises(InvalidInputError, match=r"dense \(only pytorch_model\.bin\)"):
        resolve(folder)


@pytest.mark.parametrize("path", ["../outside", "/outside", "a/../../outside"])
def test_resolve_refuses_a_folder_when_a_module_lies_outside(chain, tmp_path, path):
    folder = tmp_path / "saved"
    chain(_pooling()).save(str(folder), create_model_card=False)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InvalidInputError, match="Unsafe path"):
        resolve(folder)


def test_resolve_reads_the_old_layout_when_the_transformer_has_a_folder_of_its_own(chain, tmp_path):
    folder = tmp_path / "saved"
    model = chain(_pooling())
    model.save(str(folder), create_model_card=False)
    modules = json.loads((folder / "modules.json").read_text())
    assert modules[0]["path"] == ""
    (folder / "0_BERT").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_BERT" / path.name)
    modules[0]["path"] = "0_BERT"
    (folder / "modules.json").write_text(json.dumps(modules))
    texts = ["one", "two words"]
    np.testing.assert_allclose(pipeline_of(resolve(folder), tmp_path / "assets")(texts), model.encode(texts), atol=1e-5)
    (folder / "0_BERT" / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"no config\.json in its folder '0_BERT'"):
        resolve(folder)


def test_resolve_pools_by_the_mean_when_a_plain_folder_is_to_embed(chain, tmp_path, caplog):
    model = chain(_pooling())
    source = resolve(tmp_path / "tiny", task="sentence-embedding")
    texts = ["one", "two words"]
    np.testing.assert_allclose(pipeline_of(source, tmp_path / "assets")(texts), model.encode(texts), atol=1e-5)
    assert "pooled by their mean" in caplog.text


def test_resolve_gives_hidden_states_when_asked_of_a_sentence_transformer(chain):
    source = resolve(chain(_pooling()), task="feature-extraction")
    assert [spec.name for spec in source.signature.outputs] == ["last_hidden_state"]


def test_resolve_changes_nothing_of_the_callers_sentence_transformer(chain):
    model = chain(_pooling())
    model.train()
    resolve(model).module_for("eager")
    assert model.training
    assert model[0].auto_model.config._attn_implementation == "sdpa"
