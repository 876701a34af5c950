"""MLflow's own interface, on a real Triton and a registry in SQLite."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.triton import background
from mlflow_tdeploy.triton.client import Connection, TritonClient
from tests.bundles import WEIGHTS, make_bundle
from tests.core.text_assets import LABELS
from tests.flavor.text_bundles import embed, make_text_bundle
from tests.processes import program

SAVED = {"grace": 0}


@pytest.fixture
def words(tracking, tmp_path):
    """Two registered versions, the second with the alias champion."""
    for task in ("text-classification", "sentence-embedding"):
        made = make_text_bundle(tmp_path / task, task)
        mlflow_tdeploy.log_model(made, "words", registered_model_name="words")
    mlflow.MlflowClient().set_registered_model_alias("words", "champion", 2)


def test_a_registered_version_is_created_updated_rolled_back_and_deleted(client, words):
    made = client.create_deployment("words", "models:/words/1", config=SAVED)
    assert (made["name"], made["flavor"], made["version"], made["ready"]) == ("words", "tdeploy", 1, True)
    assert made["model_uri"] == "models:/words/1"
    answers = client.predict("words", ["cat", "a dog"])
    assert {one["label"] for one in answers["predictions"]} <= set(LABELS)
    assert set(answers["predictions"][0]) == {"label", "score"}
    with pytest.raises(MlflowException, match="deployed already") as caught:
        client.create_deployment("words", "models:/words@champion")
    assert caught.value.error_code == "RESOURCE_ALREADY_EXISTS"
    updated = client.update_deployment("words", "models:/words@champion", config=SAVED)
    assert (updated["version"], updated["previous"]) == (2, [1])
    vectors = client.predict("words", pd.DataFrame({"text": ["good"]}))["predictions"]
    np.testing.assert_allclose(vectors[0], embed("good"), rtol=1e-3)
    many = client.predict("words", ["good"] * 1030)
    assert many["predictions"].shape == (1030, vectors.shape[1])
    assert len(json.loads(many.to_json())["predictions"]) == 1030  # as mlflow deployments predict prints it
    assert client.update_deployment("words", "models:/words/2", config=SAVED)["deployed"] == updated["deployed"]
    assert client.update_deployment("words", config=SAVED)["version"] == 2
    assert client.rollback_deployment("words")["version"] == 1
    assert [one["name"] for one in client.list_deployments()] == ["words"]
    assert "ort-cpu-int8 (" in client.get_deployment("words")["decision"]
    client.delete_deployment("words")
    client.delete_deployment("words")
    assert client.list_deployments() == []
    for call in (
        lambda: client.get_deployment("words"),
        lambda: client.update_deployment("words", "models:/words/1"),
        lambda: client.predict("words", ["cat"]),
    ):
        with pytest.raises(MlflowException) as caught:
            call()
        assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_predict_over_every_protocol_takes_params_and_a_version(client, words, running, monkeypatch):
    client.create_deployment("words", "models:/words/1", config=SAVED)
    for uri in (f"tdeploy://127.0.0.1:{running[0].http}", f"tdeploy://127.0.0.1:{running[0].grpc}?protocol=grpc"):
        asked = get_deploy_client(uri)
        best = asked.predict("words", ["cat"], params={"top_k": 2}, version=1)["predictions"]
        assert len(best[0]) == 2
        with pytest.raises(MlflowException, match="Unknown parameter 'topk'") as caught:
            asked.predict("words", ["cat"], params={"topk": 2})
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
        with pytest.raises(MlflowException, match="no deployment 'words' version 9"):
            asked.predict("words", ["cat"], version=9)
        for sent in (b"cat", [b"cat"], np.array([b"cat"], object), {"text": np.array([b"cat"])}):
            assert asked.predict("words", sent, params={"top_k": 2})["predictions"] == best
        ids = {name: [[2, 3, 4]] for name in ("input_ids", "attention_mask")}
        with pytest.raises(MlflowException, match="has 'text' or the graph's own tensors, not both"):
            asked.predict("words", {"text": ["cat"], **ids})
        assert asked.predict("words", ids)["predictions"]["logits"].shape == (1, 3)


def test_arrays_are_asked_for_by_name_as_table_or_alone(client, tmp_path):
    client.create_deployment("linear", str(make_bundle(tmp_path / "model")), config={**SAVED, "version": "3"})
    x = [[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 1.0]]
    expected = np.array(x, np.float32) @ WEIGHTS
    for inputs in ({"x": x}, np.array(x), pd.DataFrame({"x": x}), x):
        np.testing.assert_allclose(client.predict("linear", inputs)["predictions"]["y"], expected, rtol=1e-6)
    assert client.get_deployment("linear")["version"] == 3
    assert client.update_deployment("linear", config=SAVED)["version"] == 3  # it is the same model
    with pytest.raises(MlflowException, match="has no input 'z'"):
        client.predict("linear", {"z": x})
    with pytest.raises(MlflowException, match="cannot be made an array of float32"):
        client.predict("linear", {"x": ["a"]})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"instance": 2}, r"Unknown key 'instance'. Known: version, keep, .*config_file, instances, .*parameters.NAME"),
        ({"keep": -1}, "'keep' must not be negative"),
        ({"grace": "soon"}, "'grace' is a number of seconds"),
        ({"device": "tpu"}, "'device' must be cpu or cuda"),
        ({"config_file": "none.yaml"}, "There is no file 'none.yaml'"),
        ({"variant": "none"}, "Unknown variant 'none'"),
        ({"device": "cpu", "runtime": "ort-cuda"}, "No variant of this model can serve"),
        ({"device": "cuda", "runtime": "ort-cuda"}, "has kind KIND_GPU but no GPUs are available"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(client, words, config, says):
    with pytest.raises(MlflowException, match=says):
        client.create_deployment("words", "models:/words/1", config=config)
    assert client.list_deployments() == []


def test_a_choice_that_was_saved_with_the_model_counts(client, tracking, tmp_path, monkeypatch):
    made = make_text_bundle(tmp_path / "made")
    saved = {"variant": "onnx-fp32"}
    mlflow_tdeploy.log_model(made, "words", registered_model_name="chosen", model_config=saved)
    assert client.create_deployment("a", "models:/chosen/1", config=SAVED)["variant"] == "onnx-fp32"
    said = {**SAVED, "variant": "ort-cpu-int8"}
    assert client.create_deployment("b", "models:/chosen/1", config=said)["variant"] == "ort-cpu-int8"
    monkeypatch.setenv("TDEPLOY_VARIANT", "ort-cpu-int8")
    assert client.create_deployment("c", "models:/chosen/1", config=SAVED)["variant"] == "ort-cpu-int8"


def test_names_that_are_no_folders_are_refused(client, words):
    for name in ("a/b", "..", "m.v7"):
        with pytest.raises(MlflowException, match="Invalid deployment name") as caught:
            client.create_deployment(name, "models:/words/1")
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
        with pytest.raises(MlflowException, match="Invalid deployment name"):
            client.predict(name, ["cat"])
        with pytest.raises(MlflowException, match="Invalid deployment name"):
            client.delete_deployment(name)


def test_options_come_from_a_file_and_from_who_calls(client, words, tmp_path):
    (tmp_path / "serving.yaml").write_text("instances: 2\nmax_batch_size: 2\nparameters:\n  enable_mem_arena: 0\n")
    client.create_deployment(
        "words", "models:/words/1", config={"config_file": str(tmp_path / "serving.yaml"), "instances": "1"}
    )
    config = client._client.config("words.v1")
    assert int(config["max_batch_size"]) == 2
    assert int(config["instance_group"][0]["count"]) == 1
    assert config["parameters"]["enable_mem_arena"]["string_value"] == "0"
    texts = ["cat", "a dog", "good", "bad", "a cat"]  # the front makes batches of two
    assert len(client.predict("words", texts)["predictions"]) == len(texts)
    (tmp_path / "serving.yaml").write_text("- a\n")
    with pytest.raises(MlflowException, match="must hold keys and values"):
        client.update_deployment("words", "models:/words/2", config={"config_file": str(tmp_path / "serving.yaml")})


def test_other_flavors_and_endpoints_are_refused(client, words):
    with pytest.raises(MlflowException, match="deploys the flavors tdeploy, onnx, triton, got 'sklearn'"):
        client.create_deployment("words", "models:/words/1", flavor="sklearn")
    for call in (
        client.list_endpoints,
        lambda: client.create_endpoint("e"),
        lambda: client.get_endpoint("e"),
        lambda: client.update_endpoint("e"),
        lambda: client.delete_endpoint("e"),
        lambda: client.predict(endpoint="e"),
        lambda: client.create_deployment("w", "models:/words/1", endpoint="e"),
    ):
        with pytest.raises(MlflowException, match="has no endpoints") as caught:
            call()
        assert caught.value.error_code == "NOT_IMPLEMENTED"


def test_without_a_repository_only_predict_works(client, words, monkeypatch):
    client.create_deployment("words", "models:/words/1", config=SAVED)
    repository = os.environ["TRITON_MODEL_REPO"]
    monkeypatch.delenv("TRITON_MODEL_REPO")
    with pytest.raises(MlflowException, match="set TRITON_MODEL_REPO, or use a target such as"):
        client.list_deployments()
    assert client.predict("words", ["cat"])["predictions"]
    monkeypatch.setenv("TRITON_MODEL_REPO", repository)


@pytest.mark.parametrize(
    "target", ["tdeploy://h:x", "tdeploy://h/path", "tdeploy://h?repo=/x", "tdeploy://h?protocol=ftp"]
)
def test_a_target_that_is_none_is_refused(target):
    with pytest.raises(MlflowException) as caught:
        get_deploy_client(target)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def run(*arguments, **more):
    command = [sys.executable, "-m", "mlflow", "deployments", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


@pytest.mark.slow
def test_mlflows_command_line_does_all_of_it(client, words, tmp_path):
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_tracking_uri(),
    }
    given = {"env": environment, "cwd": tmp_path}
    done = run("create", "-t", "tdeploy", "--name", "words", "-m", "models:/words/1", "-C", "grace=0", **given)
    assert "tdeploy deployment words is created" in done.stdout, done.stderr
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "cat"}, {"text": "dog"}]))
    done = run("predict", "-t", "tdeploy", "--name", "words", "-I", "texts.json", **given)
    assert len(json.loads(done.stdout)["predictions"]) == 2, done.stderr
    assert "is updated" in run("update", "-t", "tdeploy", "--name", "words", "-m", "models:/words/2", **given).stdout
    assert "'version': 2" in run("get", "-t", "tdeploy", "--name", "words", **given).stdout.replace(
        "version: 2", "'version': 2"
    )
    assert "words" in run("list", "-t", "tdeploy", **given).stdout
    assert "is deleted" in run("delete", "-t", "tdeploy", "--name", "words", **given).stdout
    assert "TRITON_MODEL_REPO" in run("help", "-t", "tdeploy", **given).stdout


@pytest.mark.slow
def test_run_local_serves_until_it_is_interrupted(server, words, tmp_path):
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_tracking_uri(),
    }
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "deployments",
        "run-local",
        "-t",
        "tdeploy",
        "--name",
        "words",
        "-m",
        "models:/words/1",
    ]
    with program(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        said = process.stdout.readline()
        url = said.split(" answers at ")[1].split("/v2/")[0]
        assert get_deploy_client(url.replace("http", "tdeploy")).predict("words", ["cat"])["predictions"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    time.sleep(0.2)
    assert not [path for path in Path("/dev/shm").iterdir() if path.name.startswith(f"tdeploy-{process.pid}-")]


def test_render_writes_a_repository(words, tmp_path):
    result = CliRunner().invoke(
        main, ["render", "models:/words@champion", "--out", str(tmp_path / "out"), "-C", "instances=3"]
    )
    assert result.exit_code == 0, result.output
    assert "variant    ort-cpu-int8: ort-cpu-int8 (fused for the CPU)" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["words", "words.v2"]
    assert "count: 3" in (tmp_path / "out/words.v2/config.pbtxt").read_text()
    again = CliRunner().invoke(main, ["render", "models:/words/1", "--out", str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "not empty" in again.output or "exists" in again.output
    wrong = CliRunner().invoke(main, ["render", "models:/words/1", "--out", str(tmp_path / "new"), "-C", "instances"])
    assert "not of the form key=value" in wrong.output
    assert not (tmp_path / "new").exists()


def test_of_a_server_started_here_the_repository_and_the_log_are_known(server, tracking, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_MODEL_REPO", raising=False)
    monkeypatch.delenv("TRITON_URL", raising=False)
    (tmp_path / "models").mkdir()
    started = background.start(tmp_path / "models")
    try:
        client = get_deploy_client(f"tdeploy://127.0.0.1:{started.http}")
        model = make_bundle(tmp_path / "made")
        made = client.create_deployment("m", str(model), config=SAVED)
        assert (made["ready"], made["repository"]) == (True, str(tmp_path / "models"))
        assert client.predict("m", {"x": np.ones((1, 4), np.float32)})["predictions"]
        monkeypatch.setattr(Connection, "address", f"127.0.0.1:{started.grpc + 1}")
        with pytest.raises(MlflowException, match="Nobody says where the server's model repository is"):
            client.list_deployments()
    finally:
        background.stop(started)


def test_one_answer_is_of_one_version_though_another_comes_meanwhile(client, words, monkeypatch):
    """Many texts go in several requests; between two of them the version changes, and with it the task."""
    client.create_deployment("words", "models:/words/1", config=SAVED)
    client.update_deployment("words", "models:/words/2", config=SAVED)
    real, asked = TritonClient.infer, []

    def infer(self, model, *arguments, **named):
        if len(asked) == 1:
            asked.append("switched")
            client.rollback_deployment("words")
        asked.append(model)
        return real(self, model, *arguments, **named)

    monkeypatch.setattr(TritonClient, "infer", infer)
    answers = client.predict("words", ["cat"] * 2500)["predictions"]
    assert len(answers) == 2500
    assert {one["label"] for one in answers} <= set(LABELS)
    assert "switched" in asked


def test_an_alias_that_moves_meanwhile_is_followed_once(client, words, monkeypatch):
    from mlflow_tdeploy.deploy import choose

    real, registry = choose.locate, mlflow.MlflowClient()

    def locate(uri):
        registry.set_registered_model_alias("words", "champion", 1)
        return real(uri)

    monkeypatch.setattr(choose, "locate", locate)
    made = client.create_deployment("words", "models:/words@champion", config=SAVED)
    assert (made["version"], made["model_uri"]) == (2, "models:/words/2")
    assert client.predict("words", ["good"])["predictions"].shape[0] == 1  # an embedding


def test_a_deployment_that_is_damaged_is_left_out_of_the_list(client, words, running):
    for name in ("words", "others"):
        client.create_deployment(name, "models:/words/1", config=SAVED)
    config = running[1] / "others.v1" / "config.pbtxt"
    whole = config.read_bytes()
    config.write_bytes(b"garbage: 1")
    assert [one["name"] for one in client.list_deployments()] == ["words"]
    config.write_bytes(whole)


@pytest.mark.parametrize("version", [True, -1])
def test_a_version_that_is_none_is_refused(client, words, version):
    client.create_deployment("words", "models:/words/1", config=SAVED)
    with pytest.raises(MlflowException, match="A version is a whole number"):
        client.predict("words", ["cat"], version=version)
    with pytest.raises(MlflowException, match="no valid Unicode"):
        client.predict("words", ["\ud800"])


@pytest.mark.slow
def test_what_was_said_once_counts_for_later_versions(client, words, running, tmp_path):
    def queue(version):
        return "max_queue_size: 7" in (running[1] / f"words.v{version}" / "config.pbtxt").read_text()

    said = {**SAVED, "max_queue_size": "7", "variant": "onnx-fp32"}
    made = client.create_deployment("words", "models:/words/1", config=said)
    assert made["config"] == {**said, "grace": 0}
    assert client.update_deployment("words")["deployed"] == made["deployed"]  # nothing to do
    updated = client.update_deployment("words", "models:/words/2")
    assert (updated["variant"], queue(1), queue(2)) == ("onnx-fp32", True, True)
    (tmp_path / "serving.yaml").write_text("variant: ''\nmax_queue_size: 0\n")
    client.delete_deployment("words")
    client.create_deployment("words", "models:/words/1", config=said)
    lifted = client.update_deployment(
        "words", "models:/words/2", config={"config_file": str(tmp_path / "serving.yaml")}
    )
    assert (lifted["variant"], queue(2)) == ("ort-cpu-int8", False)
    assert lifted["config"]["max_queue_size"] == 0


def test_what_is_said_to_the_version_that_answers_counts_for_the_next(client, words):
    made = client.create_deployment("words", "models:/words/1", config=SAVED)
    assert client.update_deployment("words", config={"keep": 0})["config"] == {"grace": 0, "keep": 0}
    again = client.get_deployment("words")
    assert (again["deployed"], again["version"], again["ready"]) == (made["deployed"], 1, True)
    updated = client.update_deployment("words", "models:/words/2")
    assert (updated["version"], updated["previous"]) == (2, [])
    assert client.update_deployment("words", config={"keep": 3})["config"]["keep"] == 3


def test_an_answer_is_a_table_too(client, tmp_path):
    client.create_deployment("linear", str(make_bundle(tmp_path / "model")), config=SAVED)
    answer = client.predict("linear", np.ones((2, 4), np.float32))
    table = answer.get_predictions()
    np.testing.assert_allclose(np.stack(table["y"]), np.ones((2, 4), np.float32) @ WEIGHTS, rtol=1e-5)


def test_copies_stay_whichever_host_updates(client, words, monkeypatch):
    from mlflow_tdeploy.runtime import probe

    made = client.create_deployment("words", "models:/words/1", config={**SAVED, "device": "cpu"})
    here = probe.host()
    monkeypatch.setattr(probe, "host", lambda: dataclasses.replace(here, cores=1))
    assert client.update_deployment("words", "models:/words/1")["deployed"] == made["deployed"]


def test_another_registered_model_takes_over_a_name_under_a_number_of_its_own(client, words, tmp_path):
    client.create_deployment("words", "models:/words/1", config=SAVED)
    mlflow_tdeploy.log_model(make_text_bundle(tmp_path / "m", "sentence-embedding"), "m", registered_model_name="other")
    with pytest.raises(MlflowException, match=r"under another number \(version=2\)"):
        client.update_deployment("words", "models:/other/1")
    updated = client.update_deployment("words", "models:/other/1", config={"version": 2})
    assert (updated["version"], updated["previous"], updated["model_uri"]) == (2, [1], "models:/other/1")
    assert client.rollback_deployment("words")["model_uri"] == "models:/words/1"


def test_a_folder_is_remembered_wherever_it_was_named_from(client, tmp_path, monkeypatch):
    make_bundle(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    made = client.create_deployment("linear", "model", config=SAVED)
    monkeypatch.chdir("/")
    assert client.update_deployment("linear")["deployed"] == made["deployed"]


def test_an_update_of_what_has_lost_its_graph_asks_for_a_model(client, running, tmp_path):
    client.create_deployment("linear", str(make_bundle(tmp_path / "model")), config=SAVED)
    graph = running[1] / "linear.v1"
    kept = {path: path.read_bytes() for path in graph.rglob("*") if path.is_file()}
    for path in kept:
        path.unlink()
    try:
        with pytest.raises(MlflowException, match="its graph is gone from the repository. Say a model") as caught:
            client.update_deployment("linear")
        assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_versions_are_kept_on_disk_where_that_is_said(client, words):
    client.create_deployment("words", "models:/words/1", config={**SAVED, "keep_loaded": "false"})
    updated = client.update_deployment("words", "models:/words/2")
    assert (updated["previous"], updated["loaded"]) == ([1], [2])
    back = client.rollback_deployment("words")
    assert (back["version"], back["ahead"], back["loaded"], back["ready"]) == (1, [2], [1], True)
    assert "label" in client.predict("words", ["cat"])["predictions"][0]


def test_what_is_lifted_is_not_remembered(client, tmp_path):
    uri = str(make_bundle(tmp_path / "model"))
    client.create_deployment("linear", uri, config={**SAVED, "variant": "onnx-fp32"})
    assert client.update_deployment("linear", uri, config={"variant": ""})["config"] == {"grace": 0}


def test_a_version_under_another_number_is_found_again_by_it(client, words):
    made = client.create_deployment("words", "models:/words/1", config={**SAVED, "version": 10})
    assert made["version"] == 10
    for uri in (None, "models:/words/1"):
        again = client.update_deployment("words", uri, config={"keep": 2})
        assert (again["version"], again["deployed"]) == (10, made["deployed"])


TASKS = ("sentence-embedding", "text-classification", "feature-extraction")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("batch", "said"), [((1, 2, 4), {"batching": "false", "max_batch_size": ""}), ((4, 4, 4), {})])
def test_texts_are_answered_where_the_graph_joins_no_requests(client, running, tmp_path, task, batch, said):
    """Where that is switched off, and where the graph's number of rows is fixed."""
    uri = str(make_text_bundle(tmp_path / "m", task, batch=batch))
    client.create_deployment("m", uri, config={**SAVED, **said})
    assert int(client._client.config("m.v1").get("max_batch_size", 0)) == 0
    texts = ["cat", "a dog", "good", "bad", "a cat"]
    expected = mlflow_tdeploy.load_model(uri).predict(texts)
    for target in (f"tdeploy://127.0.0.1:{running[0].http}", f"tdeploy://127.0.0.1:{running[0].grpc}?protocol=grpc"):
        got = get_deploy_client(target).predict("m", texts)["predictions"]
        for one, other in zip(expected, got, strict=True):
            if task == "text-classification":
                assert one["label"] == other["label"]
            else:
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_size_that_was_said_of_another_model_counts_as_far_as_it_can(client, tmp_path):
    first = str(make_text_bundle(tmp_path / "wide", batch=(1, 2, 16)))
    client.create_deployment("m", first, config={**SAVED, "max_batch_size": 8})
    client.update_deployment("m", str(make_text_bundle(tmp_path / "narrow", "text-classification")))
    assert int(client._client.config("m.v2")["max_batch_size"]) == 4
    with pytest.raises(MlflowException, match="beyond the signature"):
        client.update_deployment("m", first, config={"max_batch_size": 32})
