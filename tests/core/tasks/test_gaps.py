"""With errors="null" what cannot be used is answered by None, and everything else as without it."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pandas as pd
import pytest

from mlflow_tdeploy.core.desk import Ask, Desk
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.pipeline import Pipeline
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.wire import ANSWER, asked_of
from tests.core.text_assets import LABELS, OUTPUTS, write_tokenizer

DIMS = (Dim("batch", 1, 2, 4), Dim("sequence", 1, 4, 8))
NULL = {"errors": "null"}
LONE = "\ud800"


def task_of(name, folder, **config):
    write_tokenizer(folder)
    inputs = tuple(TensorSpec(each, "int64", ("batch", "sequence")) for each in ("input_ids", "attention_mask"))
    outputs = (OUTPUTS[name],) if name in OUTPUTS else tuple(
        TensorSpec(each, "float32", ("batch", "sequence")) for each in ("start_logits", "end_logits")
    )  # fmt: skip
    classes = {"labels": LABELS} if "classification" in name and name != "zero-shot-classification" else {}
    return TASKS.get(name)({"max_length": 8, **classes, **config}, Signature(DIMS, inputs, outputs), folder)


def graph(feeds):
    """Answer by how many tokens a row has, whatever is asked."""
    ids = feeds["input_ids"]
    size = feeds["attention_mask"].sum(axis=1).astype(np.float32)
    each = np.broadcast_to(np.arange(ids.shape[1], dtype=np.float32), ids.shape)
    return {
        "logits": np.stack([size, -size, 0 * size], axis=1),
        "sentence_embedding": np.stack([size] * 4, axis=1),
        "last_hidden_state": np.repeat(each[:, :, None], 4, axis=2),
        "start_logits": -each, "end_logits": each,
    }  # fmt: skip


async def later(feeds):
    return graph(feeds)


@pytest.mark.parametrize(
    ("name", "inputs", "places"),
    [
        ("text-classification", ["good", None, "bad film", 3, LONE], [0, 2]),
        ("text-classification", pd.DataFrame({"text": ["good", pd.NA], "text_pair": ["bad", "film"]}), [0]),
        ("text-classification", [("good", "bad"), ("a", None), "film", ("a", "a")], [0, 3]),
        ("sentence-embedding", [float("nan"), "good", b"bad"], [1]),
        ("feature-extraction", ["good", "", "bad"], [0, 2]),
        ("question-answering", [("good", "a film"), ("", "a"), ("good", ""), ("a", None)], [0]),
        ("question-answering", [{"question": "good", "context": "a film"}, {"question": "a"}, "bad", ("a",)], [0]),
        ("sentence-embedding", [{"text": "good"}, {"text": None}, {"text": "bad"}], [0, 2]),
        ("sentence-embedding", pd.DataFrame({"text": [{"foo": "good"}, "a"]}), [1]),
        ("text-classification", ["a", ("a", "b"), "good", ["a", ["b"]]], [0, 2]),
        ("zero-shot-classification", ["good", None, "bad"], [0, 2]),
    ],
)
def test_what_can_be_used_is_answered_as_it_is_alone(tmp_path, name, inputs, places):
    config = {"entailment": 0, "contradiction": 1, "candidate_labels": ["bad", "film"]}
    asks = Pipeline(task_of(name, tmp_path, **(config if name == "zero-shot-classification" else {})), graph)
    with pytest.raises(InvalidInputError):
        asks(inputs)
    found = asks(inputs, NULL)
    assert len(found) == len(inputs)
    assert [place for place, one in enumerate(found) if one is not None] == places
    rows = inputs.to_numpy().tolist() if hasattr(inputs, "columns") else inputs
    rows = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
    alone = asks([rows[place] for place in places])
    for place, one in zip(places, alone, strict=True):
        np.testing.assert_equal(found[place], one)


def test_nothing_is_changed_where_all_can_be_used_and_all_may_be_lost(tmp_path):
    asks = Pipeline(task_of("sentence-embedding", tmp_path), graph)
    np.testing.assert_array_equal(asks(["good", "bad"], NULL), asks(["good", "bad"]))
    assert asks([None, 3], NULL) == [None, None]
    for empty in ([], {}, pd.DataFrame()):
        with pytest.raises(InvalidInputError, match="request is empty"):
            asks(empty, NULL)
    with pytest.raises(InvalidInputError, match="errors must be 'raise' or 'null', got 'ignore'"):
        asks(["good"], {"errors": "ignore"})
    with pytest.raises(InvalidInputError, match="Cannot read texts from int"):
        asks(7, NULL)


def test_what_fits_no_item_fails_the_request(tmp_path):
    config = {"entailment": 0, "contradiction": 1}
    asks = Pipeline(task_of("zero-shot-classification", tmp_path, **config), graph)
    with pytest.raises(InvalidInputError, match="leaves no room for a text"):
        asks(["good", None], {**NULL, "candidate_labels": ["a " * 20]})


def test_a_server_leaves_out_rows_that_are_no_texts(tmp_path):
    embeds = task_of("sentence-embedding", tmp_path)
    wrong = {"text": np.array([b"good", b"\xff", b"bad"], object)}
    (found, refused) = asyncio.run(Desk(embeds, later).answer([Ask(wrong, NULL), Ask(wrong)]))
    assert np.isnan(found["sentence_embedding"]).all(axis=1).tolist() == [False, True, False]
    assert isinstance(refused, InvalidInputError)


def test_a_task_of_tensors_has_no_such_parameter(tmp_path):
    assert "errors" not in [param.name for param in TASKS.get("tensors").params]
    assert all("errors" in [param.name for param in task.params] for task in TASKS if task.input_kind == "text")


def test_a_server_answers_null_in_json_and_numbers_that_are_none_in_tensors(tmp_path):
    classifies = task_of("text-classification", tmp_path / "labels")
    embeds = task_of("sentence-embedding", tmp_path / "vectors")
    asks = task_of("question-answering", tmp_path / "answers")
    pairs = asked_of(asks.columns, [("good", "a film"), ("good", "")])
    (answer,) = asyncio.run(Desk(asks, later).answer([Ask(pairs, NULL)]))
    first, second = (json.loads(one) for one in answer[ANSWER].ravel())
    assert (first["answer"], second) == ("a film", None)
    tokens = {"text": np.array([b"good", b""], object)}  # the second has no tokens
    good = {"text": np.array([b"bad"], object)}
    lost = {"text": np.array([b"", b""], object)}
    answers = asyncio.run(Desk(classifies, later).answer([Ask(tokens, NULL), Ask(good), Ask(lost, NULL), Ask(tokens)]))
    assert [json.loads(one) is None for one in answers[0][ANSWER].ravel()] == [False, True]
    assert answers[1]["label"].ravel().tolist() == [LABELS[0].encode()]
    assert [json.loads(one) for one in answers[2][ANSWER].ravel()] == [None, None]
    assert isinstance(answers[3], InvalidInputError)
    vectors, none = asyncio.run(Desk(embeds, later).answer([Ask(tokens, NULL), Ask(lost, NULL)]))
    assert np.isnan(vectors["sentence_embedding"]).all(axis=1).tolist() == [False, True]
    assert none["sentence_embedding"].shape == (2, 4)
