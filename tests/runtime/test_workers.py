"""Threads of a model end with it; what the system refuses is no closed model."""

import threading

import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.runtime.workers import Workers


def test_work_after_the_end_is_refused_as_by_a_closed_model():
    workers = Workers(2)
    assert workers.submit(pow, 2, 3).result() == 8
    workers.shutdown(wait=True)
    with pytest.raises(SessionError, match="The model is closed"):
        workers.submit(pow, 2, 3)


def test_a_thread_that_cannot_be_started_is_no_closed_model(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    workers = Workers(2)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            workers.submit(pow, 2, 3)
    workers.shutdown(wait=False)
