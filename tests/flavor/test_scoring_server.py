"""MLflow's scoring server: its own application, and the real command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from mlflow.pyfunc import scoring_server

import mlflow_tdeploy
from tests.bundles import WEIGHTS, make_bundle
from tests.flavor.text_bundles import embed, make_text_bundle
from tests.test_bootstrap import metadata  # noqa: F401 - a fixture

TEXTS = ["good film", "bad"]
FORMATS = {
    "inputs": {"inputs": TEXTS},
    "instances": {"instances": TEXTS},
    "dataframe_split": {"dataframe_split": {"columns": ["text"], "data": [[text] for text in TEXTS]}},
    "dataframe_records": {"dataframe_records": [{"text": text} for text in TEXTS]},
    "split with an id": {"dataframe_split": {"columns": ["id", "text"], "data": [["7", text] for text in TEXTS]}},
    "records with an id": {"dataframe_records": [{"id": "7", "text": text} for text in TEXTS]},
    "instances with an id": {"instances": [{"id": "7", "text": text} for text in TEXTS]},
    "inputs with an id": {"inputs": [{"id": "7", "text": text} for text in TEXTS]},
    "inputs by name": {"inputs": {"text": TEXTS}},
    "another name": {"dataframe_records": [{"review": text} for text in TEXTS]},
}


@pytest.fixture
def client(tmp_path):
    """Return a function that serves the hand-made model of a task."""

    def make(task) -> TestClient:
        made = make_text_bundle(tmp_path / "made", task) if task != "tensors" else make_bundle(tmp_path / "made")
        mlflow_tdeploy.save_model(made, tmp_path / "model")
        return TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(tmp_path / "model"))))

    return make


@pytest.mark.parametrize("form", FORMATS)
def test_the_server_answers_texts_in_every_format(client, form):
    answer = client("sentence-embedding").post("/invocations", json=FORMATS[form])
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(answer.json()["predictions"], [embed(text) for text in TEXTS], rtol=1e-3)


def test_the_server_answers_a_csv(client):
    headers = {"Content-Type": "text/csv"}
    answer = client("sentence-embedding").post("/invocations", content="text\ngood film\nbad\n", headers=headers)
    np.testing.assert_allclose(answer.json()["predictions"], [embed(text) for text in TEXTS], rtol=1e-3)


def test_the_server_takes_parameters(client):
    served = client("text-classification")
    one = served.post("/invocations", json={"inputs": TEXTS}).json()["predictions"]
    assert set(one[0]) == {"label", "score"}
    more = served.post("/invocations", json={"inputs": TEXTS, "params": {"top_k": 2}}).json()["predictions"]
    assert [len(answer) for answer in more] == [2, 2]
    assert [answer[0] for answer in more] == one
    forced = served.post("/invocations", json={"inputs": TEXTS, "params": {"variant": "onnx-fp32"}})
    assert forced.status_code == 200


def test_the_server_answers_features_and_tensors(client, tmp_path):
    features = client("feature-extraction").post("/invocations", json={"inputs": TEXTS}).json()["predictions"]
    assert [np.shape(answer) for answer in features] == [(1, 2, 4), (1, 1, 4)]
    mlflow_tdeploy.save_model(make_bundle(tmp_path / "linear"), tmp_path / "tensors")
    served = TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(tmp_path / "tensors"))))
    x = [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]]
    for body in ({"inputs": {"x": x}}, {"inputs": x}, {"instances": [{"x": row} for row in x]}):
        answer = served.post("/invocations", json=body)
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["predictions"]["y"], np.array(x) @ WEIGHTS, rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": []},
        {"dataframe_records": [{"text": None}]},
        {"inputs": ["a"], "params": {"variant": "none"}},
        {"inputs": ["a"], "params": {"top_k": "many"}},
        {"texts": ["a"]},
        {"inputs": ["lone surrogate \ud800"]},
        {"inputs": [["good", "bad", "film"]]},
        {"inputs": [5]},
        {"dataframe_records": [{"text": "good", "text_pair": None}]},
        {"dataframe_records": [{"text": "good", "text_pair": "bad"}, {"text": "good"}]},
        {"dataframe_records": [{"id": "7", "review": "good"}]},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_the_server_answers_400_when_the_request_is_wrong(client, body):
    content = json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = client("text-classification").post("/invocations", content=content, headers=headers)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [["good", "bad film"], ["bad", "good"]]},
        {"inputs": {"text": ["good", "bad"], "text_pair": ["bad film", "good"]}},
        {"inputs": [{"text": "good", "text_pair": "bad film"}, {"text": "bad", "text_pair": "good"}]},
        {"instances": [{"text": "good", "text_pair": "bad film"}, {"text": "bad", "text_pair": "good"}]},
        {"instances": [["good", "bad film"], ["bad", "good"]]},
        {"dataframe_split": {"columns": ["text_pair", "text"], "data": [["bad film", "good"], ["good", "bad"]]}},
        {"dataframe_records": [{"text": "good", "text_pair": "bad film"}, {"text": "bad", "text_pair": "good"}]},
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_the_server_takes_pairs_of_texts_in_every_form(client, body):
    server = client("text-classification")

    def answers(asked):
        answer = server.post("/invocations", json={**asked, "params": {"top_k": 0}})
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]

    pairs = [("good", "bad film"), ("bad", "good")]
    one_by_one = [answers({"inputs": [{"text": text, "text_pair": pair}]})[0] for text, pair in pairs]
    assert answers(body) == one_by_one
    assert one_by_one != answers({"inputs": ["good", "bad"]})


@pytest.mark.parametrize("task", ["text-classification", "sentence-embedding"])
def test_the_server_answers_null_for_what_cannot_be_used_in_json_that_anybody_reads(client, task):
    server = client(task)

    def answers(texts):
        answer = server.post("/invocations", json={"inputs": texts, "params": {"errors": "null"}})
        assert answer.status_code == 200, answer.text
        return json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["predictions"]

    gap = {"label": None, "score": None} if task == "text-classification" else None
    good, lost, bad = answers([{"text": "good"}, {"text": None}, {"text": "bad"}])
    assert [good, bad] == answers(["good", "bad"])
    assert lost == gap
    assert answers([{"text": None}]) == [gap]


@pytest.mark.slow
def test_the_real_command_serves_an_alias_by_the_scheme_with_one_variant(tracking, tmp_path, metadata):  # noqa: F811
    info = mlflow_tdeploy.log_model(make_text_bundle(tmp_path / "made"), "words", registered_model_name="served")
    MlflowClient().set_registered_model_alias("served", "champion", info.registered_model_version)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "tdeploy:/served@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{metadata}{os.pathsep}{Path(mlflow_tdeploy.__file__).parents[1]}",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _ready(f"http://127.0.0.1:{port}/ping", process, tmp_path / "log")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": TEXTS}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.load(answer)["predictions"]
        np.testing.assert_allclose(found, [embed(text) for text in TEXTS], rtol=1e-3)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _ready(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(480):
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            time.sleep(0.25)
    raise AssertionError(log.read_text(errors="replace")[-3000:])
