import subprocess
import sys
import threading
import time
from itertools import count, repeat

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.runtime.base import Session
from mlflow_tdeploy.runtime.threads import AdaptiveThreads, Load, _Choice

FEEDS = {"x": np.zeros((1, 8), np.int64)}


class Timed(Session):
    """A session that takes as long as it is told to and counts its runs."""

    def __init__(self, seconds):
        self.seconds, self.runs, self.closed = seconds, 0, 0

    def infer(self, feeds):
        assert not self.closed
        self.runs += 1
        time.sleep(self.seconds)
        return feeds

    def close(self):
        self.closed += 1


def opened(narrow, wide):
    """Both sessions open: the background thread has ended."""
    threads = AdaptiveThreads(narrow.infer, lambda: wide)
    for _ in range(AdaptiveThreads.OPEN_AFTER):
        threads(FEEDS)
    threads._opener.join()
    return threads


@pytest.mark.parametrize(("narrow_s", "wide_s", "winner"), [(0.004, 0.0005, "wide"), (0.0005, 0.004, "narrow")])
def test_adaptive_threads_settle_on_the_faster_session(narrow_s, wide_s, winner):
    sessions = {"narrow": Timed(narrow_s), "wide": Timed(wide_s)}
    threads = opened(sessions["narrow"], sessions["wide"])
    for _ in range(40):
        threads(FEEDS)
    loser = sessions["narrow" if winner == "wide" else "wide"]
    assert loser.runs <= AdaptiveThreads.OPEN_AFTER + 6
    assert sessions[winner].runs >= 32
    threads.close()


def test_adaptive_threads_change_their_mind_when_the_host_becomes_busy():
    narrow, wide = Timed(0.003), Timed(0.001)
    threads = opened(narrow, wide)
    for _ in range(12):
        threads(FEEDS)
    wide.seconds = 0.009
    before = wide.runs
    for _ in range(30):
        threads(FEEDS)
    assert wide.runs - before <= 12
    threads.close()


def run(choice, narrow, wide, requests):
    """Answer requests that take as long as the iterators say; returns the ways taken."""
    taken = []
    for _ in range(requests):
        taken.append(choice.next())
        choice.record(taken[-1], next(wide if taken[-1] else narrow))
    return taken


def test_choice_measures_the_other_way_again_from_time_to_time():
    choice = _Choice()
    run(choice, repeat(0.001), repeat(0.002), 6)
    early = len(_Choice.EARLY)
    assert run(choice, repeat(0.001), repeat(0.002), _Choice.RETRY).count(1) == 2 * (early + 1)
    assert run(choice, repeat(0.001), repeat(0.002), _Choice.RETRY).count(1) == 2


def test_choice_recovers_soon_from_a_start_beside_other_work():
    choice = _Choice()
    assert run(choice, repeat(0.006), repeat(0.012), 10)[-2:] == [0, 0]  # another model was being opened
    assert run(choice, repeat(0.006), repeat(0.004), 24)[-8:] == [1] * 8


def test_choice_is_not_overturned_by_hiccups():
    # As measured on two shared cores: mostly 4 ms, 10 where a spinning thread lost its core; one thread takes 6.4.
    random = np.random.default_rng(0)
    wide = (0.010 if random.random() < 0.2 else 0.004 for _ in count())
    shares = []
    for _ in range(50):
        shares.append(run(_Choice(), repeat(0.0064), wide, 400).count(1) / 400)
    assert np.mean(shares) > 0.93
    assert np.median(shares) > 0.96


def test_choice_returns_to_a_way_that_has_recovered():
    choice = _Choice()
    run(choice, repeat(0.006), repeat(0.004), 20)
    assert run(choice, repeat(0.006), repeat(0.012), 60)[-30:].count(1) <= 2  # busy: one trial
    assert run(choice, repeat(0.006), repeat(0.004), 2 * _Choice.RETRY)[-32:].count(0) == 0  # free again


def test_choice_is_made_for_each_size_apart():
    narrow, wide = Timed(0.0), Timed(0.0)
    threads = opened(narrow, wide)
    threads({"x": np.zeros((1, 8))})
    threads({"x": np.zeros((1, 500))})
    assert len(threads._choices) == 2
    threads.close()


def test_adaptive_threads_give_the_first_answers_without_waiting_for_the_second_session():
    narrow, release = Timed(0.0), threading.Event()

    def slow_open():
        release.wait(10)
        return Timed(0.0)

    threads = AdaptiveThreads(narrow.infer, slow_open)
    for _ in range(10):
        threads(FEEDS)
    assert narrow.runs == 10
    release.set()
    threads.close()


def test_adaptive_threads_use_one_thread_when_requests_overlap():
    narrow, wide = Timed(0.05), Timed(0.05)
    threads = opened(narrow, wide)
    before = wide.runs
    workers = [threading.Thread(target=threads, args=(FEEDS,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wide.runs - before <= 1
    threads.close()


@pytest.mark.parametrize("gone_before", [False, True], ids=["until-the-end", "in-between"])
def test_adaptive_threads_record_no_time_in_which_others_were_served(gone_before):
    """What a request took beside others says nothing about a lone one."""

    class Held(Timed):
        def infer(self, feeds):
            if feeds is first:
                entered.set()
                assert go.wait(10)
            return super().infer(feeds)

    first, entered, go = {"x": np.zeros((1, 8), np.int64)}, threading.Event(), threading.Event()
    other_entered, other_go = threading.Event(), threading.Event()
    narrow, wide = Held(0.0), Held(0.0)
    original = narrow.infer

    def overlapping(feeds):
        if feeds is not first and entered.is_set():
            other_entered.set()
            assert other_go.wait(10)
        return original(feeds)

    threads = opened(narrow, wide)
    threads._narrow = overlapping
    threads(FEEDS)
    (choice,) = threads._choices.values()
    before = [list(times) for times in choice._times]
    workers = [threading.Thread(target=threads, args=(first,)), threading.Thread(target=threads, args=(FEEDS,))]
    workers[0].start()
    assert entered.wait(10)
    workers[1].start()
    assert other_entered.wait(10)
    for release, worker in [(other_go, workers[1]), (go, workers[0])][:: 1 if gone_before else -1]:
        release.set()
        worker.join()
    assert [list(times) for times in choice._times] == before
    threads(FEEDS)
    assert [list(times) for times in choice._times] != before  # alone again
    threads.close()


def test_adaptive_threads_use_one_thread_beside_bulk_work():
    load, narrow, wide = Load(), Timed(0.0), Timed(0.0)
    threads = AdaptiveThreads(narrow.infer, lambda: wide, load)
    for _ in range(AdaptiveThreads.OPEN_AFTER):
        threads(FEEDS)
    threads._opener.join()
    answers = []
    bulk = load.counted(lambda feeds: answers.extend(threads(FEEDS) for _ in range(10)) or feeds)
    bulk(FEEDS)
    assert (wide.runs, len(answers)) == (0, 10)
    threads(FEEDS)
    threads(FEEDS)
    assert wide.runs == 1  # alone again
    threads.close()


def test_adaptive_threads_go_on_with_one_thread_when_the_second_session_fails(caplog):
    class Failing(Timed):
        def infer(self, feeds):
            super().infer(feeds)
            raise SessionError("out of memory")

    narrow, wide = Timed(0.0), Failing(0.0)
    threads = opened(narrow, wide)
    for _ in range(2 * _Choice.RETRY):
        assert threads(FEEDS) is FEEDS
    assert (wide.runs, wide.closed) == (1, 1)
    assert caplog.text.count("out of memory") == 1
    threads.close()


def test_adaptive_threads_keep_the_second_session_when_the_request_is_at_fault():
    class Picky(Timed):
        def infer(self, feeds):
            if feeds is not FEEDS:
                raise SessionError("wrong shape")
            return super().infer(feeds)

    wide = Picky(0.0)
    threads = opened(Picky(0.001), wide)
    for _ in range(20):
        with pytest.raises(SessionError, match="wrong shape"):
            threads({"x": np.zeros((1, 8), np.int64)})
    assert wide.closed == 0
    threads.close()
    assert wide.closed == 1


def test_adaptive_threads_go_on_when_the_second_session_cannot_be_opened(caplog):
    def fail():
        raise RuntimeError("no memory")

    narrow = Timed(0.0)
    threads = AdaptiveThreads(narrow.infer, fail)
    for _ in range(5):
        threads(FEEDS)
    threads._opener.join()
    assert narrow.runs == 5
    assert "no memory" in caplog.text
    threads.close()


def test_a_process_that_ends_waits_for_a_session_that_is_being_opened(tmp_path):
    """Else it is aborted, and what it has not written yet is lost: ONNX Runtime ends the process there."""
    code = f"""
import pathlib, time
from mlflow_tdeploy.runtime.threads import AdaptiveThreads

def opened():
    time.sleep(0.5)
    pathlib.Path({str(tmp_path / "opened")!r}).touch()
    raise OSError("no session")

threads = AdaptiveThreads(lambda feeds: feeds, opened)
for _ in range(3):
    threads({{}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "opened").exists()


def test_close_frees_the_second_session_even_when_it_opens_late():
    late, release = Timed(0.0), threading.Event()

    def slow_open():
        release.wait(10)
        return late

    threads = AdaptiveThreads(Timed(0.0).infer, slow_open)
    for _ in range(AdaptiveThreads.OPEN_AFTER):
        threads(FEEDS)
    threading.Timer(0.05, release.set).start()
    threads.close()
    threads.close()
    assert late.closed == 1
