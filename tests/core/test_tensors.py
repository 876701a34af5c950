import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError, shown
from mlflow_tdeploy.core.tensors import DTYPES, Dim, Signature, TensorSpec, numpy_dtype

SIGNATURE = Signature(
    dims=(Dim("batch", 1, 8, 64), Dim("sequence", 2, 128, 512)),
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "sequence")),
        TensorSpec("scale", "float32", (3,)),
    ),
    outputs=(TensorSpec("embedding", "float32", ("batch", 384)), TensorSpec("found", "int64", ("count",))),
)


def feeds(batch=4, sequence=16, **changes):
    ids = np.zeros((batch, sequence), np.int64)
    return {"input_ids": ids, "attention_mask": ids, "scale": np.zeros(3, np.float32), **changes}


@given(st.integers(1, 64), st.integers(2, 512))
def test_bind_returns_every_size_when_inputs_are_in_range(batch, sequence):
    assert SIGNATURE.bind(feeds(batch, sequence)) == {"batch": batch, "sequence": sequence}


@given(st.integers(1, 80), st.integers(0, 600))
def test_bind_accepts_exactly_the_declared_ranges(batch, sequence):
    if batch <= 64 and 2 <= sequence <= 512:
        SIGNATURE.bind(feeds(batch, sequence))
    else:
        with pytest.raises(InvalidInputError, match=r"outside its range (1\.\.64|2\.\.512)"):
            SIGNATURE.bind(feeds(batch, sequence))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (feeds(sequence=513), r"'input_ids', dimension 'sequence' \(axis 1\) is 513, outside its range 2\.\.512"),
        ({"attention_mask": np.zeros((4, 17), np.int64)}, r"'sequence' is 16 in one input and 17 in 'attention_mask'"),
        ({"input_ids": np.zeros((4, 16), np.int32)}, r"'input_ids' must be int64, got int32.*astype\('int64'\)"),
        ({"input_ids": np.zeros((4, 16, 1), np.int64)}, r"must have 2 dimensions \[batch, sequence\], got shape"),
        ({"input_ids": np.int64(3)}, r"'input_ids' must be a numpy array .* got int64"),
        ({"input_ids": [[1, 2]]}, r"'input_ids' must be a numpy array .* got list"),
        ({"input_ids": None}, r"'input_ids' must be a numpy array .* got NoneType"),
        ({"scale": np.zeros(4, np.float32)}, r"'scale' axis 0 must be 3, got 4"),
        ({"token_type_ids": np.zeros(1)}, r"Unknown input tensor 'token_type_ids'.*takes: input_ids: int64"),
        ({3: np.zeros(1)}, "Unknown input tensor 3"),
    ],
)
def test_bind_names_tensor_dimension_and_value_when_inputs_are_wrong(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        SIGNATURE.bind({**feeds(), **changes})


def test_bind_names_the_tensor_when_one_is_missing():
    with pytest.raises(InvalidInputError, match=r"'attention_mask' is missing.*This model takes"):
        SIGNATURE.bind({name: array for name, array in feeds().items() if name != "attention_mask"})


@pytest.mark.parametrize(("at", "shape"), [("min", (1, 2)), ("opt", (8, 128)), ("max", (64, 512))])
def test_shape_of_is_concrete(at, shape):
    assert SIGNATURE.shape_of(SIGNATURE.inputs[0], at) == shape
    assert SIGNATURE.shape_of(SIGNATURE.inputs[2], at) == (3,)


def test_dim_lists_what_is_declared_when_name_is_unknown():
    assert SIGNATURE.dim("batch").max == 64
    assert SIGNATURE.has_dim("batch")
    assert not SIGNATURE.has_dim("width")
    with pytest.raises(InvalidInputError, match="No dimension 'width'. Declared: batch, sequence"):
        SIGNATURE.dim("width")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, 8, 64), (1, 8, 64)),
        ([1, 8, 64], (1, 8, 64)),
        ((2, 64), (2, 2, 64)),
        (5, (5, 5, 5)),
        (Dim("other", 1, 2, 3), (1, 2, 3)),
        ((np.int64(1), 2, 3), (1, 2, 3)),
    ],
)
def test_dim_of_reads_what_a_user_writes(value, expected):
    assert Dim.of("batch", value) == Dim("batch", *expected)


@pytest.mark.parametrize(
    "value",
    [
        "1,2,3",
        None,
        (),
        (1,),
        (1, 2, 3, 4),
        (1.0, 2, 3),
        (True, 2, 3),
        True,
        {1, 2, 3},
        (0, 1, 2),
        (3, 2, 1),
        (1, 9, 8),
        0,
        -1,
    ],
)
def test_dim_of_refuses_what_is_no_range(value):
    with pytest.raises(InvalidInputError, match=r"[Dd]imension 'batch'"):
        Dim.of("batch", value)


@given(st.integers(-2, 6), st.integers(-2, 6), st.integers(-2, 6))
def test_dim_holds_ordered_sizes_of_at_least_one_only(low, opt, high):
    if 1 <= low <= opt <= high:
        dim = Dim("x", low, opt, high)
        assert (dim.at("min"), dim.at("opt"), dim.at("max")) == (low, opt, high)
    else:
        with pytest.raises(InvalidInputError, match=f"min={low}, opt={opt}, max={high}"):
            Dim("x", low, opt, high)


@pytest.mark.parametrize("name", ["", "a b", "1a", "a-b"])
def test_dim_refuses_when_name_is_no_identifier(name):
    with pytest.raises(InvalidInputError, match="identifier"):
        Dim(name, 1, 1, 1)


X, Y = TensorSpec("x", "float32", ("batch",)), TensorSpec("y", "float32", ("batch",))
BATCH = Dim("batch", 1, 1, 1)


@pytest.mark.parametrize(
    ("dims", "inputs", "outputs", "message"),
    [
        ((BATCH,), (), (Y,), "at least one input"),
        ((BATCH,), (X,), (), "at least one input and one output"),
        ((BATCH, BATCH), (X,), (Y,), "dimension 'batch' is declared twice"),
        ((BATCH,), (X, X), (Y,), "input 'x' is declared twice"),
        ((BATCH,), (X,), (Y, Y), "output 'y' is declared twice"),
        ((), (X,), (Y,), "Input 'x' uses dimension 'batch', which has no declared range"),
    ],
)
def test_signature_refuses_when_it_contradicts_itself(dims, inputs, outputs, message):
    with pytest.raises(InvalidInputError, match=message):
        Signature(dims, inputs, outputs)


@pytest.mark.parametrize(("dtype", "shape"), [("float8", ()), ("float32", (-1,))])
def test_tensor_spec_refuses_when_dtype_or_size_is_none(dtype, shape):
    with pytest.raises(InvalidInputError, match="Tensor 'x'"):
        TensorSpec("x", dtype, shape)


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_dtype_has_the_name_it_was_asked_for(name):
    assert str(numpy_dtype(name)) == name


def test_numpy_dtype_lists_what_exists_when_name_is_unknown():
    with pytest.raises(InvalidInputError, match=r"'object'. Available: bool, int8"):
        numpy_dtype("object")


def test_numpy_dtype_names_the_install_line_when_ml_dtypes_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(MissingDependencyError, match="bfloat16.*pip install ml_dtypes"):
        numpy_dtype("bfloat16")


@pytest.mark.parametrize("value", [10**5000, "x" * 500, {"a": "\ud800"}, "\ud800"], ids=range(4))
def test_shown_is_short_and_printable_whatever_the_value(value):
    text = shown(value)
    assert len(text) <= 61
    assert text.encode("utf-8")
