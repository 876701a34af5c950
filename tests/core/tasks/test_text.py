"""What all text tasks share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import XLNetConfig, XLNetModel

from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, ManifestError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source.resolve import resolve
from tests.core.text_assets import LABELS, OUTPUTS, write_tokenizer
from tests.served import task_of
from tests.words import SIZE, TEXTS, word_tokenizer


def word_task(name, folder, *, batch="batch", names=("input_ids", "attention_mask"), **config):
    """A text task whose tokenizer splits at white space, knows six words and adds no special tokens."""
    write_tokenizer(folder)
    dims = (Dim("batch", 1, 2, 4), Dim("sequence", 1, 4, 8))
    inputs = tuple(TensorSpec(each, "int64", (batch, "sequence")) for each in names)
    classes = {"labels": LABELS} if name in ("text-classification", "token-classification") else {}
    config = {"max_length": 8, "pad_id": 0, **classes, **config}
    return TASKS.get(name)(config, Signature(dims, inputs, (OUTPUTS[name],)), folder)


@pytest.fixture(scope="module")
def source(tiny_bert):
    return resolve(tiny_bert, shapes={"batch": (1, 4, 8), "sequence": (1, 16, 48)})


@pytest.fixture(scope="module")
def task(source, tmp_path_factory):
    return task_of(source, tmp_path_factory.mktemp("assets"))


@pytest.mark.parametrize(
    "inputs",
    [
        ["a", "b"],
        ("a", "b"),
        np.array(["a", "b"]),
        np.array([["a"], ["b"]], dtype=object),
        pd.Series(["a", "b"]),
        pd.DataFrame({"anything": ["a", "b"]}),
        pd.DataFrame({"text": ["a", "b"], "id": [1, 2]}),
        {"inputs": ["a", "b"]},
        {"text": pd.Series(["a", "b"]), "id": [1, 2]},
        [{"text": "a"}, {"text": "b", "id": 2}],
        [{"text": np.array("a"), "id": np.array("7")}, {"text": np.array("b"), "id": np.array("8")}],
        {"text": np.array(["a", "b"]), "id": np.array(["7", "8"])},
    ],
)
def test_items_reads_texts_of_every_form(task, inputs):
    assert task.items(inputs) == ["a", "b"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "empty"),
        (pd.DataFrame({"text": []}), "empty"),
        (None, "Cannot read texts from NoneType"),
        (7, "Cannot read texts from int"),
        (["a", None], r"Text 1 is missing \(None\)"),
        (["a", float("nan")], r"Text 1 is missing \(nan\)"),
        (["a", b"b"], r"Text 1 is bytes.*decode"),
        (b"a", "Text 0 is bytes"),
        (["a", 3], "Text 1 must be a string, got int"),
        (pd.DataFrame({"x": ["a"], "y": ["b"]}), "which column holds the texts"),
        ({"text": ["a"], "inputs": ["b"]}, "which column holds the texts"),
        ({}, "request is empty"),
        (pd.DataFrame(), "request is empty"),
        (["a", pd.NA], "Text 1 is missing"),
        (pd.DataFrame({"x": ["a", pd.NA]}), "Text 1 is missing"),
        ([pd.NaT], "Text 0 is missing"),
        ([10**5000], "Text 0 must be a string, got int"),
        (np.float64(1), "Cannot read texts from float64"),
        ({pd.NA: ["a"], "b": ["c"]}, "which column holds the texts"),
        ({"text": {"text": "a"}}, "Cannot read texts from dict"),
    ],
)
def test_items_names_the_position_when_an_input_is_no_text(task, inputs, message):
    with pytest.raises(InvalidInputError, match=message):
        task.items(inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (pd.DataFrame({"text": ["a"], "text_pair": ["b"]}), "reads no pairs of texts"),
        ({"text": ["a"], "text_pair": ["b"]}, "reads no pairs of texts"),
        ([{"text": "a", "text_pair": "b"}], "reads no pairs of texts"),
        (np.array([["a", "b"], ["c", "d"]]), r"shape \(2, 2\)"),
        ([np.array(["a", "b"])], "Text 0 must be a string, got ndarray"),
        ([["a", "b"]], "Text 0 must be a string, got list"),
    ],
)
def test_a_task_of_single_texts_reads_no_pairs(tmp_path, inputs, message):
    with pytest.raises(InvalidInputError, match=message):
        word_task("sentence-embedding", tmp_path).items(inputs)


def test_encode_names_the_text_when_it_is_not_unicode(task):
    with pytest.raises(InvalidInputError, match="Text 1 is not valid Unicode"):
        task.encode(["fine", "bad \ud800"])


def test_encode_cuts_at_the_shorter_of_model_and_signature(task):
    assert task.encode(["word " * 300]).lengths == [48]


def test_collate_pads_to_the_longest_of_the_batch_only(task):
    feeds = task.encode(["one", "one two three", "word " * 300]).collate([0, 1])
    assert feeds["input_ids"].tolist()[0][3:] == [0, 0]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert all(array.dtype == np.int64 for array in feeds.values())


@pytest.mark.parametrize("at", ["min", "opt", "max"])
def test_example_feeds_fit_the_signature_and_run(task, source, at):
    for ragged in (False, True):
        feeds = task.example_feeds(at, ragged=ragged, seed=1)
        sizes = source.signature.bind(feeds)
        assert sizes == {dim.name: dim.at(at) for dim in source.signature.dims}
        assert bool((feeds["attention_mask"] == 0).any()) == (ragged and at != "min")
        assert np.isfinite(source.reference(feeds)["logits"]).all()


def test_tokenizer_says_so_when_its_file_is_damaged(source, tmp_path):
    task = task_of(source, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        task.encode(["a"])


@pytest.mark.parametrize("params", [["top_k"], "top_k", 3, np.array([1])])
def test_check_params_refuses_what_is_no_mapping(task, params):
    with pytest.raises(InvalidInputError, match="params must be a mapping"):
        task.check_params(params)


@pytest.mark.parametrize("name", sorted({*OUTPUTS} - {"fill-mask", "zero-shot-classification"}))  # these need more
@pytest.mark.parametrize(("texts", "bad"), [([""], 0), (["a film", "good", "bad", " \t"], 3)])
def test_encode_names_the_text_when_it_has_no_tokens(name, texts, bad, tmp_path):
    task = word_task(name, tmp_path)
    with pytest.raises(InvalidInputError, match=f"Text {bad} has no tokens"):
        task.encode(task.items(texts))
    assert task.encode(["film"]).lengths == [1]


@pytest.mark.parametrize("items", [None, ["a plain text", "one with [SEP] and [MASK] in it", "[CLS]"]])
@pytest.mark.parametrize("at", ["min", "opt", "max"])
def test_example_feeds_have_special_tokens_around_every_row_and_none_within(task, at, items):
    special = {101, 102, 0, 100, 103}
    for seed in range(20):
        feeds = task.example_feeds(at, ragged=True, seed=seed, items=items)
        for ids, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True):
            row = ids[mask == 1].tolist()
            assert (row[0], row[-1]) == (101, 102)
            assert len(row) > 2
            assert not special & set(row[1:-1])


def test_example_feeds_keep_special_tokens_on_the_side_where_the_tokenizer_adds_them(tmp_path):
    words = word_task("feature-extraction", tmp_path)
    words.tokenizer.post_processor = TemplateProcessing(single="$A [UNK]", special_tokens=[("[UNK]", 1)])
    feeds = words.example_feeds("opt", ragged=True, seed=3)
    for ids, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True):
        row = ids[mask == 1].tolist()
        assert row[-1] == 1
        assert 1 not in row[:-1]


def test_pad_uses_the_tokenizers_type_for_padding(tmp_path):
    """XLNet's padding has a type of its own."""
    words = word_task(
        "feature-extraction", tmp_path, names=("input_ids", "attention_mask", "token_type_ids"), pad_type_id=3
    )
    feeds = words.encode(["a", "a good film"]).collate([0, 1])
    assert feeds["token_type_ids"].tolist() == [[0, 3, 3], [0, 0, 0]]


def test_settings_keep_the_padding_type_of_an_xlnet(tmp_path):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(frame=True)
    tokenizer._pad_token_type_id = 3  # as XLNetTokenizer does
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = XLNetModel(XLNetConfig(vocab_size=SIZE, d_model=32, n_layer=1, n_head=2, d_inner=64))
    source = resolve(model, tokenizer=tokenizer)
    feeds = (encoded := task_of(source, tmp_path).encode(TEXTS)).collate(range(len(TEXTS)))
    types = tokenizer(TEXTS, padding=True, return_tensors="np")["token_type_ids"]
    assert len(set(encoded.lengths)) > 1
    np.testing.assert_array_equal(feeds["token_type_ids"], types)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": None}, "max_length: expected an integer"),
        ({"max_length": "x"}, "max_length: expected an integer, got 'x'"),
        ({"max_length": 0}, "max_length must be from 1"),
        ({"pad_id": -1}, "pad_id must be from 0"),
        ({"pad_id": 2**40}, "pad_id must be from 0 to"),
        ({"padding_side": "middle"}, "padding_side: expected one of"),
        ({"labels": []}, "0 labels for a graph that returns 3 classes"),
        ({"labels": ["one"]}, "1 labels for a graph that returns 3 classes"),
        ({"labels": [1, 2, 3]}, "expected a string, got 1"),
        ({"function_to_apply": "relu"}, "function_to_apply: expected one of"),
        ({"beauty": 1}, "unknown key 'beauty'"),
    ],
)
def test_a_damaged_config_says_what_is_wrong_with_it(tmp_path, change, message):
    with pytest.raises(ManifestError, match=f"task_config of 'text-classification'.*{message}"):
        word_task("text-classification", tmp_path, **change)


def test_pad_fills_up_the_smallest_batch_with_real_rows(tmp_path):
    """A row that is masked as a whole can make a graph answer NaN."""
    write_tokenizer(tmp_path)
    dims = (Dim("batch", 3, 3, 4), Dim("sequence", 1, 4, 8))
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    signature = Signature(dims, inputs, (OUTPUTS["sentence-embedding"],))
    task = TASKS.get("sentence-embedding")({"max_length": 8}, signature, tmp_path)
    feeds = task.encode(["a good film"]).collate([0])
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]] * 3
    assert feeds["input_ids"].tolist() == [feeds["input_ids"][0].tolist()] * 3


def test_a_tokenizer_that_splits_at_random_for_training_does_not_while_it_serves(tmp_path):
    task = word_task("sentence-embedding", tmp_path)
    merges = models.BPE({"[PAD]": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], dropout=0.9)
    Tokenizer(merges).save(str(tmp_path / "tokenizer.json"))
    assert "0.9" in (tmp_path / "tokenizer.json").read_text()
    assert {task.encode(["ab"]).collate([0])["input_ids"].tolist()[0][0] for _ in range(50)} == {3}
