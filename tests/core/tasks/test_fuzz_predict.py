"""Whatever somebody sends to ``predict``: a right-shaped answer or one of this package's errors, nothing else."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.options import SessionOptions
from tests.bundles import make_bundle
from tests.flavor.text_bundles import LABELS, WIDTH, make_text_bundle

BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

texts = st.one_of(
    st.text(max_size=12),
    st.text(alphabet=st.characters(categories=["Cs", "Ll"]), max_size=4),  # surrogates
    st.just("good film " * 40),
)
scalars = st.one_of(
    texts,
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(pow, st.just(10), st.just(5000)),
    st.floats(),
    st.binary(max_size=4),
    st.sampled_from(
        [pd.NA, pd.NaT, pd.Timestamp(0), decimal.Decimal("NaN"), datetime.date(2026, 1, 1), object(), ..., int, 1j]
    ),
    hnp.scalar_dtypes().flatmap(lambda dtype: hnp.arrays(dtype, ()).map(lambda array: array[()])),
)
arrays = st.one_of(
    hnp.arrays(
        st.one_of(hnp.scalar_dtypes(), hnp.nested_dtypes(max_itemsize=64)),
        hnp.array_shapes(min_dims=0, max_dims=3, max_side=5),
    ),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 9), st.integers(3, 5))),
    st.lists(scalars, max_size=4).map(lambda values: np.array([*values, None], dtype=object)[:-1]),
)
keys = st.one_of(
    st.sampled_from(["text", "texts", "inputs", "text_pair", "x", "id"]),
    st.text(max_size=3),
    st.integers(),
    st.none(),
    st.builds(pow, st.just(10), st.just(5000)),
    st.tuples(st.integers()),
    st.just(pd.NA),
    st.binary(max_size=2),
)
columns = st.one_of(st.lists(texts, max_size=5), st.lists(scalars, max_size=5), arrays)


def _frame(pair: tuple[list[object], list[list[object]]]) -> pd.DataFrame:
    names, rows = pair
    frame = pd.DataFrame([[*row, *[None] * len(names)][: len(names)] for row in rows], dtype=object)
    return frame.set_axis(pd.Index(names, dtype=object)[: frame.shape[1]], axis=1)  # names may be twice there


anything = st.one_of(
    scalars,
    arrays,
    st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.tuples(inner, inner),
            st.dictionaries(keys, inner, max_size=3),
        ),
        max_leaves=12,
    ),
    st.lists(texts, min_size=1, max_size=6),
    st.dictionaries(keys, columns, max_size=3),
    st.lists(scalars, max_size=5).map(lambda values: pd.Series(values, dtype=object)),
    st.lists(st.text(max_size=4), max_size=5).map(lambda values: pd.Series(values, dtype="category")),
    st.lists(scalars, max_size=5).map(lambda values: pd.Index(values, dtype=object)),
    st.tuples(st.lists(keys, max_size=3), st.lists(st.lists(scalars, max_size=3), max_size=4)).map(_frame),
)
params = st.one_of(
    st.none(),
    st.dictionaries(
        st.one_of(st.sampled_from(["top_k", "function_to_apply", "variant", "runtime"]), keys), anything, max_size=2
    ),
    anything,
)


def _open(path):
    return open_model(path, options=SessionOptions(threads=1, intra_op_threads=1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Opened hand-made models by task."""
    names = ("sentence-embedding", "text-classification", "feature-extraction")
    folder = tmp_path_factory.mktemp("fuzz")
    opened = {name: _open(make_text_bundle(folder / name, name)) for name in names}
    opened["tensors"] = _open(make_bundle(folder / "tensors"))
    yield opened
    for model in opened.values():
        model.close()


def _answer(model, inputs, given_params=None):
    """Return the answer, or None where the request was refused with a message that can be sent to a client."""
    try:
        return model.predict(inputs, given_params)
    except InvalidInputError as error:
        str(error).encode("utf-8")  # raises where a server could not send it
        return None


@BOUNDED
@given(inputs=anything)
def test_predict_gives_one_vector_per_text_or_refuses(models, inputs):
    answer = _answer(models["sentence-embedding"], inputs)
    if answer is not None:
        assert (answer.ndim, answer.shape[1], answer.dtype) == (2, WIDTH, np.float32)
        assert len(answer) == len(models["sentence-embedding"].task.items(inputs))


@BOUNDED
@given(inputs=anything, given_params=params)
def test_predict_gives_labels_or_refuses(models, inputs, given_params):
    answer = _answer(models["text-classification"], inputs, given_params)
    for record in answer or ():
        for label in [record] if isinstance(record, dict) else record:
            assert label["label"] in LABELS
            assert isinstance(label["score"], float)


@BOUNDED
@given(inputs=anything)
def test_predict_gives_one_array_per_text_or_refuses(models, inputs):
    for array in _answer(models["feature-extraction"], inputs) or ():
        assert (array.ndim, array.shape[0], array.shape[2]) == (3, 1, WIDTH)


@BOUNDED
@given(inputs=st.one_of(anything, st.dictionaries(st.sampled_from(["x", "x", "y"]), st.one_of(anything, arrays))))
def test_predict_gives_tensors_or_refuses(models, inputs):
    answer = _answer(models["tensors"], inputs)
    if answer is not None:
        assert list(answer) == ["y"]
        assert (answer["y"].ndim, answer["y"].shape[1], answer["y"].dtype) == (2, 3, np.float32)
