"""Models whose tokenizer transformers has in Python only: held against transformers' pipelines."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from mlflow.exceptions import MlflowException
from transformers import BertConfig, BertJapaneseTokenizer, CanineTokenizer, EsmConfig, EsmForMaskedLM, EsmTokenizer

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, MissingDependencyError
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.triton.library import library
from tests.served import close_to, pipeline_of, task_of, texts

PROTEINS = ["MKTVRQERLKSIVRILERSKEPVSGAQ<mask>AEELSV", "MKT<mask>RQ", "<mask>", "M" * 90 + "<mask>"]


@pytest.fixture(scope="module")
def japanese(tokenizer, tmp_path_factory):
    """Return the class of tokenizer that Japanese BERTs have, of whole words and word pieces."""
    vocabulary = tmp_path_factory.mktemp("slow") / "vocab.txt"
    words = sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])
    vocabulary.write_text("\n".join(word for word, _ in words), encoding="utf-8")
    return BertJapaneseTokenizer(str(vocabulary), do_lower_case=True, model_max_length=64)


def _model(small, auto_class):
    torch.manual_seed(5)
    labels = {"contradiction": 0, "so": 1, "entailment": 2}
    config = BertConfig(**small, initializer_range=0.3, id2label=dict(enumerate(labels)), label2id=labels)
    return getattr(transformers, auto_class).from_config(config).eval()


@pytest.mark.parametrize(
    ("task", "auto_class", "asked"),
    [
        ("text-classification", "AutoModelForSequenceClassification", {"top_k": None}),
        ("zero-shot-classification", "AutoModelForSequenceClassification", {"candidate_labels": ["animal", "a plant"]}),
        ("feature-extraction", "AutoModel", {}),
    ],
)
def test_answers_are_those_of_the_pipeline(japanese, small, tmp_path, task, auto_class, asked):
    model = _model(small, auto_class)
    cut = {"tokenize_kwargs": {"truncation": True}} if task == "feature-extraction" else {"truncation": True}
    cut = {} if task.startswith("zero") else cut
    pipe = transformers.pipeline(task, model=model, tokenizer=japanese, **cut)
    given = texts(200)
    given = [text for text in given if text.strip()] if task.startswith("zero") else given
    given = given if task != "zero-shot-classification" else given[:40]
    ours = pipeline_of(resolve(model, task=task, tokenizer=japanese), tmp_path)
    params = {**asked, "top_k": 0} if "top_k" in asked else asked
    for text, mine, theirs in zip(given, ours(given, params), (pipe(text, **asked) for text in given), strict=True):
        if task == "feature-extraction":
            np.testing.assert_allclose(mine, np.array(theirs), atol=1e-4)
        elif task == "text-classification":
            assert mine == close_to(theirs[0] if isinstance(theirs[0], list) else theirs), text
        else:
            assert mine == close_to(theirs), text


def test_fillings_are_those_of_the_pipeline(japanese, small, tmp_path):
    model = _model(small, "AutoModelForMaskedLM")
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=japanese, tokenizer_kwargs={"truncation": True})
    ours = pipeline_of(resolve(model, task="fill-mask", tokenizer=japanese), tmp_path)
    given = ["a film about [MASK] and more.", "[MASK] it is", "two [MASK] of [MASK]"]
    assert ours(given) == [close_to(pipe(text)) for text in given]


def test_proteins_are_filled_as_the_pipeline_fills_them(tmp_path):
    alphabet = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(alphabet))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"), model_max_length=128)
    torch.manual_seed(6)
    model = EsmForMaskedLM(
        EsmConfig(
            vocab_size=len(alphabet), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=130, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary",
            initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    ours = pipeline_of(resolve(model, task="fill-mask", tokenizer=tokenizer), tmp_path)
    assert ours(PROTEINS) == [close_to(pipe(text)) for text in PROTEINS]


def test_transformers_becomes_a_requirement_of_that_model_only(japanese, small, tmp_path):
    model = _model(small, "AutoModelForSequenceClassification")
    mlflow_tdeploy.save_model(model, tmp_path / "model", tokenizer=japanese, shapes={"sequence": (3, 16, 64)})
    lines = (tmp_path / "model" / "requirements.txt").read_text().splitlines()
    assert f"transformers=={transformers.__version__}" in lines
    assert not any(line.startswith("torch") for line in lines)
    with mlflow_tdeploy.load_model(str(tmp_path / "model")) as loaded:
        alone = loaded.predict(texts(64))
        assert not loaded.decision.failures
        with ThreadPoolExecutor(8) as pool:
            assert all(answer == close_to(alone) for answer in pool.map(loaded.predict, [texts(64)] * 8))
        with pytest.raises(MlflowException, match="Text 1 is not valid Unicode"):
            loaded.predict(["fine", "\ud800"])


def test_what_is_kept_of_it_names_no_place_of_this_machine(japanese, small, tmp_path):
    task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    said = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "BertJapaneseTokenizer"
    assert not {"name_or_path", "auto_map"} & set(said)
    assert not any(isinstance(value, str) and value.startswith("/") for value in said.values())


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [
        ("token-classification", "AutoModelForTokenClassification"),
        ("question-answering", "AutoModelForQuestionAnswering"),
    ],
)
def test_tasks_about_places_in_texts_refuse_it(japanese, small, task, auto_class):
    with pytest.raises(InvalidInputError, match="does not know where in a text its tokens are"):
        resolve(_model(small, auto_class), task=task, tokenizer=japanese)


def test_a_tokenizer_of_the_users_own_is_refused(small):
    class Mine(CanineTokenizer):
        pass

    with pytest.raises(InvalidInputError, match="not of transformers: a serving host would have to run its code"):
        resolve(_model({**small, "vocab_size": 0x110000}, "AutoModel"), tokenizer=Mine())


def test_a_server_without_transformers_is_told_of(japanese, small, tmp_path, monkeypatch):
    task = task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        task.prepare()


def test_damaged_files_are_told_of(japanese, small, tmp_path):
    task = task_of(resolve(_model(small, "AutoModel"), task="feature-extraction", tokenizer=japanese), tmp_path)
    (tmp_path / "tokenizer" / "vocab.txt").unlink()
    with pytest.raises(IntegrityError, match="Cannot read the tokenizer's files"):
        task.prepare()


def test_triton_is_refused():
    with pytest.raises(InvalidInputError, match="Triton's Python has none"):
        library(("transformers",))
