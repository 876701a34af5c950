"""A version beside another one: who is asked, who answers, what is counted, and what is alike."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mlflow_tdeploy.core.rollout import Beside, Rollout, alike
from mlflow_tdeploy.core.wire import ANSWER

OLD, NEW = {"y": np.ones((1, 2), np.float32)}, {"y": np.full((1, 2), 2, np.float32)}


def beside(kind, ask, share=1.0, seconds=60.0):
    """Return a rollout and what it has told."""
    told = []
    rollout = Rollout(8, "m.v8.check", "m.tally.check", kind, share, seconds)
    return Beside(rollout, ask, lambda model, seen: told.append((model, json.loads(seen)))), told


def answered(one, requests, own=OLD, takes=0.0):
    async def answer():
        await asyncio.sleep(takes)
        return [own for _ in requests]

    async def all_of_it():
        return await one.answers(requests, answer())

    found = asyncio.run(all_of_it())
    finish(one)  # what comes after the answers, too
    return found


def finish(one):
    one._asking.shutdown(wait=True)
    one._telling.shutdown(wait=True)


def test_a_canary_answers_and_both_are_asked():
    asked = []
    one, told = beside("canary", lambda model, request: asked.append((model, request)) or NEW)
    assert answered(one, ["a", "b"]) == [NEW, NEW]
    assert sorted(asked) == [("m.v8.check", "a"), ("m.v8.check", "b")]
    assert [(model, seen["failed"], seen["alike"]) for model, seen in told] == [("m.tally.check", "", True)] * 2


def test_a_shadow_is_asked_and_does_not_answer():
    asked = []
    one, told = beside("shadow", lambda model, request: asked.append(request) or {"y": -OLD["y"]})
    assert answered(one, ["a", "b"]) == [OLD, OLD]
    assert sorted(asked) == ["a", "b"]
    assert [seen["alike"] for _, seen in told] == [False, False]


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_one_that_fails_is_answered_for_and_counted(kind):
    def ask(model, request):
        raise RuntimeError(f"cannot {request}")

    one, told = beside(kind, ask)
    assert answered(one, ["a"]) == [OLD]
    assert told[0][1]["failed"] == "cannot a"


def test_one_that_is_late_is_not_waited_for():
    one, told = beside("canary", lambda model, request: time.sleep(2.0) or NEW)
    started = time.monotonic()
    found = asyncio.run(one.answers(["a"], _now([OLD])))
    assert time.monotonic() - started < 1.9
    assert found == [OLD]
    finish(one)
    assert "no answer within 1.0 s" in told[0][1]["failed"]


def test_late_ones_are_waited_for_together_and_nobody_else_until_they_are_there():
    one, told = beside("canary", lambda model, request: time.sleep(2.5) or NEW)
    started = time.monotonic()
    assert asyncio.run(one.answers(list("abcdefgh"), _now([OLD] * 8))) == [OLD] * 8
    assert time.monotonic() - started < 1.9
    started = time.monotonic()
    assert asyncio.run(one.answers(["i"], _now([OLD]))) == [OLD]
    assert time.monotonic() - started < 0.5
    time.sleep(0.5)
    assert len(told) == 8  # it is told while all are waited for
    time.sleep(1.5)
    assert not one._overdue
    assert asyncio.run(one.answers(["j"], _now([OLD]))) == [OLD]
    assert len(told) == 8  # three in a row were late: nobody is chosen any more
    assert [seen["stopped"] for _, seen in told] == [False] * 2 + [True] * 6  # and that is told
    one.close()


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_one_that_hangs_is_told_once_though_its_answer_never_comes(kind):
    over = threading.Event()
    one, told = beside(kind, lambda model, request: over.wait() and NEW)
    try:
        assert asyncio.run(one.answers(["a"], _now([OLD]))) == [OLD]
        time.sleep(3.2)
        for _ in range(3):
            assert asyncio.run(one.answers(["b"], _now([OLD]))) == [OLD]
        time.sleep(0.2)
        assert [seen["failed"][:17] for _, seen in told if seen["stopped"]] == ["no answer within "]
    finally:
        over.set()
        one.close()


def test_a_long_request_beside_short_ones_is_given_its_own_time():
    one, told = beside("shadow", lambda model, request: time.sleep(4.0 if request == "long" else 0.0) or NEW)

    async def own(takes):
        await asyncio.sleep(takes)
        return [OLD]

    asyncio.run(one.answers(["long"], own(1.0)))  # whoever takes a second has five for the copy
    for _ in range(35):
        asyncio.run(one.answers(["short"], _now([OLD])))
        time.sleep(0.1)
    finish(one)
    assert not any(seen["stopped"] for _, seen in told)
    assert max(seen["after"] for _, seen in told) >= 4.0


def test_the_last_late_one_is_told_though_nobody_could_answer_it():
    one, told = beside("shadow", lambda model, request: time.sleep(1.2) or NEW)
    for own in (OLD, OLD, ValueError("no such text")):
        asyncio.run(one.answers(["a"], _now([own])))
        time.sleep(1.5)
    finish(one)
    assert [seen["stopped"] for _, seen in told] == [False, False, True]


def test_a_copy_that_is_late_has_failed():
    one, told = beside("shadow", lambda model, request: time.sleep(1.2) or NEW)
    assert answered(one, ["a"]) == [OLD]
    assert "no answer within 1.0 s" in told[0][1]["failed"]


def test_a_request_that_nobody_can_answer_says_nothing():
    wrong = ValueError("no such text")
    one, told = beside("canary", lambda model, request: NEW)
    assert answered(one, ["a"], own=wrong) == [wrong]
    assert told == []


def test_nobody_is_chosen_when_its_time_is_over():
    one, told = beside("canary", lambda model, request: NEW, seconds=-1.0)
    assert answered(one, ["a"]) == [OLD]
    assert told == []


def test_the_share_is_kept():
    one, told = beside("canary", lambda model, request: NEW, share=0.25)
    found = []
    for _ in range(40):
        found += asyncio.run(one.answers(list(range(50)), _now([OLD] * 50)))
        time.sleep(0.01)
    finish(one)
    share = sum(answer is NEW for answer in found) / len(found)
    assert 0.15 < share <= 0.35
    assert len(told) == sum(answer is NEW for answer in found)


def test_copies_do_not_pile_up():
    one, told = beside("shadow", lambda model, request: time.sleep(0.05) or NEW)
    answered(one, list(range(500)))
    assert len(told) == 64


async def _now(value):
    return value


def said(value):
    return {ANSWER: np.array([json.dumps(value).encode()], dtype=object)}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"y": np.array([[1.0, 0.0]])}, {"y": np.array([[1.0, 0.1]])}, True),
        ({"y": np.array([[1.0, 0.0]])}, {"y": np.array([[0.9, 0.5]])}, False),
        ({"y": np.array([[1.0, 0.0], [0.0, 1.0]])}, {"y": np.array([[1.0, 0.0], [1.0, 0.0]])}, False),
        ({"y": np.array([[1.0, 0.0]])}, {"y": np.array([[1.0, 0.0, 0.0]])}, False),
        ({"y": np.array([[0.0, 0.0]])}, {"y": np.array([[0.0, 0.0]])}, True),
        ({"y": np.array([[0.0, 0.0]])}, {"y": np.array([[3.0, 4.0]])}, False),
        ({"y": np.array([[np.nan, 1.0]])}, {"y": np.array([[np.nan, 1.0]])}, True),
        ({"y": np.array([[np.nan, 1.0]])}, {"y": np.array([[0.5, 1.0]])}, False),
        ({"y": np.array([1.0, 2.0])}, {"y": np.array([1.04, 2.0])}, True),
        ({"y": np.array([1.0, 2.0])}, {"y": np.array([1.2, 2.0])}, False),
        ({"y": np.array([[1.0]])}, {"y": np.array([[-1.0]])}, False),
        ({"y": np.array([3])}, {"y": np.array([4])}, False),
        ({"y": np.array([3])}, {"z": np.array([3])}, False),
        ({"label": np.array([b"cat"], object), "score": np.array([0.9])},
         {"label": np.array([b"cat"], object), "score": np.array([0.6])}, True),
        ({"label": np.array([b"cat"], object), "score": np.array([0.9])},
         {"label": np.array([b"dog"], object), "score": np.array([0.9])}, False),
        (said([{"label": "cat", "score": 0.9}]), said([{"label": "cat", "score": 0.5}]), True),
        (said([{"label": "cat", "score": 0.9}]), said([{"label": "dog", "score": 0.9}]), False),
        (said([0.1, 0.2]), said([0.1, 0.201]), True),
        (said([0.1, 0.2]), said([0.1, 0.3]), False),
        (said([0.1, 0.2]), said([0.1]), False),
    ],
)  # fmt: skip
def test_what_is_alike(one, other, same):
    assert alike(one, other) is same


@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6, width=32)))
def test_everything_is_like_itself(array):
    assert alike({"y": array}, {"y": array.copy()})
