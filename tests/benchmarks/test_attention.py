"""Attention as one operator beside its parts: both answer the same, wherever they are measured."""

from __future__ import annotations

from benchmarks import attention


def test_both_ways_are_measured_and_answer_the_same():
    samples = attention.measure((2, 5, 3, 8), threads=1, rounds=3)
    assert {name: len(times) for name, times in samples.items()} == {"apart": 3, "one": 3}
