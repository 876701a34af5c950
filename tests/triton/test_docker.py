"""Triton from an image. Docker itself is not here: a program in its place runs the wheel's server as it is told to."""

from __future__ import annotations

import json
import sys

import pytest

from mlflow_tdeploy.core.errors import MissingDependencyError, SessionError
from mlflow_tdeploy.triton import background, docker, home
from mlflow_tdeploy.triton.home import backends, environment, find_server
from mlflow_tdeploy.triton.local import local_triton
from tests.triton.test_local import infer, repository  # noqa: F401

#: Notes what it was asked, and runs the server with the arguments that come after the image.
STAND_IN = """#!{python}
import json, os, sys
with open({notes!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "image":
    sys.exit("no such image" if "absent" in sys.argv[-1] else 0)
if sys.argv[1] == "run":
    arguments = sys.argv[sys.argv.index("tritonserver") + 1:]
    os.environ.update({environment!r})
    os.execv({binary!r}, [{binary!r}, *arguments, "--backend-directory={backends}"])
"""


@pytest.fixture
def notes(server, tmp_path, monkeypatch):
    """Have a docker on the path, and no other server; return what it was asked."""
    if server.wheel is None:
        pytest.skip("runs the wheel's server")
    file, folder = tmp_path / "notes", tmp_path / "bin"
    folder.mkdir()
    values = {key: value for key, value in environment(server).items() if key in ("PATH", "LD_LIBRARY_PATH")}
    (folder / "docker").write_text(
        STAND_IN.format(
            python=sys.executable, notes=str(file), environment=values, binary=str(server.binary),
            backends=backends(server),
        )
    )  # fmt: skip
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv(home.TRITON_HOME, raising=False)
    monkeypatch.setenv(docker.IMAGE, "registry/tritonserver:1")
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()]


def test_an_image_serves_a_repository_and_its_container_goes(notes, repository, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
    assert find_server().image == "registry/tritonserver:1"
    with local_triton(repository, models=["linear"]) as triton:
        infer(triton, 2)
    inspected, run, removed = notes()
    assert inspected[:2] == ["image", "inspect"]
    container = run[run.index("--name") + 1]
    assert run[run.index("--volume") + 1] == f"{repository}:{repository}:ro"
    assert run[run.index("--network") + 1] == "host"
    assert "AWS_SECRET_ACCESS_KEY" in [run[place + 1] for place, one in enumerate(run) if one == "--env"]
    assert "a secret" not in " ".join(run)
    assert run.index("registry/tritonserver:1") == run.index("tritonserver") - 1
    assert removed == ["rm", "--force", container]


def test_a_lasting_server_in_a_container_is_stopped_by_its_name(notes, repository):  # noqa: F811
    found = background.start(repository)
    assert "which runs the image registry/tritonserver:1" in found.server
    background.stop(found)
    assert notes()[-1] == ["rm", "--force", found.container]
    assert background.running() == []


def test_an_image_that_is_not_here_is_not_waited_for(notes, repository, monkeypatch):  # noqa: F811
    monkeypatch.setenv(docker.IMAGE, "absent:1")
    with pytest.raises(SessionError, match="docker pull absent:1"), local_triton(repository):
        pass


def test_an_image_without_docker_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv(home.TRITON_HOME, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(docker.IMAGE, "absent:1")
    with pytest.raises(MissingDependencyError, match="docker"):
        find_server()
