"""Who asks the version before is answered by the next one, or that is told."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.promotion.compatible import Asked, differences

DIMS = (Dim("batch", 1, 8, 64), Dim("time", 2, 16, 128))
X, LENGTHS = TensorSpec("x", "float32", ("batch", "time", 4)), TensorSpec("lengths", "int64", ("batch",))
Y, HIDDEN = TensorSpec("y", "float32", ("batch", 3)), TensorSpec("hidden", "float32", ("batch", "time", 8))
SIGNATURE = Signature(DIMS, (X, LENGTHS), (Y, HIDDEN))


def asked(signature=SIGNATURE, task="tensors", **config):
    return Asked(task, config, signature)


def changed(**parts):
    return asked(dataclasses.replace(SIGNATURE, **parts))


def told(before, after):
    return {one.what: one.breaking for one in differences(before, after)}


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (changed(inputs=(LENGTHS, X), outputs=(HIDDEN, Y)), {}),
        (changed(dims=(Dim("batch", 1, 1, 64), Dim("time", 2, 99, 128))), {}),
        (changed(inputs=(X,)), {"input 'lengths' is gone": True}),
        (changed(inputs=(X, LENGTHS, TensorSpec("z", "bool", ("batch",)))), {"input 'z' is new": True}),
        (changed(outputs=(Y,)), {"output 'hidden' is gone": True}),
        (changed(outputs=(Y, HIDDEN, TensorSpec("z", "bool", ("batch",)))), {"output 'z' is new": False}),
        (
            changed(dims=(DIMS[0], Dim("time", 1, 16, 512))),
            {"axis 1 of input 'x' is 1..512, it was 2..128": False},
        ),
        (changed(dims=(DIMS[0], Dim("time", 2, 16, 64))), {"axis 1 of input 'x' is 2..64, it was 2..128": True}),
        (changed(dims=(DIMS[0], Dim("time", 4, 16, 128))), {"axis 1 of input 'x' is 4..128, it was 2..128": True}),
        (
            changed(inputs=(dataclasses.replace(X, shape=("batch", "time", 5)), LENGTHS)),
            {"axis 2 of input 'x' is 5, it was 4": True},
        ),
        (
            changed(inputs=(dataclasses.replace(X, dtype="float16"), LENGTHS)),
            {"input 'x' is float16, it was float32": True},
        ),
        (
            changed(outputs=(dataclasses.replace(Y, shape=("batch", 4)), HIDDEN)),
            {"axis 1 of output 'y' is 4, it was 3": True},
        ),
        (
            changed(outputs=(dataclasses.replace(Y, shape=("batch",)), HIDDEN)),
            {"output 'y' has 1 axes, it had 2": True},
        ),
    ],
)  # fmt: skip
def test_what_a_version_takes_and_answers_otherwise_is_told(after, found):
    assert told(asked(), after) == found


def test_sizes_that_have_to_be_equal_now_are_told():
    dims = (Dim("a", 1, 2, 8), Dim("b", 1, 2, 8))
    free = Signature(dims, (TensorSpec("x", "float32", ("a",)), TensorSpec("z", "float32", ("b",))), (Y,))
    tied = dataclasses.replace(free, inputs=(free.inputs[0], dataclasses.replace(free.inputs[1], shape=("a",))))
    assert told(asked(free), asked(tied)) == {
        "axis 0 of input 'x' and axis 0 of input 'z' have to be of one size": True
    }
    assert told(asked(tied), asked(free)) == {}


def test_of_texts_the_answers_count_and_not_what_the_graph_takes():
    ids = TensorSpec("input_ids", "int64", ("batch", "time"))
    text = Signature(DIMS, (ids,), (TensorSpec("sentence_embedding", "float32", ("batch", 384)),))
    more = dataclasses.replace(text, inputs=(ids, TensorSpec("token_type_ids", "int64", ("batch", "time"))))
    wide = dataclasses.replace(text, outputs=(TensorSpec("sentence_embedding", "float32", ("batch", 768)),))
    kind = "sentence-embedding"
    assert told(asked(text, kind), asked(more, kind)) == {"input 'token_type_ids' is new": False}
    assert told(asked(text, kind), asked(wide, kind)) == {
        "axis 1 of output 'sentence_embedding' is 768, it was 384": True
    }
    assert told(asked(text, kind), asked(text, "feature-extraction")) == {
        "the task is feature-extraction, it was sentence-embedding": True
    }


def test_labels_that_are_gone_break_and_new_ones_do_not():
    kind, before = "text-classification", {"labels": ["good", "bad"]}
    assert told(asked(SIGNATURE, kind, **before), asked(SIGNATURE, kind, labels=["bad", "good"])) == {}
    found = told(asked(SIGNATURE, kind, **before), asked(SIGNATURE, kind, labels=["good", "poor"]))
    assert found == {"the label bad is gone": True, "the label poor is new": False}


@st.composite
def signatures(draw):
    dims = []
    for name in ("batch", "time"):
        least, most = sorted(draw(st.tuples(st.integers(1, 9), st.integers(1, 9))))
        dims.append(Dim(name, least, draw(st.integers(least, most)), most))
    sizes = st.one_of(st.sampled_from(["batch", "time"]), st.integers(1, 4))
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))
    specs = tuple(
        TensorSpec(name, draw(st.sampled_from(["float32", "int64"])), tuple(draw(st.lists(sizes, max_size=3))))
        for name in names
    )
    return Signature(tuple(dims), specs, specs)


def sizes_taken(signature):
    """All shapes of the first input that a signature takes, with what the other inputs have then."""
    batch, time = signature.dims
    for b in range(batch.min, batch.max + 1):
        for t in range(time.min, time.max + 1):
            size = {"batch": b, "time": t}
            yield {
                spec.name: (spec.dtype, tuple(one if isinstance(one, int) else size[one] for one in spec.shape))
                for spec in signature.inputs
            }


@settings(deadline=None)
@given(signatures(), signatures())
def test_what_does_not_break_takes_every_request_of_before(before, after):
    assert differences(asked(before), asked(before)) == ()
    found = differences(asked(before), asked(after))
    if not any(one.breaking for one in found):
        after_takes = list(sizes_taken(after))
        assert all(request in after_takes for request in sizes_taken(before))
