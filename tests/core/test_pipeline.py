"""The pipeline over a toy task whose graph upper-bounds nothing: what matters is order, batches and threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.pipeline import Pipeline
from mlflow_tdeploy.core.tasks import TASKS, Encoded, Param, Task
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from tests.core.text_assets import WORDS, write_tokenizer

SIGNATURE = Signature(
    (Dim("batch", 1, 2, 4), Dim("sequence", 1, 8, 32)),
    (TensorSpec("x", "int64", ("batch", "sequence")),),
    (TensorSpec("y", "int64", ("batch",)),),
)


class Lengths(Encoded):
    def __init__(self, items):
        self.items = items
        self.lengths = [len(item) for item in items]

    def collate(self, indices):
        width = max(self.lengths[i] for i in indices)
        rows = [[*map(ord, self.items[i]), *[0] * (width - self.lengths[i])] for i in indices]
        return {"x": np.array(rows, np.int64).reshape(len(rows), width)}


class SumOfCharacters(Task):
    name = "sum"
    input_kind = "text"
    params = (Param("plus", "integer", 0, "Added to each sum."),)
    default_budget = Budget(())

    def items(self, inputs):
        return list(inputs)

    def encode(self, items, params=None):
        return Lengths(items)

    def decode(self, outputs, feeds, count, params):
        return [int(value) + params["plus"] for value in outputs["y"][:count]]

    def finish(self, answers, params):
        return answers

    def answer_form(self):
        raise NotImplementedError

    def comparison(self):
        raise NotImplementedError

    def example_feeds(self, at, *, ragged, seed=0, sizes=None):
        raise NotImplementedError


def make(executor=None, seen=None, **options):
    def infer(feeds):
        if seen is not None:
            seen.append(feeds["x"].shape)
        return {"y": feeds["x"].sum(axis=1)}

    task = SumOfCharacters({}, SIGNATURE, None)
    return Pipeline(task, infer, executor=executor, workers=2, **options)


@given(st.lists(st.text("abcxyz", min_size=1, max_size=32), min_size=1, max_size=40), st.booleans())
def test_pipeline_answers_in_the_callers_order(texts, threads):
    expected = [sum(map(ord, text)) for text in texts]
    if threads:
        with ThreadPoolExecutor(2) as executor:
            assert make(executor, token_budget=64)(texts) == expected
    else:
        assert make(token_budget=64)(texts) == expected


def test_pipeline_splits_when_the_batch_is_larger_than_the_signature_allows():
    seen = []
    make(seen=seen)(["ab"] * 11)
    assert [rows for rows, _ in seen] == [4, 4, 3]


def test_pipeline_keeps_batches_under_the_token_budget():
    seen = []
    make(seen=seen, token_budget=16)(["a" * 8, "a" * 2, "a" * 8, "a" * 2, "a" * 2])
    assert sorted(seen) == [(2, 8), (3, 2)]


def test_pipeline_runs_a_single_item_in_the_calling_thread():
    class Refusing:
        def map(self, *_):
            raise AssertionError("a lone request must not wait for a worker")

    assert make(Refusing())(["abc"]) == [sum(map(ord, "abc"))]


def test_pipeline_passes_checked_params():
    assert make()(["a"], {"plus": 2}) == [ord("a") + 2]
    with pytest.raises(InvalidInputError, match="Unknown parameter 'minus'"):
        make()(["a"], {"minus": 2})
    with pytest.raises(InvalidInputError, match="'plus' must be of type integer"):
        make()(["a"], {"plus": "2"})


def test_pipeline_raises_a_workers_error_in_the_caller():
    def infer(feeds):
        raise InvalidInputError("broken batch")

    with ThreadPoolExecutor(2) as executor:
        pipeline = Pipeline(SumOfCharacters({}, SIGNATURE, None), infer, executor=executor, workers=2)
        with pytest.raises(InvalidInputError, match="broken batch"):
            pipeline(["a", "b", "c", "d", "e"])


@pytest.mark.parametrize("count", [1, 4])
def test_pipeline_runs_a_request_of_one_batch_the_single_way(count):
    ways = []

    def way(name):
        def infer(feeds):
            ways.append(name)
            return {"y": feeds["x"].sum(axis=1)}

        return infer

    pipeline = Pipeline(SumOfCharacters({}, SIGNATURE, None), way("batch"), single=way("single"))
    assert pipeline(["ab"] * count) == [ord("a") + ord("b")] * count
    assert ways == ["single"]
    ways.clear()
    pipeline(["ab"] * 5)  # two batches
    assert ways == ["batch", "batch"]


def test_pipeline_fills_every_row_when_the_graph_has_a_fixed_batch(tmp_path):
    write_tokenizer(tmp_path)
    signature = Signature(
        (Dim("sequence", 1, 4, 8),),
        tuple(TensorSpec(name, "int64", (8, "sequence")) for name in ("input_ids", "attention_mask")),
        (TensorSpec("sentence_embedding", "float32", (8, 1)),),
    )
    task = TASKS.get("sentence-embedding")({"max_length": 8}, signature, tmp_path)
    seen = []

    def infer(feeds):
        seen.append(feeds["input_ids"].shape)
        return {"sentence_embedding": feeds["input_ids"].sum(axis=1, keepdims=True).astype(np.float32)}

    words = ["a", "good", "bad", "film"] * 5
    answers = Pipeline(task, infer)(words)
    assert seen == [(8, 1)] * 3
    assert answers[:, 0].tolist() == [WORDS.index(word) for word in words]
