"""Searches for the parts that bear eight bits least: on made-up parts, of which it is known."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.build.sensitivity import by_sensitivity, fewest


def together(weights):
    """Return how far off answers are where some parts are changed, each by its own amount."""
    return lambda parts: math.sqrt(sum(weights[part] ** 2 for part in parts))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_with_enough_trials_the_order_is_that_of_the_parts(amounts):
    weights = {f"p{index}": amount for index, amount in enumerate(amounts)}
    order = by_sensitivity(list(weights), together(weights), trials=2 * len(weights))
    assert [weights[part] for part in order] == sorted(amounts, reverse=True)


@given(st.integers(1, 200), st.data())
def test_one_part_among_many_is_found_in_a_few_trials(count, data):
    planted = data.draw(st.integers(0, count - 1))
    weights = {f"p{index}": 1.0 if index == planted else 1e-3 for index in range(count)}
    calls = []

    def distance(parts):
        calls.append(parts)
        return together(weights)(parts)

    trials = 2 * math.ceil(math.log2(count)) if count > 1 else 0
    order = by_sensitivity(list(weights), distance, trials=trials)
    assert order[0] == f"p{planted}"
    assert sorted(order) == sorted(weights)
    assert len(calls) <= trials


def test_without_trials_the_order_is_that_of_the_graph():
    assert by_sensitivity(["a", "b", "c"], lambda parts: 1.0, trials=0) == ["a", "b", "c"]
    assert by_sensitivity([], lambda parts: 1.0, trials=9) == []


def test_what_gives_no_numbers_comes_first():
    weights = {"a": 1.0, "b": math.nan, "c": 2.0, "d": 0.0}
    distance = together(weights)
    assert by_sensitivity(list(weights), distance, trials=8) == ["b", "c", "a", "d"]


@given(st.integers(0, 60), st.integers(0, 70))
def test_the_fewest_are_found(count, needed):
    calls = []

    def good(number):
        calls.append(number)
        return number >= needed

    assert fewest(count, good) == (needed if needed <= count else None)
    assert len(calls) == len(set(calls)), "one was tried twice"
    assert len(calls) <= 2 + 2 * math.ceil(math.log2(count + 1))


def test_without_time_the_first_number_that_is_good_is_taken():
    calls = []
    assert fewest(36, lambda number: calls.append(number) or number >= 5, lambda: True) == 8
    assert calls == [0, 1, 2, 4, 8]


def test_all_but_one_is_tried_before_all():
    calls = []
    assert fewest(8, lambda number: calls.append(number) or number >= 7, lambda: True) == 7
    assert calls == [0, 1, 2, 4, 7]


def test_what_is_not_told_apart_in_time_stays_in_order():
    asked = []

    def distance(parts):
        asked.append(parts)
        return float(len(parts))

    assert by_sensitivity(list("abcd"), distance, trials=100, enough=lambda: len(asked) >= 2) == list("abcd")
    assert len(asked) == 2
