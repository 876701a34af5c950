"""Requests that come together, each with its own answer or its own error."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from mlflow_tdeploy.core.desk import Ask, Desk
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.wire import ANSWER, Part, answer_parts, pack, request_parts, texts_of
from tests.core.text_assets import LABELS, OUTPUTS, write_tokenizer

DIMS = (Dim("batch", 1, 2, 4), Dim("sequence", 1, 4, 8))


@pytest.fixture
def task(tmp_path):
    write_tokenizer(tmp_path)
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    signature = Signature(DIMS, inputs, (OUTPUTS["text-classification"],))
    config = {"max_length": 8, "pad_id": 0, "labels": LABELS}
    return TASKS.get("text-classification")(config, signature, tmp_path)


class Graph:
    """Scores a text by its number of tokens, and remembers what it was asked at once."""

    def __init__(self, *, fails_at: int = 0):
        self.batches, self.running, self.most, self.fails_at = [], 0, 0, fails_at

    async def __call__(self, feeds):
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        lengths = feeds["attention_mask"].sum(axis=1)
        self.batches.append(lengths.tolist())
        if self.fails_at and (lengths == self.fails_at).any():
            raise RuntimeError("no memory")
        return {"logits": np.eye(3, dtype=np.float32)[lengths % 3] * 5}


def text(*values):
    return {"text": np.array([value.encode() for value in values], dtype=object).reshape(-1, 1)}


def labels(answer):
    return [one.decode() for one in answer["label"].ravel()]


def test_texts_of_all_requests_share_batches_which_run_at_once(task):
    graph = Graph()
    asks = [Ask(text("cat")), Ask(text("a dog and", "dog")), Ask(text("the cat")), Ask(text("cat", "cat", "cat"))]
    answers = asyncio.run(Desk(task, graph).answer(asks))
    assert [labels(one) for one in answers] == [
        [LABELS[1]], [LABELS[0], LABELS[1]], [LABELS[2]], [LABELS[1]] * 3,
    ]  # fmt: skip
    assert sorted(map(len, graph.batches)) == [3, 4]
    assert graph.most == 2


def test_what_is_wrong_with_a_request_is_its_own(task):
    asks = [
        Ask(text("cat")),
        Ask({"text": np.array([[b"\xff"]], dtype=object)}),
        Ask(text("dog"), {"top_k": -1}),
        Ask({**text("dog"), "input_ids": np.ones((1, 2), np.int64)}),
        Ask({"input_ids": np.ones((1, 2), np.int64)}),
        Ask({"text": np.zeros((0, 1), dtype=object)}),
    ]
    first, *others = asyncio.run(Desk(task, Graph()).answer(asks))
    assert labels(first) == [LABELS[1]]
    assert all(isinstance(one, InvalidInputError) for one in others)


def test_a_batch_that_fails_is_run_again_for_each_request(task):
    """One text that the graph cannot take fails its own request; the others that were in its batch are answered."""
    graph = Graph(fails_at=3)
    answers = asyncio.run(Desk(task, graph).answer([Ask(text("cat")), Ask(text("cat dog cat")), Ask(text("dog"))]))
    assert labels(answers[0]) == labels(answers[2]) == [LABELS[1]]
    assert str(answers[1]) == "no memory"


def test_parameters_count_for_their_own_request(task):
    graph = Graph()
    one, two, none = asyncio.run(
        Desk(task, graph).answer(
            [Ask(text("cat")), Ask(text("cat"), {"top_k": 2}), Ask(text("cat"), {"function_to_apply": "none"})]
        )
    )
    assert graph.batches == [[1, 1, 1]]
    assert [len(json.loads(found[ANSWER][0, 0])) for found in (two,)] == [2]
    assert "label" not in two
    assert none["score"][0] == 5
    assert one["score"][0] < 1


def test_only_wanted_outputs_come_back_and_raw_ones_for_raw_inputs(task):
    feeds = {name: np.ones((2, 4), np.int64) for name in ("input_ids", "attention_mask")}
    desk = Desk(task, Graph())
    only, raw = asyncio.run(desk.answer([Ask(text("cat"), outputs=("score",)), Ask(feeds)]))
    assert set(only) == {"score"}
    assert set(raw) == {"logits"}


def test_parts_say_what_a_server_has_to_declare(task):
    assert request_parts(task) == (Part("text", "string"), Part("text_pair", "string"))
    assert answer_parts(task) == (Part("label", "string"), Part("score", "float64"), Part(ANSWER, "string"))


def test_pack_gives_answers_of_another_form_as_json_only(task):
    packed = pack(task, [[{"label": "é", "score": np.float32(0.5)}]])
    assert list(packed) == [ANSWER]
    assert json.loads(packed[ANSWER][0, 0]) == [{"label": "é", "score": 0.5}]


def test_texts_are_one_a_row():
    assert texts_of(np.array([["é".encode()], [b"b"]], dtype=object)) == ["é", "b"]
    with pytest.raises(InvalidInputError, match="one text per row"):
        texts_of(np.array([[b"a", b"b"]], dtype=object))


def test_an_answer_without_what_is_wanted_is_an_error(task):
    """With top_k=2 there are several labels a text, so only JSON: a client that wants 'label' must not get nothing."""
    asks = [
        Ask(text("cat"), {"top_k": 2}, ("label",)),
        Ask(text("cat"), {"top_k": 2}, ("label", "score", ANSWER)),
        Ask(text("cat"), {}, ("logits",)),
        Ask({"input_ids": np.ones((1, 2), np.int64), "attention_mask": np.ones((1, 2), np.int64)}, {}, ("label",)),
    ]
    first, second, third, fourth = asyncio.run(Desk(task, Graph()).answer(asks))
    assert isinstance(first, InvalidInputError)
    assert "has no output 'label'; with its parameters the answer is answer" in str(first)
    assert list(second) == [ANSWER]
    assert "has no output 'logits'" in str(third)
    assert "has no output 'label'; with its parameters the answer is logits" in str(fourth)


def test_pairs_are_asked_by_two_tensors_and_what_is_wrong_with_them_is_told(task):
    def pair(values, others):
        return {**text(*values), "text_pair": text(*others)["text"]}

    asks = [
        Ask(pair(["cat"], ["dog and"])),
        Ask(pair(["cat", "dog"], ["a"])),
        Ask({"text_pair": text("cat")["text"]}),
        Ask(pair(["cat"], ["", "a"])),
        Ask(pair(["cat"], [""])),
    ]
    graph = Graph()
    first, *others, empty = asyncio.run(Desk(task, graph).answer(asks))
    assert labels(first) == [LABELS[0]]  # of three tokens
    assert labels(empty) == [LABELS[1]]
    says = ["different numbers of rows: 2 of 'text', 1 of 'text_pair'", "has text_pair, and no 'text'"]
    assert [str(one).rstrip(".").endswith(why) for one, why in zip(others, says, strict=False)] == [True, True]
    assert all(isinstance(one, InvalidInputError) for one in others)


@pytest.mark.parametrize("documents", [b"[" * 200_000, b'"good"', b'{"a": 1}', b"[1]", b"[]"])
def test_a_list_that_is_none_fails_its_own_request_only(tmp_path, documents):
    write_tokenizer(tmp_path)
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    signature = Signature(DIMS, inputs, (TensorSpec("logits", "float32", ("batch", 1)),))
    ranks = TASKS.get("text-ranking")({"max_length": 8}, signature, tmp_path)

    async def graph(feeds):
        return {"logits": feeds["attention_mask"].sum(axis=1, keepdims=True).astype(np.float32)}

    good = {"query": text("cat")["text"], "documents": text('["a", "a dog and"]')["text"]}
    wrong = {"query": text("cat")["text"], "documents": np.array([[documents]], object)}
    answers = asyncio.run(Desk(ranks, graph).answer([Ask(good), Ask(wrong), Ask(good)]))
    for one in (answers[0], answers[2]):
        assert [found["corpus_id"] for found in json.loads(one[ANSWER][0, 0])] == [1, 0]
    assert isinstance(answers[1], InvalidInputError)
