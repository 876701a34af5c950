"""Operator threads on a processor each, and the caller back where it was."""

import contextlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.runtime.affinity import move_to, processors, release
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu, OrtSession
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, make_bundle

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system ties no thread")
X = np.array([[1, 2, 3, 4]], np.float32)


@pytest.fixture
def everywhere():
    """All processors of this process, two at least; this thread's are as before afterwards."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one processor only")
    yield sorted(allowed)
    os.sched_setaffinity(0, allowed)


def test_threads_are_tied_only_where_they_take_every_processor(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5, 2, 9})
    assert processors(3) == (2, 5, 9)
    assert processors(2) == processors(4) == processors(1) == ()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5})
    assert processors(1) == ()


def test_nothing_is_tied_where_the_system_cannot(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors(2) == ()
    assert move_to(None) is None


def test_move_to_ties_the_caller_and_release_lets_it_go(everywhere):
    before = move_to(everywhere[1])
    assert os.sched_getaffinity(0) == {everywhere[1]}
    release(before)
    assert os.sched_getaffinity(0) == set(everywhere)


def test_move_to_leaves_a_caller_that_is_kept_elsewhere(everywhere):
    os.sched_setaffinity(0, everywhere[1:2])
    release(move_to(everywhere[0]))
    assert os.sched_getaffinity(0) == {everywhere[1]}


def test_move_to_does_without_where_it_is_forbidden(everywhere, monkeypatch):
    def refuse(process, wanted):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setaffinity", refuse)
        assert move_to(everywhere[0]) is None


def _open(tmp_path, *, lone):
    bundle = Bundle.open(make_bundle(tmp_path))
    options = SessionOptions(intra_op_threads=len(os.sched_getaffinity(0)), own={"spinning": True}, lone=lone)
    return OrtCpu().open(bundle.root, bundle.variants["onnx-fp32"], bundle.manifest.signature, options)


def _threads_tied_to(processor):
    found = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # a thread of something else that has ended meanwhile
            status = (Path("/proc/self/task") / task / "status").read_text()
            found += f"Cpus_allowed_list:\t{processor}\n" in status
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks /proc about threads")
def test_a_session_for_lone_requests_has_a_thread_on_every_other_processor(everywhere, tmp_path):
    before = [_threads_tied_to(processor) for processor in everywhere]
    loose = _open(tmp_path / "loose", lone=False)
    assert [_threads_tied_to(processor) for processor in everywhere] == before
    session = _open(tmp_path / "tied", lone=True)
    wanted, until = [before[0], *(count + 1 for count in before[1:])], time.monotonic() + 30
    while [_threads_tied_to(processor) for processor in everywhere] != wanted:  # each thread ties itself as it starts
        assert time.monotonic() < until
        time.sleep(0.01)
    for one in (loose, session):
        np.testing.assert_allclose(one.infer({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)
        one.close()


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_is_on_the_first_processor_while_it_runs_and_free_afterwards(
    everywhere, tmp_path, monkeypatch, fails
):
    where, run = [], OrtSession._run

    def watched(self, session, feeds):
        where.append(os.sched_getaffinity(0))
        if fails:
            raise RuntimeError("no memory")
        return run(self, session, feeds)

    monkeypatch.setattr(OrtSession, "_run", watched)
    session = _open(tmp_path, lone=True)

    def call():
        try:
            session.infer({"x": X})
        except SessionError:
            where.append("failed")
        where.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert where == [{everywhere[0]}, *(["failed"] if fails else []), set(everywhere)]
    session.close()
