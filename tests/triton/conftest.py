from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import TDeployError
from mlflow_tdeploy.triton.home import OWN_HOME, find_server, install, preflight


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
