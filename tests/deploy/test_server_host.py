"""A server says what its host is, and that decides; nothing of the asking is left."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import ServerError
from mlflow_tdeploy.core.records import to_plain
from mlflow_tdeploy.deploy import server_host
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.host_model import HOST, fingerprint_of
from mlflow_tdeploy.triton.local import local_triton
from tests.bundles import WEIGHTS, make_bundle

SAVED = {"grace": 0}


@pytest.fixture
def asked(caplog):
    """Return how often servers were asked so far."""
    caplog.set_level(logging.INFO, logger="mlflow_tdeploy")
    return lambda: sum(record.getMessage() == "Deployment: host" for record in caplog.records)


def threads(running, version):
    """Return how many threads an operator of a version's graph has."""
    config = (running[1] / f"linear.v{version}" / "config.pbtxt").read_text()
    return re.search(r'key: "intra_op_thread_count"\s+value \{\s+string_value: "(\d+)"', config)[1]


@pytest.fixture
def model(tmp_path):
    return str(make_bundle(tmp_path / "model"))


def test_the_server_says_what_its_host_is_and_nothing_of_that_is_left(client, running, model):
    made = client.create_deployment("linear", model, config=SAVED)
    here = to_plain(probe.hardware())
    assert {key: value for key, value in made["host"].items() if key != "software"} == {
        key: value for key, value in here.items() if key != "software"
    }
    assert made["host"]["software"]["python"]
    triton, repository = running
    assert sorted(path.name for path in repository.iterdir() if path.is_dir()) == ["linear", "linear.v1"]
    server = TritonClient(Connection(f"http://127.0.0.1:{triton.http}"))
    assert {one.name for one in server.models() if one.state == "READY"} == {"linear", "linear.v1"}


def test_what_answers_already_is_not_asked_about_and_another_version_is(client, model, asked, tmp_path):
    client.create_deployment("linear", model, config=SAVED)
    assert asked() == 1
    assert client.update_deployment("linear", model)["version"] == 1
    assert asked() == 1
    other = str(make_bundle(tmp_path / "other", {"onnx-fp32": WEIGHTS * np.float32(1.0001)}))
    assert client.update_deployment("linear", other)["version"] == 2
    assert asked() == 2


def test_what_the_user_says_is_not_asked(client, running, model, asked):
    made = client.create_deployment("linear", model, config={**SAVED, "device": "cpu", "cores": 7})
    assert (made["host"]["cores"], made["instances"]) == (7, "2")
    assert threads(running, 1) == "4"  # two copies share them
    with pytest.raises(MlflowException, match="deployed already"):
        client.create_deployment("linear", model, config=SAVED)
    assert asked() == 0


def test_a_version_may_be_gone_back_to_where_the_server_has_other_processors_now(client, running, model, tmp_path):
    made = client.create_deployment("linear", model, config={**SAVED, "cores": 8, "instances": 2})
    assert threads(running, 1) == "4"
    other = str(make_bundle(tmp_path / "other", {"onnx-fp32": WEIGHTS * np.float32(1.0001)}))
    client.update_deployment("linear", other, config={"cores": 16, "intra_op_threads": 5})
    assert threads(running, 2) == "5"
    back = client.update_deployment("linear", model, config={"version": 1, "cores": 2, "intra_op_threads": 0})
    assert (back["version"], back["key"]) == (1, made["key"])


def test_a_deployer_on_another_host_does_not_pass_its_own_processors_on(client, running, model, monkeypatch):
    here = replace(probe.host(), cores=64)
    monkeypatch.setattr(probe, "host", lambda: here)
    client.create_deployment("linear", model, config={**SAVED, "device": "cpu"})
    assert threads(running, 1) == "1"


def test_another_host_than_this_one_decides(server, model, tmp_path, tracking, monkeypatch):
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("needs two processors, of which the server has one")
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.setenv("TRT_VERSION", "10.8.0.43+cuda12.8")
    os.sched_setaffinity(0, {min(usable)})
    try:
        with local_triton(repository, server=server) as triton:
            os.sched_setaffinity(0, usable)
            monkeypatch.setenv("TRITON_MODEL_REPO", str(repository))
            made = get_deploy_client(f"tdeploy://127.0.0.1:{triton.http}").create_deployment("linear", model)
    finally:
        os.sched_setaffinity(0, usable)
    assert (made["host"]["cores"], made["instances"]) == (1, "1")
    assert made["host"]["software"]["tensorrt"] == "10.8.0.43"


def test_what_a_killed_deployer_asked_is_taken_away(client, running, model, target):
    client.create_deployment("linear", model, config=SAVED)
    _, repository = running
    name = "linear.host.check"
    for take_away in (
        lambda: client.update_deployment("linear", model, config={"device": "cpu"}),
        lambda: client.delete_deployment("linear"),
    ):
        HOST.write(repository / name)
        (repository / name / "tdeploy.json").write_text('{"files": {"config.pbtxt": ""}, "whole": false}')
        target.client.load(name)
        take_away()
        assert not (repository / name).exists()
        assert not target.client.ready(name)


def test_a_server_that_cannot_be_asked_says_why_and_what_to_do(client, running, model, tmp_path, monkeypatch):
    broken = tmp_path / "model.py"
    broken.write_text("raise RuntimeError('no such host')\n")
    monkeypatch.setattr(server_host, "HOST", replace(HOST, sources=(broken,)))
    with pytest.raises(MlflowException, match=r"(?s)no such host.*device=cpu or device=cuda"):
        client.create_deployment("linear", model, config=SAVED)
    assert not [path for path in running[1].iterdir() if path.is_dir()]
    assert client.create_deployment("linear", model, config={**SAVED, "device": "cpu"})["ready"]


@pytest.mark.parametrize("said", [b"{}", b"no json", b'{"os": 1}', b""])
def test_an_answer_that_is_none_is_an_error(said):
    with pytest.raises(ServerError, match="does not say what its host is"):
        fingerprint_of({"host": np.array([said], np.object_)}, "http://host:8000")
