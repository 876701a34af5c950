"""Versions that are tried out on everybody's requests before they answer all of them, on a real Triton."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter

import pytest

from mlflow_tdeploy.core.errors import ConflictError, TryoutError
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.tryout import Tryout
from mlflow_tdeploy.triton.tally_model import Tally
from tests.bundles import WEIGHTS
from tests.deploy.versions import QUICK, Killed, X, factor, killed_at, linear, there

CANARY = Tryout("canary", share=0.5, seconds=3.0, requests=10, errors=0.0, slower=50.0, agreement=0.0)


@contextlib.contextmanager
def asking(target, threads=3):
    """Ask all the time; yields what answered, by factor, and what failed."""
    answers, failed, over = Counter(), [], threading.Event()

    def ask():
        client = Deployments(target.client, target.files).client
        while not over.is_set():
            try:
                got = client.infer("m", {"x": X})["y"] / (X @ WEIGHTS)
                answers[round(float(got[0, 0]), 3)] += 1
            except Exception as error:
                failed.append(error)
            time.sleep(0.005)

    running = [threading.Thread(target=ask) for _ in range(threads)]
    for one in running:
        one.start()
    try:
        yield answers, failed
    finally:
        over.set()
        for one in running:
            one.join()


def test_a_canary_answers_its_share_and_then_everybody(target, tmp_path):
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    with asking(target) as (answers, failed):
        done = target.deploy(linear(tmp_path, 8, 2.0), QUICK, tryout=CANARY)
        during = dict(answers)
        time.sleep(0.3)
    assert not failed
    assert done.version == 8
    assert factor(target) == 2
    assert during[2.0] >= 10
    assert during[1.0] > during[2.0]  # half of the requests for three seconds, none of them before and after
    assert done.seen.startswith("canary: ")
    assert "0 failed" in done.seen
    assert there(target)[0].keys() == {"m", "m.v7", "m.v8"}
    assert target.route("m").rollout == ""


def test_a_shadow_answers_nobody(target, tmp_path):
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    shadow = Tryout("shadow", share=1.0, seconds=3.0, requests=10, errors=0.0, slower=50.0, agreement=1.0)
    seen = {}

    def go_on():
        seen.update(answers)

    with asking(target) as (answers, failed):
        done = target.deploy(linear(tmp_path, 8, 2.0), QUICK, tryout=Tryout(**{**vars(shadow), "go_on": go_on}))
    assert not failed
    assert seen.keys() == {1.0}
    assert "answered alike" in done.seen  # twice as long a vector has the same direction
    assert factor(target) == 2


@pytest.mark.slow
def test_whatever_ends_it_what_served_serves_on_and_the_rest_goes(target, tmp_path):
    """One deployment for all of them: each leaves it as it was."""
    first = target.deploy(linear(tmp_path, 7, 1.0), QUICK, tryout=CANARY)
    assert (first.version, first.seen) == (7, "")  # there was nothing to be tried out beside

    def fails(error, match, version, times, **how):
        with pytest.raises(error, match=match):
            target.deploy(linear(tmp_path, version, times), QUICK, tryout=Tryout(**{**vars(CANARY), **how}))
        assert factor(target) == 1
        assert there(target)[0].keys() == {"m", "m.v7"}
        assert there(target)[1] == {"m", "m.v7"}

    def wanted_no_more():
        raise ConflictError("Somebody wants another version.")

    fails(TryoutError, "asked 0 requests in 0.2 s, and 10 are needed", 8, 2.0, seconds=0.2)
    fails(ConflictError, "wants another", 8, 2.0, go_on=wanted_no_more)
    started = time.monotonic()
    with asking(target) as (_, failed):
        fails(TryoutError, "0 of .* answered alike, 90% have to", 9, -1.0, agreement=0.9, seconds=60.0)
        assert time.monotonic() - started < 30  # it is not waited for what is clear
        # its graph goes while it is tried out: whoever asks is answered by the version that serves
        breaks = {"seconds": 30.0, "go_on": lambda: target.client.unload("m.v8")}
        fails(TryoutError, "requests failed, such as: m.v8", 8, 2.0, **breaks)
    assert not failed


def test_a_killed_deployer_leaves_a_canary_that_the_next_one_ends(target, tmp_path):
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    with pytest.raises(Killed):
        killed_at(target, "answers").deploy(linear(tmp_path, 8, 2.0), QUICK)
    route = target.route("m")
    rollout = '{"version": 8, "model": "m.v8.check", "tally": "m.tally.check", "kind": "canary", "share": 1.0,'
    target._switch("m", route, type(route)(**{**vars(route), "rollout": f'{rollout} "seconds": 60.0}}'}))
    assert any(factor(target) == 2 for _ in range(20))  # it goes on, for a minute at most
    assert target.deploy(linear(tmp_path, 7, 1.0), QUICK).changed
    assert target.route("m").rollout == ""
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert factor(target) == 2


def test_what_hangs_is_ended_however_few_it_was_asked():
    seen = iter([Tally(1, 1), Tally(3, 3, why="no answer within 1.0 s", stopped=True)])
    with pytest.raises(TryoutError, match="it hangs, or was late 3 times in a row: no answer within 1.0 s"):
        Tryout("canary", 0.1, 60.0, 50, errors=0.01, slower=2.0, agreement=0.9).watched(lambda: next(seen))


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (Tally(100, 0, 100, 0.01, 0.01), ""),
        (Tally(100, 1, 99, 0.01, 0.01, "no memory"), ""),
        (Tally(100, 2, 98, 0.01, 0.01, "no memory"), "2 of 100 requests failed, such as: no memory"),
        (Tally(100, 1, 89, 0.01, 0.01), "89 of 99 requests were answered alike, 90% have to be"),
        (Tally(1000, 3, 997, 0.01, 0.01, "no answer", True), "it hangs, or was late 3 times in a row: no answer"),
        (Tally(100, 0, 100, 0.010, 0.024), ""),
        (Tally(100, 0, 100, 0.010, 0.026), "it took 26.0 ms .* more than 2 times as long"),
    ],
)
def test_what_is_too_bad(seen, why):
    found = Tryout("canary", 0.1, 60.0, 50, errors=0.01, slower=2.0, agreement=0.9).fault(seen)
    assert bool(found) == bool(why)
    assert re.search(why, found)
