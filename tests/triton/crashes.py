"""Triton 2.51 itself ends by SIGSEGV now and then while it unloads a model; what tests make of that.

Its own words, of one such end: ``TritonBackendThread::StopBackendThread``, called by ``~TritonModelInstance`` in the
thread that deletes an unloaded model. Seen in about one of three runs of all tests of promotion and deployment; see
https://github.com/triton-inference-server/server/issues/6594 for one of its kind. A test in which it happens is run
once more, and said at the end of the run; one that fails for any other reason is not.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from mlflow_tdeploy.triton.local import LocalTriton, launch

#: Servers of this process that have not been looked at since they ended.
_started: list[LocalTriton] = []
_CRASHED = "Triton crashed"
_init = LocalTriton.__init__


def record_starts() -> None:
    """Remember every server that this process starts."""

    def remembered(self: LocalTriton, *arguments: object, **more: object) -> None:
        _init(self, *arguments, **more)
        _started.append(self)

    LocalTriton.__init__ = remembered  # type: ignore[method-assign]


def crashed() -> list[LocalTriton]:
    """Return the servers that have crashed since this was asked last."""
    ended = [one for one in _started if one.process.poll() is not None]
    _started[:] = [one for one in _started if one not in ended]
    return [one for one in ended if one.process.returncode == -signal.SIGSEGV]


def run_again_where_triton_crashed(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test, and once more where a server of it crashed; what :func:`pytest_runtest_protocol` is to return."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    crashed()  # of the tests before
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed for report in reports) and crashed():
        item._initrequest()  # type: ignore[attr-defined]
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        for report in reports:
            report.user_properties.append((_CRASHED, item.nodeid))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def revive(triton: LocalTriton, repository: Path) -> None:
    """Have a server that tests share answer again where it crashed, at the same ports, with nothing in its folder."""
    if triton.process.poll() != -signal.SIGSEGV:
        return
    for path in repository.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = launch(repository, triton.log, ports=(triton.http, triton.grpc, triton.metrics))
    for name in ("process", "region"):
        object.__setattr__(triton, name, getattr(again, name))


def told(terminal: pytest.TerminalReporter) -> list[str]:
    """Return the tests that were run once more."""
    reports = (report for found in terminal.stats.values() for report in found)
    properties = (one for report in reports for one in getattr(report, "user_properties", ()))
    return sorted({str(value) for name, value in properties if name == _CRASHED})
