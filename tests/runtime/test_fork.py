"""A model that was opened before ``os.fork``: gunicorn's preload, ``multiprocessing`` on Linux."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
import traceback

import numpy as np
import pytest

from mlflow_tdeploy import save_model
from mlflow_tdeploy.core.hardware import host_cpu
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.policy import Policy
from tests.flavor.text_bundles import make_text_bundle
from tests.forking import forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

TEXTS = ["good", "a good film", "a bad film", "bad"] * 50


def in_child(work):
    """Run ``work`` in a forked process; raises what it raised, or that it did not end."""
    read, write = os.pipe()

    def told():
        try:
            work()
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-4000:])
            return 1
        return 0

    status = forked(told)  # without exit handlers: ONNX Runtime waits for lost threads in its own
    os.close(write)
    said = os.fdopen(read).read()
    assert status == 0, said or f"the child ended with {status} ({-signal.SIGALRM} is: it hung)"


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(probe, "hardware", lambda: dataclasses.replace(host_cpu(), cores=2))


@pytest.mark.parametrize(
    "given",
    [{}, {"intra_op_threads": 2}, {"own": {"execution_mode": "parallel"}}],
    ids=["as it comes", "operators with threads", "operators side by side"],
)
def test_a_forked_process_answers_as_its_parent_did(tmp_path, given):
    options = SessionOptions(token_budget=16, **given)
    with open_model(make_text_bundle(tmp_path), options=options) as model:
        many, lone = model.predict(TEXTS), model.predict(["a good film"])
        for _ in range(3):
            model.predict(["a good film"])  # the session of lone requests is opened
        time.sleep(0.3)

        def work():
            np.testing.assert_array_equal(model.predict(TEXTS), many)
            for _ in range(12):
                np.testing.assert_array_equal(model.predict(["a good film"]), lone)
            np.testing.assert_array_equal(model.predict(TEXTS, variant="onnx-fp32").shape, many.shape)
            model.close()

        in_child(work)
        np.testing.assert_array_equal(model.predict(TEXTS), many)  # and the parent goes on


def test_a_forked_process_uses_no_session_of_its_parent(tmp_path, monkeypatch):
    """A thread that is not in the child may have held a lock of the session at that moment."""
    sessions, original = [], OrtCpu.open
    monkeypatch.setattr(OrtCpu, "open", lambda *given: sessions.append(original(*given)) or sessions[-1])
    with open_model(make_text_bundle(tmp_path)) as model:
        model.predict(TEXTS)
        before = len(sessions)

        def work():
            model.predict(TEXTS)
            assert len(sessions) == before + 1
            model.predict(TEXTS)
            assert len(sessions) == before + 1

        in_child(work)


def test_a_forked_process_computes_with_torch(tmp_path, tiny_bert):
    """torch's own threads are not in the child, and the first product that waits for them ends it."""
    save_model(tiny_bert, tmp_path / "m", precisions=["hf"])
    with open_model(tmp_path / "m", policy=Policy(variant="hf")) as model:
        before = model.predict(["a good film"] * 8)

        def work():
            answers = model.predict(["a good film"] * 8)
            assert [one["label"] for one in answers] == [one["label"] for one in before]

        in_child(work)


def test_a_fork_while_requests_run_leaves_no_lock_behind(tmp_path):
    with open_model(make_text_bundle(tmp_path), options=SessionOptions(token_budget=16)) as model:
        stop = threading.Event()

        def keep_busy():
            while not stop.is_set():
                model.predict(TEXTS)
                model.predict(["good"])

        busy = threading.Thread(target=keep_busy)
        busy.start()
        try:
            for _ in range(10):
                in_child(lambda: model.predict(TEXTS))
        finally:
            stop.set()
            busy.join()
