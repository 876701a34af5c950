import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlflow_tdeploy.core.budget import VECTOR_BUDGET
from mlflow_tdeploy.core.compare import Rows, same_outputs


def measure(reference, got):
    rows = Rows()
    rows.add(np.asarray(reference, np.float32), np.asarray(got, np.float32))
    return rows.metrics()


def test_rows_metrics_hold_the_worst_row_when_rows_differ():
    metrics = measure([[1, 0], [0, 1], [1, 0]], [[1, 0], [0, 1], [0, 2]])
    assert metrics["worst_cosine"] == pytest.approx(0.0)
    assert metrics["mean_cosine"] == pytest.approx(2 / 3)
    assert metrics["max_difference"] == pytest.approx(2.0)
    assert metrics["rows"] == 3


def test_rows_metrics_accumulate_over_batches():
    rows = Rows()
    rows.add(np.eye(2), np.eye(2))
    rows.add(np.eye(2), np.eye(2)[::-1])
    assert rows.metrics()["worst_cosine"] == 0.0
    assert rows.metrics()["rows"] == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_metrics_count_values_that_became_non_finite(bad):
    metrics = measure([[1.0, 2.0]], [[1.0, bad]])
    assert metrics["non_finite"] == 1
    assert metrics["worst_cosine"] == -1.0
    assert all(np.isfinite(value) for value in metrics.values())


def test_rows_metrics_ignore_positions_where_the_reference_is_infinite():
    metrics = measure([[1.0, -np.inf]], [[1.0, -np.inf]])
    assert metrics["non_finite"] == 0
    assert metrics["worst_cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize(("got", "cosine"), [([[0.0, 0.0]], 1.0), ([[1.0, 0.0]], 0.0)])
def test_rows_cosine_is_defined_when_the_reference_is_zero(got, cosine):
    assert measure([[0.0, 0.0]], got)["worst_cosine"] == cosine


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_rows_of_equal_arrays_have_cosine_one_and_no_difference(array):
    metrics = measure(array, array)
    assert metrics["worst_cosine"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["max_difference"] == 0.0


def test_rows_add_refuses_when_shapes_differ():
    with pytest.raises(ValueError, match="shapes"):
        Rows().add(np.zeros((2, 3)), np.zeros((2, 4)))


def test_same_outputs_names_what_is_missing_or_of_another_shape():
    reference = {"y": np.zeros((2, 3))}
    assert same_outputs(reference, {"y": np.ones((2, 3))}) is None
    assert "'y' is missing" in same_outputs(reference, {})
    assert "(2, 4)" in same_outputs(reference, {"y": np.ones((2, 4))})


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (3.0, 2.0), (0.5, 0.5)])
def test_rows_see_a_scale_that_the_cosine_does_not(factor, expected):
    rows = Rows()
    reference = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    rows.add(reference, factor * reference)
    metrics = rows.metrics()
    assert metrics["worst_cosine"] == pytest.approx(1.0)
    assert metrics["max_norm_difference"] >= expected * 0.99
    assert bool(VECTOR_BUDGET.violations(metrics)) is (expected > 0.1)


def test_rows_hold_a_short_row_against_the_typical_one():
    """A row of almost nothing may be a third longer: the error is as small as any other row's."""
    rows = Rows()
    rows.add(np.array([[100.0, 0.0], [0.3, 0.0]], np.float32), np.array([[100.0, 0.0], [0.4, 0.0]], np.float32))
    assert rows.metrics()["max_norm_difference"] < 0.01
