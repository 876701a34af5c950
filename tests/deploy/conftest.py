from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow.deployments import get_deploy_client

from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.files import FolderFiles
from mlflow_tdeploy.deploy.s3 import parse_s3
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.local import local_triton
from tests.processes import program
from tests.triton import crashes
from tests.triton.conftest import server  # noqa: F401

KEY, SECRET = "tdeploykey", "tdeploysecretkey"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def url_for_triton(url):
    """Return a repository's address as ``--model-repository`` takes it."""
    endpoint, bucket, prefix = parse_s3(url)
    path = f"{bucket}/{prefix}".rstrip("/")
    return f"s3://{endpoint}/{path}" if endpoint else f"s3://{path}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 with signed requests: rclone serves a folder; yields its address."""
    rclone = shutil.which("rclone") or str(Path(sys.executable).parent / "rclone")
    root, port = tmp_path_factory.mktemp("s3"), free_port()
    (root / "bucket").mkdir()
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}",
               "--vfs-cache-mode", "off", "--config", str(root / "none.conf"), str(root)]  # fmt: skip
    with program(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def _wait(port: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("rclone does not serve")


@pytest.fixture
def s3_keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def running(server, tmp_path_factory):  # noqa: F811 - the fixture
    repository = tmp_path_factory.mktemp("repository")
    with local_triton(repository, server=server) as triton:
        yield triton, repository
        ended = triton.process.poll()  # tests that find nobody cannot say why
        assert ended is None, f"Triton ended by itself ({ended}):\n{triton.log.read_text(errors='replace')[-4000:]}"


@pytest.fixture(autouse=True)
def alive(request):
    """Have the server that tests of a module share answer, should it have crashed in the one before."""
    if "running" in request.fixturenames:
        crashes.revive(*request.getfixturevalue("running"))


@pytest.fixture
def client(running, tracking, monkeypatch):
    """MLflow's client of that server; what a test deploys goes, and nothing of it stays."""
    triton, repository = running
    monkeypatch.setenv("TRITON_MODEL_REPO", str(repository))
    monkeypatch.setenv("TRITON_URL", f"127.0.0.1:{triton.http}")
    found = get_deploy_client("tdeploy")
    yield found
    for one in found.list_deployments():
        found.delete_deployment(one["name"])
    assert not [path for path in repository.iterdir() if path.is_dir()]


@pytest.fixture
def target(running):
    """Yield the deployments of an empty server; all that a test leaves there goes."""
    triton, repository = running
    found = Deployments(TritonClient(Connection(f"http://127.0.0.1:{triton.http}")), FolderFiles(repository))
    yield found
    for name in ("m", "bert", "bert-large"):
        with contextlib.suppress(Exception):
            found.delete(name)
