from __future__ import annotations

import importlib.util

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.registry_io.index import tag_logged_model
from tests.bundles import WEIGHTS, linear_graph
from tests.flavor.text_bundles import embed, make_text_bundle


@pytest.fixture
def made(tmp_path):
    """A finished bundle of sentence embeddings."""
    return make_text_bundle(tmp_path / "made")


@pytest.mark.parametrize("kind", ["runs", "version", "alias", "model id"])
def test_log_model_round_trips_over_every_kind_of_uri(tracking, made, kind):
    with mlflow.start_run() as run:
        info = mlflow_tdeploy.log_model(made, "words", registered_model_name="registered")
    MlflowClient().set_registered_model_alias("registered", "champion", "1")
    uri = {
        "runs": f"runs:/{run.info.run_id}/words",
        "version": "models:/registered/1",
        "alias": "models:/registered@champion",
        "model id": info.model_uri,
    }[kind]
    expected = embed("good film")
    np.testing.assert_allclose(mlflow.pyfunc.load_model(uri).predict(["good film"])[0], expected, rtol=1e-3)
    with mlflow_tdeploy.load_model(uri) as model:
        np.testing.assert_allclose(model.predict("good film")[0], expected, rtol=1e-3)


def test_log_model_returns_mlflows_description(tracking, made):
    with mlflow.start_run() as run:
        info = mlflow_tdeploy.log_model(
            made, name="words", registered_model_name="registered", metadata={"team": "search"}
        )
    assert info.run_id == run.info.run_id
    assert info.registered_model_version == 1
    assert info.metadata == {"team": "search"}
    assert set(info.flavors) == {"python_function", "tdeploy"}
    assert info.signature.params is not None
    assert mlflow.models.get_model_info(info.model_uri).model_id == info.model_id


def test_log_model_passes_on_what_describes_the_logged_model(tracking, made):
    with mlflow.start_run():
        info = mlflow_tdeploy.log_model(
            made, name="words", params={"alpha": 3}, tags={"stage": "dev"}, model_type="embedder", step=np.int64(4)
        )
    model = MlflowClient().get_logged_model(info.model_id)
    assert model.params["alpha"] == "3"
    assert model.tags["stage"] == "dev"
    assert model.model_type == "embedder"
    assert model.status == LoggedModelStatus.READY
    run = mlflow.get_run(info.run_id)
    assert [(output.model_id, output.step) for output in run.outputs.model_outputs] == [(info.model_id, 4)]


def test_log_model_works_without_a_run_and_keeps_its_evidence(tracking, made):
    info = mlflow_tdeploy.log_model(made, name="words")
    model = MlflowClient().get_logged_model(info.model_id)
    assert model.source_run_id is None
    assert {metric.key: metric.value for metric in model.metrics}["ort-cpu-int8.worst_cosine"] == 1.0
    assert model.tags["tdeploy.precisions"] == "fp32,int8"
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.run_name == "words evidence"
    assert run.info.status == "FINISHED"


def test_log_model_logs_into_an_existing_logged_model(tracking, made):
    model = mlflow.initialize_logged_model(name="prepared")
    info = mlflow_tdeploy.log_model(made, model_id=model.model_id)
    assert info.model_id == model.model_id
    assert mlflow.pyfunc.load_model(f"models:/{model.model_id}").predict(["good"]).shape == (1, 4)


def test_log_model_takes_the_deprecated_artifact_path_and_refuses_both(tracking, made):
    with mlflow.start_run() as run:
        mlflow_tdeploy.log_model(made, artifact_path="words")
        assert mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/words")
        with pytest.raises(MlflowException, match="Both `artifact_path`"):
            mlflow_tdeploy.log_model(made, name="words", artifact_path="words")


def test_log_model_checks_the_input_example_by_serving_it(tracking, made, monkeypatch):
    from mlflow.models import utils

    seen = []
    real = utils._validate_serving_input
    monkeypatch.setattr(utils, "_validate_serving_input", lambda **given: seen.append(real(**given)))
    mlflow_tdeploy.log_model(made, name="words", input_example=["good film"])
    np.testing.assert_allclose(seen[0][0], embed("good film"), rtol=1e-3)
    mlflow_tdeploy.log_model(made, name="words", input_example=["good film"], validate_serving_input=False)
    assert len(seen) == 1


def test_log_model_marks_the_logged_model_as_failed_and_registers_nothing_when_saving_fails(tracking, made):
    (made / "tdeploy" / "files" / "onnx-fp32" / "model.onnx").write_bytes(b"truncated")
    with pytest.raises(MlflowException, match="onnx-fp32/model.onnx"):
        mlflow_tdeploy.log_model(made, name="words", registered_model_name="registered")
    (model,) = mlflow.search_logged_models(output_format="list")
    assert model.status == LoggedModelStatus.FAILED
    assert not MlflowClient().search_registered_models()


def test_log_model_creates_no_logged_model_when_a_parameter_is_wrong(tracking, made):
    with pytest.raises(MlflowException, match="'temperature'"):
        mlflow_tdeploy.log_model(made, name="words", model_config={"temperature": 1})
    with pytest.raises(MlflowException, match="on_budget"):
        mlflow_tdeploy.log_model(made, name="words", on_budget="ignore")
    assert not mlflow.search_logged_models(output_format="list")


def test_log_model_warns_and_keeps_the_model_when_tags_cannot_be_written(tracking, made, monkeypatch, caplog):
    def broken(*_, **__):
        raise ConnectionError("no connection")

    monkeypatch.setattr("mlflow_tdeploy.flavor.log.tag_logged_model", broken)
    info = mlflow_tdeploy.log_model(made, name="words")
    assert "no connection" in caplog.text
    assert mlflow.pyfunc.load_model(info.model_uri).predict(["good"]).shape == (1, 4)


EVIDENCE = "ort-cpu-int8.worst_cosine"


def test_two_models_of_one_run_keep_apart(tracking, made, tmp_path):
    other = make_text_bundle(tmp_path / "other", failed=("ort-cpu-int8",))
    with mlflow.start_run():
        first = mlflow_tdeploy.log_model(made, name="first")
        second = mlflow_tdeploy.log_model(other, name="second")
    values = [
        [metric.value for metric in MlflowClient().get_logged_model(info.model_id).metrics if metric.key == EVIDENCE]
        for info in (first, second)
    ]
    assert values == [[1.0], [0.9]]
    found = mlflow.search_logged_models(filter_string=f"metrics.`{EVIDENCE}` > 0.95", output_format="list")
    assert [model.name for model in found] == ["first"]


def test_log_model_uses_an_iterator_of_precisions_twice(tracking, tmp_path):
    """It is looked at before the logged model is made, and again when variants are."""
    linear_graph(tmp_path / "graph.onnx", np.asarray(WEIGHTS))
    info = mlflow_tdeploy.log_model(
        str(tmp_path / "graph.onnx"),
        name="graph",
        task="tensors",
        shapes={"batch": (1, 2, 8)},
        precisions=(name for name in ["fp32"]),
    )
    with mlflow_tdeploy.load_model(info.model_uri) as model:
        assert sorted(model.variants) == ["onnx-fp32", "ort-cpu-fp32"]


def test_log_model_serves_no_graph_that_answers_a_multiple(tracking, tmp_path):
    """Its answers point the same way, so a cosine alone would call it as good as the original."""
    for name, factor in (("onnx-fp32", 1), ("onnx-tripled", 3)):
        linear_graph(tmp_path / f"{name}.onnx", factor * np.asarray(WEIGHTS))
    paths = {name: str(tmp_path / f"{name}.onnx") for name in ("onnx-fp32", "onnx-tripled")}
    info = mlflow_tdeploy.log_model(paths, name="graphs", task="tensors", shapes={"batch": (1, 2, 8)})
    with mlflow_tdeploy.load_model(info.model_uri) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert "max_norm_difference is 2 (budget max_norm_difference <= 0.1)" in model.decision.explain()


def test_log_model_refuses_a_name_that_cannot_be_registered_before_anything_is_logged(tracking, made):
    for name in ("a/b:c", ""):
        with pytest.raises(MlflowException, match="name") as caught:
            mlflow_tdeploy.log_model(made, "words", registered_model_name=name)
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert mlflow.search_logged_models(output_format="list") == []


def test_a_model_that_could_not_be_registered_is_found_by_its_variants(tracking, made, monkeypatch):
    def refuse(*args, **kwargs):
        raise MlflowException("The registry is not reachable.")

    monkeypatch.setattr("mlflow.tracking._model_registry.fluent._register_model", refuse)
    monkeypatch.setattr("mlflow.models.model._register_model", refuse, raising=False)
    with pytest.raises(MlflowException, match="not reachable"):
        mlflow_tdeploy.log_model(made, "words", registered_model_name="words")
    (model,) = mlflow.search_logged_models(
        filter_string="tags.`tdeploy.variant.ort-cpu-int8` = 'ok'", output_format="list"
    )
    assert model.status == LoggedModelStatus.READY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conda_env": "nope.yaml"}, "conda_env: there is no file 'nope.yaml'"),
        ({"metadata": {"a": object()}}, "metadata must be a mapping of plain values"),
        ({"metadata": "abc"}, "metadata must be a mapping"),
        ({"model_config": ["a"]}, "model_config must be a mapping or the path"),
    ],
)
def test_log_model_refuses_packaging_that_cannot_be_before_anything_is_logged(tracking, made, arguments, message):
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.log_model(made, "words", **arguments)
    assert mlflow.search_logged_models(output_format="list") == []


@pytest.mark.parametrize("model", [None, 5, {}, "no/such/folder.onnx", {"hf": "x.onnx"}])
def test_log_model_creates_no_logged_model_when_the_model_is_none(tracking, model):
    with pytest.raises(MlflowException):
        mlflow_tdeploy.log_model(model, name="words", task="tensors")
    assert not mlflow.search_logged_models(output_format="list")


@pytest.mark.parametrize("given", [{"tags": ["a"]}, {"params": "lr"}])
def test_log_model_refuses_tags_and_params_that_are_no_mappings(tracking, made, given):
    with pytest.raises(MlflowException, match="mappings from name to value"):
        mlflow_tdeploy.log_model(made, name="words", **given)


def test_evidence_is_at_a_step_that_no_model_has(tracking, made):
    with mlflow.start_run() as run:
        for step in (10, 20):
            info = mlflow_tdeploy.log_model(made, name=f"words-{step}", step=step)
    tag_logged_model(info.model_id, {}, {"onnx-fp32.worst_cosine": 0.5})  # as what is added later
    history = MlflowClient().get_metric_history(run.info.run_id, "onnx-fp32.worst_cosine")
    assert [metric.step for metric in history] == [-1, -1, -1]
    assert MlflowClient().get_run(run.info.run_id).data.metrics["onnx-fp32.worst_cosine"] == 0.5


def test_log_model_says_so_when_the_artifact_stores_disk_is_full(tracking, made, small_disk):
    (small_disk / "filler").write_bytes(bytes(1 << 20)[: (1 << 20) - 40_000])
    experiment = mlflow.create_experiment("small", artifact_location=str(small_disk / "artifacts"))
    mlflow.set_experiment(experiment_id=experiment)
    with pytest.raises(MlflowException, match="The disk is full.*the model was not logged.*marked as failed") as caught:
        mlflow_tdeploy.log_model(made, name="words")
    assert caught.value.error_code == "IO_ERROR"
    (model,) = mlflow.search_logged_models([experiment], output_format="list")
    assert model.status == LoggedModelStatus.FAILED


@pytest.mark.parametrize(
    ("module", "extra"), [("onnxscript", "build"), ("onnxruntime", "cpu,build"), ("torch", "build")]
)
def test_log_model_says_at_once_what_is_not_installed(tracking, tmp_path, monkeypatch, module, extra):
    linear_graph(tmp_path / "linear.onnx", WEIGHTS)
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == module else real(name, *a))
    with pytest.raises(MlflowException, match=rf"'{module}', which is not installed.*mlflow-tdeploy\[{extra}\]"):
        mlflow_tdeploy.log_model(str(tmp_path / "linear.onnx"), name="linear")


def test_log_model_leaves_no_logged_model_under_way_when_it_is_interrupted(tracking, tmp_path):
    linear_graph(tmp_path / "linear.onnx", WEIGHTS)

    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlflow_tdeploy.log_model(str(tmp_path / "linear.onnx"), name="linear", progress=interrupt)
    (model,) = mlflow.search_logged_models(output_format="list")
    assert model.status == LoggedModelStatus.FAILED
