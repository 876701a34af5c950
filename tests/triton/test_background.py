"""Servers that outlive the command that started them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    SessionError,
    StorageError,
    UnreachableError,
)
from mlflow_tdeploy.deploy.address import files_of
from mlflow_tdeploy.triton import background
from tests.bundles import WEIGHTS, linear_graph
from tests.processes import program
from tests.triton.test_local import CONFIG


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    linear_graph(root / "linear" / "1" / "model.onnx", WEIGHTS)
    (root / "linear" / "config.pbtxt").write_text(CONFIG)
    return root


@pytest.fixture(autouse=True)
def _none_left(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    yield
    for one in background.running():
        background.stop(one)


def tdeploy(*arguments):
    """Run the command in a process of its own, which is gone then; return its lines by their first word."""
    command = [sys.executable, "-m", "mlflow_tdeploy.cli", "triton", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(line.split(None, 1) for line in done.stdout.splitlines())


def left(region):
    return [name for name in os.listdir("/dev/shm") if name.startswith(region)] + processes(region)


def processes(region):
    """Return the command lines of what a server has started, as they name its shared memory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [line for line in [path.read_text().replace("\0", " ")] if region in line]
    return found


@pytest.mark.slow
def test_a_server_outlives_the_command_and_is_ended_by_another(repository):
    made = tdeploy("start", repository)
    (found,) = background.running()
    assert found.alive
    assert made["http"] == found.listening.url
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0] * 4}
    (output,) = found.listening.ask("v2/models/linear/infer", {"inputs": [tensor]})["outputs"]
    np.testing.assert_allclose(output["data"], np.ones(4, np.float32) @ WEIGHTS, rtol=1e-6)
    shown = tdeploy("status")
    assert (shown["models"], shown["repository"]) == ("linear", str(repository))
    assert left(found.region)
    assert tdeploy("stop") == {"stopped": f"{found.listening.url} ({repository})"}
    assert not found.alive
    assert not left(found.region)
    assert not Path(found.log).exists()
    assert background.running() == []
    assert "No server was started here" in CliRunner().invoke(main, ["triton", "status"]).output
    background.stop(found)  # twice is fine


def test_a_lease_in_an_empty_repository_is_no_model(tmp_path):
    folder = _made(tmp_path / "models")
    (folder / ".lease-m").write_text("{}")
    assert tdeploy("start", folder)["models"] == "none yet"


def test_a_folder_is_made_and_several_servers_are_told_apart(tmp_path):
    first = background.start(_made(tmp_path / "a"))
    second = background.start(_made(tmp_path / "b"))
    assert not {first.http, first.grpc, first.metrics} & {second.http, second.grpc, second.metrics}
    assert [background.started_at(one.grpc) for one in (first, second)] == [first, second]
    with pytest.raises(NotFoundError, match="Say which"):
        background.chosen(None)
    assert background.chosen(second.http) == second
    with pytest.raises(ConflictError, match="is served at .* already"):
        background.start(tmp_path / "a")
    with pytest.raises(ConflictError, match=f"Port {first.http} is that of another server"):
        background.start(_made(tmp_path / "c"), ports=(first.http, 1, 2))
    background.stop(first)
    assert background.running() == [second]
    with pytest.raises(NotFoundError, match=f"No server was started here at port {first.http}"):
        background.chosen(first.http)


def test_a_server_that_ended_by_itself_is_told_and_cleared_away(repository):
    found = background.start(repository, models=["linear"])
    os.kill(found.pid, 9)
    _wait_until(lambda: not found.alive)
    assert background.started_at(found.http) is None
    shown = CliRunner().invoke(main, ["triton", "status"])
    assert shown.output.startswith(f"ended      {found.listening.url}")
    stopped = CliRunner().invoke(main, ["triton", "stop", "--all"])
    assert stopped.exit_code == 0
    assert background.running() == []
    assert not left(found.region)


def test_a_server_that_crashed_is_told_where_it_is_asked_for_and_replaced(repository, monkeypatch):
    monkeypatch.delenv("TRITON_MODEL_REPO", raising=False)
    found = background.start(repository)
    os.kill(found.pid, 9)
    _wait_until(lambda: not found.alive)
    with pytest.raises(UnreachableError, match=f"at port {found.http} has ended.*triton start {repository}"):
        files_of(f"tdeploy://127.0.0.1:{found.http}")
    again = background.start(repository, ports=(found.http, found.grpc, found.metrics))
    assert background.running() == [again]
    assert background.chosen(again.http) == again
    assert files_of(f"tdeploy://127.0.0.1:{again.http}").url == str(repository)


def test_a_server_that_cannot_start_leaves_nothing(repository, tmp_path):
    (repository / "linear" / "1" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(SessionError, match=r"while it started: .*"):
        background.start(repository, models=["linear"])
    assert background.running() == []
    assert not list((tmp_path / "cache").rglob("*.log"))


def test_another_process_with_the_number_of_one_that_ended_is_left_alone(repository):
    found = background.start(repository)
    with program([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as other:
        background.stop(dataclasses.replace(found, pid=other.pid))
        assert other.poll() is None
        other.stdin.close()
    assert found.alive


def test_where_nothing_can_be_remembered_no_server_is_started(repository, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="TDEPLOY_CACHE_DIR"):
        background.start(repository)
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))


def _made(folder):
    folder.mkdir()
    return folder


def _wait_until(done, seconds=10.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


SLOW = """
import time


class TritonPythonModel:
    def initialize(self, args):
        time.sleep(60)
"""


def test_a_server_is_known_from_its_first_moment_and_goes_with_who_is_told_to_end(tmp_path):
    """As by ``timeout``, or where a job is cancelled."""
    root = tmp_path / "repository" / "slow"
    (root / "1").mkdir(parents=True)
    (root / "1" / "model.py").write_text(SLOW)
    (root / "config.pbtxt").write_text('name: "slow"\nbackend: "python"\nmax_batch_size: 0\n')
    command = [sys.executable, "-m", "mlflow_tdeploy.cli", "triton", "start", str(root.parent)]
    with program(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as starting:
        end = time.monotonic() + 60
        while not (found := background.running()) and time.monotonic() < end:
            time.sleep(0.05)
        assert found[0].alive
        assert tdeploy("status")["starting"] == found[0].listening.url
        _wait_until(lambda: len(processes(found[0].region)) > 1, 60)  # the model's own, which has just begun
        (tmp_path / "empty").mkdir()
        other = background.start(tmp_path / "empty")  # on ports of its own, though nobody listens at those yet
        assert not {other.http, other.grpc, other.metrics} & {found[0].http, found[0].grpc, found[0].metrics}
        background.stop(other)
        starting.terminate()
        assert starting.wait(60) == 128 + signal.SIGTERM
    assert background.running() == []
    assert not found[0].alive
    assert not Path(found[0].log).exists()
    assert not left(found[0].region)


def test_run_that_is_told_to_end_while_its_server_starts_leaves_nothing(tmp_path):
    root = tmp_path / "repository" / "slow"
    (root / "1").mkdir(parents=True)
    (root / "1" / "model.py").write_text(SLOW)
    (root / "config.pbtxt").write_text('name: "slow"\nbackend: "python"\nmax_batch_size: 0\n')
    command = [sys.executable, "-m", "mlflow_tdeploy.cli", "triton", "run", str(root.parent)]
    with program(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as starting:
        region = f"tdeploy-{starting.pid}-"
        _wait_until(lambda: any("python_backend_stub" in one for one in processes(region)), 60)
        starting.terminate()
        assert starting.wait(60) == 128 + signal.SIGTERM
    assert not left(region)


def test_a_folder_has_one_server_however_it_is_called(repository, tmp_path):
    (tmp_path / "link").symlink_to(repository)
    found = background.start(repository)
    for other in (tmp_path / "link", repository / ".." / repository.name):
        with pytest.raises(ConflictError, match="is served at"):
            background.start(other)
    background.stop(found)
    command = [sys.executable, "-m", "mlflow_tdeploy.cli", "triton", "start", str(repository)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    told = [one.communicate(timeout=120)[0] for one in both]
    assert sorted(one.returncode for one in both) == [0, 1], told
    assert "is served at" in "".join(told)
    assert len(background.running()) == 1


def test_what_is_no_folder_of_this_host_or_no_three_ports_is_told(repository):
    done = CliRunner().invoke(main, ["triton", "start", "s3://127.0.0.1:1/bucket/models"])
    assert done.exit_code == 2
    assert "serves a folder of it, got an address (s3://…)" in done.output
    assert not Path("s3:").exists()
    with pytest.raises(InvalidInputError, match="need a port each, got 9100, 9100, 9101"):
        background.start(repository, ports=(9100, 9100, 9101))
    with pytest.raises(SessionError, match="nope"):
        background.start(repository, models=["nope"])
    assert background.running() == []


def test_a_port_that_another_program_has_is_refused(repository):
    """Whoever answers there would be taken for the server."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConflictError, match=f"Port {other.getsockname()[1]} is taken by another program"):
            background.start(repository, ports=(other.getsockname()[1], 1, 2))
    assert background.running() == []
