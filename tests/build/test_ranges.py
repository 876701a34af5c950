"""Calibrators: ranges from histograms that add up without loss."""

from __future__ import annotations

import hypothesis
import numpy as np
import onnx
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mlflow_tdeploy.build.ranges import BINS, CALIBRATORS, LEVELS, Histogram, histograms, ranges, ranges_known
from mlflow_tdeploy.core.errors import BuildError
from tests.build.test_smooth import batches, graph

FINITE = st.floats(-1e6, 1e6, width=32)


@hypothesis.given(st.lists(arrays.arrays(np.float32, st.integers(1, 40), elements=FINITE), min_size=1, max_size=4))
def test_histograms_of_parts_are_that_of_the_whole(parts):
    added = sum((Histogram.of(part) for part in parts[1:]), Histogram.of(parts[0]))
    whole = Histogram.of(np.concatenate(parts))
    assert (added.span, added.most) == (whole.span, whole.most)
    np.testing.assert_array_equal(added.counts, whole.counts)


@hypothesis.given(arrays.arrays(np.float32, st.integers(1, 200), elements=FINITE), st.sampled_from(sorted(CALIBRATORS)))
def test_every_range_lies_within_what_was_met(array, method):
    found = Histogram.of(array)
    hypothesis.assume(found.most > 0)
    assert 0 < CALIBRATORS[method](found) <= found.most


def off(array, limit):
    step = limit / LEVELS
    return float(np.square(np.clip(np.rint(array / step), -LEVELS, LEVELS) * step - array).mean())


def test_one_number_that_is_a_thousand_times_as_large_is_clipped_by_all_but_max():
    array = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    array[7] = 1000.0
    found = {method: CALIBRATORS[method](Histogram.of(array)) for method in CALIBRATORS}
    assert found["max"] == 1000.0
    assert 3 < found["percentile"] < 6
    assert 2 < found["entropy"] < 40
    array[7] = 30.0  # one that costs more than it is worth
    found = {method: CALIBRATORS[method](Histogram.of(array)) for method in CALIBRATORS}
    assert found["mse"] < 20
    errors = {method: off(array, limit) for method, limit in found.items()}
    assert errors["mse"] <= min(errors.values()) * 1.05


def test_percentile_is_what_so_many_are_not_larger_than():
    array = np.linspace(-1, 1, 100_001, dtype=np.float32)
    assert CALIBRATORS["percentile"](Histogram.of(array)) == pytest.approx(0.9999, abs=1 / BINS)


def test_what_is_not_finite_has_no_range_and_zeros_have_none(tmp_path):
    random = np.random.default_rng(0)
    onnx.save(graph(random), tmp_path / "g.onnx")
    asked = batches(random, count=2)
    seen = histograms(tmp_path / "g.onnx", ["x", "r"], asked)
    assert ranges(seen, "max")["x"] == pytest.approx(max(np.abs(one["x"]).max() for one in asked))
    zeros = histograms(tmp_path / "g.onnx", ["x"], [{"x": np.zeros((2, 48), np.float32)}])
    assert ranges(zeros, "mse") == {}
    assert not ranges_known(zeros, "x")
    asked[1]["x"][0, 0] = np.inf
    with pytest.raises(BuildError, match="not finite .* before some product"):
        histograms(tmp_path / "g.onnx", ["x"], asked)
