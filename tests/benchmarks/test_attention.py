"""Attention as one operator beside its parts: both answer the same, wherever they are measured."""

from __future__ import annotations

import pytest

from benchmarks import attention


@pytest.mark.parametrize("own", [False, True])
def test_both_ways_are_measured(own):
    samples = attention.measure((2, 5, 3, 8), threads=1, own=own, rounds=3)
    assert {name: len(times) for name, times in samples.items()} == {"apart": 3, "one": 3}
