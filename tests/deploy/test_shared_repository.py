"""Two servers of one repository, of which one is away, or left by a killed deployer, while the other goes on."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.deploy.apply import Deployments, Settings
from mlflow_tdeploy.deploy.files import FolderFiles
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.names import TRIAL
from tests.deploy.versions import Killed, factor, killed_at, linear
from tests.triton.conftest import _ending, server, start  # noqa: F401

KEEP = Settings(grace=0.0, keep=1)


@pytest.fixture
def both(start, tmp_path):  # noqa: F811
    repository = tmp_path / "shared"
    repository.mkdir()
    urls = [f"http://127.0.0.1:{start(repository).http}" for _ in range(2)]
    return [Deployments(TritonClient(Connection(url)), FolderFiles(repository)) for url in urls]


def bring(tmp_path, version, *targets):
    """Bring a version as a promotion does: everywhere, and then what is not kept goes."""
    for target in targets:
        target.deploy(linear(tmp_path, version, float(version)), KEEP, retire=False)
    for unload_only in (True, False) if len(targets) > 1 else (False,):
        for target in targets:
            target.retire("m", unload_only=unload_only)


def has(target):
    """Return what a server has loaded, which it does not list where the files are gone."""
    names = ["m", *(f"m.v{version}{end}" for version in (7, 8, 9, 10) for end in ("", TRIAL))]
    return [name for name in names if target.client.ready(name)]


def test_a_server_that_was_away_keeps_nothing_loaded_that_is_gone(both, tmp_path):
    one, other = both
    bring(tmp_path, 7, one, other)
    bring(tmp_path, 8, one)
    bring(tmp_path, 9, one)
    assert (factor(other), has(other)) == (7, ["m", "m.v7"])
    assert one.route("m").gone == (7,)
    bring(tmp_path, 9, other)
    assert factor(other) == 9
    bring(tmp_path, 10, one, other)
    for target in both:
        assert has(target) == ["m", "m.v9", "m.v10"]
        assert factor(target) == 10
    assert one.files.models() == ["m", "m.v10", "m.v9"]


def test_what_a_killed_deployer_tried_on_one_server_goes_there(both, tmp_path):
    one, other = both
    bring(tmp_path, 7, one, other)
    one.deploy(linear(tmp_path, 8, 8.0), KEEP, retire=False)
    with pytest.raises(Killed):
        killed_at(other, "answers").deploy(linear(tmp_path, 8, 8.0), KEEP, retire=False)
    assert has(other) == ["m", "m.v7", "m.v8", f"m.v8{TRIAL}"]
    bring(tmp_path, 9, one, other)
    for target in both:
        assert has(target) == ["m", "m.v8", "m.v9"]
        assert factor(target) == 9
    assert one.files.models() == ["m", "m.v8", "m.v9"]
