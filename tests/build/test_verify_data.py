from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlflow_tdeploy.build.golden import golden_requests
from mlflow_tdeploy.build.reference import Case, Score
from mlflow_tdeploy.build.verify_data import VerifyData, default_texts
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from tests.build.sources import linear_task
from tests.build.test_verify import classifier
from tests.core.text_assets import write_tokenizer


def test_default_texts_are_at_least_200_different_ones():
    assert len(set(default_texts())) == len(default_texts()) >= 200


def test_of_reads_texts_and_labels_when_given_a_table():
    frame = pd.DataFrame({"text": ["a", "b"], "label": ["no", "yes"], "id": [1, 2]})
    for value in (frame, {"texts": ["a", "b"], "labels": np.array(["no", "yes"])}):
        data = VerifyData.of(value)
        assert (data.texts, data.labels) == (("a", "b"), ("no", "yes"))


def test_sha256_is_the_same_for_the_same_data_however_it_is_given():
    a = VerifyData.of(["one", "two"], name="a")
    b = VerifyData.of(pd.Series(["one", "two"]), name="b")
    assert a.sha256 == b.sha256
    assert a.sha256 != VerifyData.of(["two", "one"]).sha256
    assert a.sha256 != VerifyData.of({"text": ["one", "two"], "label": [0, 1]}).sha256


def test_sha256_depends_on_the_arrays_of_requests():
    x = np.ones((1, 4), np.float32)
    assert VerifyData.of([{"x": x}]).sha256 == VerifyData.of({"x": x.copy()}).sha256
    assert VerifyData.of([{"x": x}]).sha256 != VerifyData.of([{"x": 2 * x}]).sha256


def test_for_task_generates_requests_in_range_when_none_are_given():
    task = linear_task()
    data = VerifyData.of(None).for_task(task)
    assert {request["x"].shape for request in data.requests} == {(1, 4), (2, 4)}
    assert data.record.count == len(data.requests)


def test_for_task_takes_the_default_texts_when_the_task_takes_texts(minilm_path):
    data = VerifyData.of(None).for_task(classifier(minilm_path))
    assert data.texts == default_texts()


def test_for_task_adds_built_in_texts_to_a_few(minilm_path):
    data = VerifyData.of(["mine", default_texts()[0]]).for_task(classifier(minilm_path))
    assert data.texts[:2] == ("mine", default_texts()[0])
    assert len(data.texts) == len(set(data.texts)) == 200
    assert data.record.name == "given and 198 WordNet definitions"


def test_for_task_adds_texts_without_labels_to_few_with_some(minilm_path):
    data = VerifyData.of({"text": ["a", "b"], "label": ["no", "yes"]}).for_task(classifier(minilm_path))
    assert (data.texts[:2], data.labels, len(data.texts)) == (("a", "b"), ("no", "yes"), 200)
    assert data.record.name == "given and 198 WordNet definitions without labels"
    score = Score(classifier(minilm_path), data)
    logits = np.array([[5.0, -5.0]] * 3, np.float32)
    score.add(Case("items", "batch=3", {}, (0, 1, 2), answers=True), {"logits": logits})
    assert score.metric()["accuracy"] == 0.5  # of the two that have a label


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "empty"),
        (["a", None], "item 1 must be a text or an image"),
        ("a", "Data cannot be of type str"),
        (7, "Data cannot be of type int"),
        ({"text": ["a"], "label": ["x", "y"]}, "1 items and 2 labels"),
        ({"text": ["a"], "label": [None]}, "class name or number"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "no column of texts"),
    ],
)
def test_of_says_what_is_wrong_when_data_cannot_be_used(value, message):
    with pytest.raises(InvalidInputError, match=message):
        VerifyData.of(value)


def test_for_task_refuses_data_of_the_other_kind(minilm_path: Path):
    with pytest.raises(InvalidInputError, match="verified on arrays"):
        VerifyData.of(["text"]).for_task(linear_task())
    with pytest.raises(InvalidInputError, match="takes such, got arrays"):
        VerifyData.of([{"x": np.ones(1)}]).for_task(classifier(minilm_path))


def test_for_task_names_the_request_when_one_does_not_fit_the_signature():
    requests = [{"x": np.ones((1, 4), np.float32)}, {"x": np.ones((99, 4), np.float32)}]
    with pytest.raises(InvalidInputError, match=r"request 1: .*batch.*99"):
        VerifyData.of(requests).for_task(linear_task())


def test_for_task_names_the_label_when_the_model_has_no_such_class(minilm_path: Path):
    with pytest.raises(InvalidInputError, match=r"label 1 \('maybe'\)"):
        VerifyData.of({"text": ["a", "b"], "label": ["no", "maybe"]}).for_task(classifier(minilm_path))


def test_made_up_requests_differ_and_whole_numbers_of_which_nothing_is_known_are_told(tmp_path, caplog):
    dims = (Dim("batch", 1, 2, 4),)
    inputs = (TensorSpec("ids", "int64", ("batch", 3)), TensorSpec("attention_mask", "int64", ("batch", 3)))
    signature = Signature(dims, inputs, (TensorSpec("y", "float32", ("batch", 3)),))
    data = VerifyData.of(None).for_task(TASKS.get("tensors")({}, signature, tmp_path))
    assert len({request["ids"].tobytes() for request in data.requests}) > 4
    assert "the input 'ids' takes, so variants are checked with 0 and 1 only" in caplog.text
    caplog.clear()
    VerifyData.of(None).for_task(TASKS.get("tensors")({"integer_ranges": {"ids": 9}}, signature, tmp_path))
    assert caplog.text == ""


PAIRS = [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    "given",
    [
        PAIRS,
        [list(pair) for pair in PAIRS],
        [{"text": one, "text_pair": other} for one, other in PAIRS],
        pd.DataFrame(PAIRS, columns=["text", "text_pair"]),
        {"text": ["a", "c"], "text_pair": ["b", "d"], "query": np.array([1, 2])},
    ],
)
def test_pairs_are_topped_up_with_pairs(minilm_path, given):
    task = classifier(minilm_path)
    data = VerifyData.of(given).for_task(task)
    assert data.texts[:2] == (("a", "b"), ("c", "d"))
    assert len(data.texts) == 200
    assert all(isinstance(one, tuple) and len(one) == 2 for one in data.texts)
    assert data.sha256 == VerifyData.of(PAIRS).for_task(task).sha256
    requests = golden_requests(task, data, lambda feeds: {"logits": np.zeros((len(feeds["input_ids"]), 3))})
    assert task.items(requests[0].inputs) == list(requests[0].inputs)


def test_records_have_labels_too_and_a_column_of_another_task_is_none():
    data = VerifyData.of([{"text": "a", "label": "no"}, {"text": np.array("b"), "label": np.array("yes")}])
    assert (data.texts, data.labels) == (("a", "b"), ("no", "yes"))
    with pytest.raises(InvalidInputError, match="label must be a class name"):
        VerifyData.of([{"text": "a", "label": "no"}, {"text": "b"}])
    assert VerifyData.of({"text": ["a"], "answers": ["b"]}).labels is None
    assert VerifyData.of([{"x": np.array(["a", "b"])}]).requests[0]["x"].shape == (2,)


def test_questions_have_the_answers_that_squad_gives():
    records = [
        {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": np.array([0])}},
        {"question": "q", "context": "d", "answers": {"text": [], "is_impossible": True}},
    ]
    for given in (records, pd.DataFrame(records)):
        data = VerifyData.of(given)
        assert data.texts[1] == {"question": "q", "context": "d"}
        assert data.labels == (
            {"text": ["c"], "answer_start": [0]}, {"text": [], "is_impossible": True},
        )  # fmt: skip


def test_golden_requests_fit_into_one_run_of_the_graph(tmp_path):
    write_tokenizer(tmp_path)
    names = ("input_ids", "attention_mask")
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    outputs = (TensorSpec("logits", "float32", ("batch", 1)),)
    for most in (4, 1):
        signature = Signature((Dim("batch", 1, 1, most), Dim("sequence", 1, 4, 8)), inputs, outputs)
        task = TASKS.get("text-ranking")({"max_length": 8}, signature, tmp_path)
        data = VerifyData.of(None).for_task(task)
        if most == 1:
            with pytest.raises(InvalidInputError, match="with 2 rows for one item of the data, and it takes 1 at once"):
                golden_requests(task, data, lambda feeds: {})
            continue
        found = golden_requests(task, data, lambda feeds: {"logits": np.zeros((len(feeds["input_ids"]), 1))})
        assert max(len(request.feeds["input_ids"]) for request in found) == 4
