from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import TDeployError
from mlflow_tdeploy.triton.home import OWN_HOME, find_server, install, preflight
from mlflow_tdeploy.triton.local import launch


@pytest.fixture(scope="session")
def server():
    """A real Triton: that of this host, or the wheel's, installed beside the repository once."""
    os.environ.setdefault(OWN_HOME, str(Path(__file__).parents[2] / ".triton"))
    try:
        found = find_server()
    except TDeployError:
        install()
        found = find_server()
    preflight(found)
    return found


@pytest.fixture(scope="session")
def _ending():
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def start(server, tmp_path, _ending):
    """Start a server on a folder; it ends after the test while the next one begins, for that takes seconds."""
    started = []

    def begin(repository):
        started.append(launch(repository, tmp_path / f"triton-{len(started)}.log", server=server))
        return started[-1]

    yield begin
    for one in started:
        _ending.submit(one.stop)
