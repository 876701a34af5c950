"""Histograms that an earlier run has found: the same, or none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from mlflow_tdeploy.build import range_cache
from mlflow_tdeploy.build.range_cache import known_histograms
from mlflow_tdeploy.build.ranges import Histogram, histograms
from mlflow_tdeploy.core.errors import BuildError
from tests.build.test_smooth import batches, graph


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of a graph, and how often graphs were run; ranges are kept in a folder of the test."""
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    onnx.save(graph(np.random.default_rng(0)), tmp_path / "g.onnx")
    run = []
    real = range_cache.histograms
    monkeypatch.setattr(range_cache, "histograms", lambda *given: run.append(1) or real(*given))
    return tmp_path, run


def asked(seed=1, count=2):
    return batches(np.random.default_rng(seed), count=count)


def same(one, other):
    assert one.keys() == other.keys()
    for name, found in one.items():
        assert (found.span, found.most) == (other[name].span, other[name].most)
        np.testing.assert_array_equal(found.counts, other[name].counts)


def test_a_second_run_has_the_same_without_running_the_graph(runs):
    folder, run = runs
    first = known_histograms(folder / "g.onnx", ["x", "r"], asked())
    again = known_histograms(folder / "g.onnx", ["x", "r"], asked())
    same(first, again)
    same(again, histograms(folder / "g.onnx", ["x", "r"], asked()))
    assert len(run) == 1
    assert all(isinstance(one, Histogram) for one in again.values())


def test_another_graph_or_data_or_tensor_is_another_matter(runs):
    folder, run = runs
    onnx.save(graph(np.random.default_rng(5)), folder / "other.onnx")
    for path, names, data in (
        ("g", ["x"], asked()), ("g", ["x", "r"], asked()), ("other", ["x"], asked()), ("g", ["x"], asked(seed=2)),
        ("g", ["x"], asked(count=1)),
    ):  # fmt: skip
        known_histograms(folder / f"{path}.onnx", names, data)
    assert len(run) == 5


def test_a_damaged_file_is_found_anew(runs):
    folder, run = runs
    first = known_histograms(folder / "g.onnx", ["x"], asked())
    (kept,) = (folder / "cache" / "ranges").rglob("*.npz")
    sound = kept.read_bytes()
    flipped = [sound[:at] + bytes([sound[at] ^ 255]) + sound[at + 1 :] for at in range(0, len(sound), 40)]
    for content in (b"", sound[:-40], b"no zip", *flipped):
        kept.write_bytes(content)
        same(known_histograms(folder / "g.onnx", ["x"], asked()), first)
    assert len(run) >= 4
    found = len(run)
    known_histograms(folder / "g.onnx", ["x"], asked())
    assert len(run) == found


def test_the_oldest_are_forgotten_and_a_failure_is_not_remembered(runs, monkeypatch):
    folder, run = runs
    monkeypatch.setattr(range_cache, "_MOST", 2)
    for seed in range(4):
        known_histograms(folder / "g.onnx", ["x"], asked(seed=seed))
    assert len(list((folder / "cache" / "ranges").rglob("*.npz"))) == 2
    bad = asked()
    bad[0]["x"][0, 0] = np.nan
    for _ in range(2):
        with pytest.raises(BuildError, match="not finite"):
            known_histograms(folder / "g.onnx", ["x"], bad)
    assert len(run) == 6
