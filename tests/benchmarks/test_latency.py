"""Every figure of a workload is a ratio of two calls that are measured."""

import numpy as np

from benchmarks import latency
from benchmarks.peers import pool


def test_workloads_name_only_calls_that_are_measured():
    known = {f"{who} {precision}" for who in ("ours", "floor") for precision in ("fp32", "int8")}
    known |= {"mlflow.sentence_transformers", "mlflow.transformers", "mlflow.onnx"}
    for quick in (False, True):
        for workload in latency.workloads(quick=quick):
            assert {name for goal in workload.goals for name in (goal.of, goal.to)} <= known


def test_workloads_shrink_when_quick():
    full, quick = latency.workloads(), latency.workloads(quick=True)
    assert [len(workload.texts) for workload in full] == [1, 256]
    assert all(a.rounds < b.rounds for a, b in zip(quick, full, strict=True))


def test_goal_group_is_the_measurement_that_holds_both_calls():
    goals = {goal.name: goal.group for workload in latency.workloads() for goal in workload.goals}
    assert goals["256 texts, int8: faster than the floor"] == "floor"
    assert goals["8 words, fp32: time over the floor's"] == "floor"
    assert goals["256 texts, fp32: faster than mlflow.onnx"] == "peers"


def test_in_pairs_puts_each_floor_before_ours():
    own, floors = {"ours fp32": 1, "ours int8": 2}, {"floor fp32": 3, "floor int8": 4}
    assert list(latency._in_pairs(own, floors)) == ["floor fp32", "ours fp32", "floor int8", "ours int8"]


def test_fidelity_is_the_worst_cosine_to_sentence_transformers():
    calls = {
        "mlflow.sentence_transformers": lambda texts: np.array([[1.0, 0.0], [0.0, 2.0]]),
        "ours fp32": lambda texts: np.array([[3.0, 0.0], [1.0, 1.0]]),
    }
    found = latency.fidelity(calls, ["a", "b"])
    assert list(found) == ["ours fp32"]
    assert np.isclose(found["ours fp32"], np.sqrt(0.5))


def test_pool_ignores_padding():
    hidden = np.array([[[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]]], np.float32)
    vectors = pool(hidden, np.array([[1, 1, 0]]))
    assert np.allclose(vectors, [[0.6, 0.8]])
