import time

import pytest

from mlflow_tdeploy.core.measure import Timing, interleave, ratio


def test_timing_of_returns_milliseconds():
    timing = Timing.of([0.001, 0.002, 0.003])
    assert (timing.count, timing.min_ms, timing.max_ms) == (3, 1.0, 3.0)
    assert timing.p50_ms == pytest.approx(2.0)
    assert timing.mean_ms == pytest.approx(2.0)


def test_interleave_calls_in_turn_after_the_warmup():
    order: list[str] = []
    samples = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}


def test_interleave_does_three_rounds_when_the_time_is_up():
    assert len(interleave({"a": lambda: None}, rounds=50, seconds=0.0)["a"]) == 3


def test_a_lead_of_uncounted_calls_comes_before_each_timed_one() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    samples = interleave(calls, rounds=2, warmup=0, lead=2)
    assert "".join(order) == "aaabbbaaabbb"
    assert len(samples["a"]) == len(samples["b"]) == 2


def test_warming_up_is_bounded_too():
    calls = []
    interleave({"a": lambda: calls.append(1) or time.sleep(0.02)}, rounds=3, warmup=50, seconds=0.05)
    assert len(calls) < 12


def test_ratio_is_the_median_of_pairs():
    assert ratio({"a": [2, 20, 6], "b": [1, 1, 2]}, "a", "b") == 3
