from __future__ import annotations

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.build.recipes import NothingWithinBudgetError
from mlflow_tdeploy.build.recipes.ort_cpu_int8_mixed import OrtCpuInt8Mixed
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, linear_graph, make_bundle

X = np.array([[1, 2, 3, 4]], np.float32)


@pytest.fixture(params=["tracking", "remote"])
def registered(request, tmp_path):
    """A registered version with one variant, in a local store and behind a server."""
    request.getfixturevalue(request.param)
    return mlflow_tdeploy.log_model(make_bundle(tmp_path / "made"), "linear", registered_model_name="extended")


def test_extend_model_adds_a_ready_made_graph_that_serves_in_that_version(registered, tmp_path):
    linear_graph(tmp_path / "own.onnx", WEIGHTS * np.float32(1.001))
    uri = f"models:/extended/{registered.registered_model_version}"
    (added,) = mlflow_tdeploy.extend_model(uri, variants={"own-fp32": tmp_path / "own.onnx"})
    assert added.id == "own-fp32"
    model = mlflow.pyfunc.load_model(uri, model_config={"variant": "own-fp32"})
    np.testing.assert_allclose(model.predict({"x": X})["y"], X @ WEIGHTS * 1.001, rtol=1e-5)
    tags = MlflowClient().get_logged_model(registered.model_id).tags
    assert tags["tdeploy.variants"] == "onnx-fp32,own-fp32"
    assert tags["tdeploy.variant.own-fp32"] == "ok"


def test_extend_model_makes_a_variant_by_its_precision(registered):
    (added,) = mlflow_tdeploy.extend_model(registered.model_uri, precisions=["fp16"])
    assert added.precision.name == "fp16"
    assert added.parent == "onnx-fp32"
    with mlflow_tdeploy.load_model(registered.model_uri, variant=added.id) as model:
        np.testing.assert_allclose(model.infer({"x": X})["y"], X @ WEIGHTS, rtol=1e-2)


def test_extend_model_knows_the_names_that_log_model_knows(registered):
    with pytest.raises(
        MlflowException, match="Unknown precision or variant 'int3'. Precisions: auto, fp16, fp32, int8"
    ):
        mlflow_tdeploy.extend_model(registered.model_uri, precisions=["int3"])


def test_extend_model_records_a_variant_over_budget_without_its_files(registered, tmp_path):
    linear_graph(tmp_path / "bad.onnx", -WEIGHTS)
    (added,) = mlflow_tdeploy.extend_model(registered.model_uri, variants={"bad": tmp_path / "bad.onnx"})
    assert added.dropped
    with pytest.raises(MlflowException, match="refused and its files were not kept; log the model again with a wider"):
        mlflow_tdeploy.extend_model(registered.model_uri, variants={"bad": tmp_path / "bad.onnx"})
    with pytest.raises(MlflowException, match="over budget"):
        mlflow_tdeploy.load_model(registered.model_uri, variant="bad")
    assert MlflowClient().get_logged_model(registered.model_id).tags["tdeploy.variant.bad"] == "over budget"


def test_extend_model_adds_nothing_when_over_budget_is_an_error(registered, tmp_path):
    linear_graph(tmp_path / "bad.onnx", -WEIGHTS)
    with pytest.raises(MlflowException, match="over the model's budget") as caught:
        mlflow_tdeploy.extend_model(registered.model_uri, variants={"bad": tmp_path / "bad.onnx"}, on_budget="raise")
    assert caught.value.error_code == "INVALID_STATE"
    assert list(Bundle.open(mlflow.artifacts.download_artifacts(registered.model_uri)).variants) == ["onnx-fp32"]


def test_what_was_added_before_a_failure_is_found_by_its_tags(registered, tmp_path):
    linear_graph(tmp_path / "own.onnx")
    linear_graph(tmp_path / "bad.onnx", -WEIGHTS)
    variants = {"own": tmp_path / "own.onnx", "bad": tmp_path / "bad.onnx"}
    with pytest.raises(MlflowException, match="over the model's budget"):
        mlflow_tdeploy.extend_model(registered.model_uri, variants=variants, on_budget="raise")
    assert "own" in MlflowClient().get_logged_model(registered.model_id).tags["tdeploy.variants"].split(",")


def test_a_search_that_finds_nothing_stops_no_other_and_is_in_mlflow(registered, tmp_path, caplog, monkeypatch):
    linear_graph(tmp_path / "own.onnx")

    def nothing(recipe, context):
        raise NothingWithinBudgetError("too far off", [{"what": "a", "passed": False}], Budget.of("worst_cosine >= 1"))

    monkeypatch.setattr(OrtCpuInt8Mixed, "run", nothing)
    wanted = {"precisions": ["ort-cpu-int8-mixed"], "variants": {"own": tmp_path / "own.onnx"}}
    (added,) = mlflow_tdeploy.extend_model(registered.model_uri, **wanted)
    assert added.id == "own"
    assert "Not added: too far off" in caplog.text
    tags = MlflowClient().get_logged_model(registered.model_id).tags
    run = MlflowClient().get_run(tags["tdeploy.search.nothing.ort-cpu-int8-mixed"])
    assert run.data.params["budget"] == "worst_cosine >= 1"
    with pytest.raises(MlflowException, match="too far off"):
        mlflow_tdeploy.extend_model(registered.model_uri, precisions=["ort-cpu-int8-mixed"])


def test_of_what_auto_means_not_all_has_to_be_possible(registered, caplog, monkeypatch):
    def impossible(recipe, context):
        raise BuildError("There is nothing to quantize")

    monkeypatch.setattr(OrtCpuInt8Mixed, "run", impossible)
    added = mlflow_tdeploy.extend_model(registered.model_uri, precisions=["auto"])
    assert "onnx-int8" in {one.id for one in added}
    assert "Not added: There is nothing to quantize" in caplog.text
    with pytest.raises(MlflowException, match="There is nothing to quantize"):
        mlflow_tdeploy.extend_model(registered.model_uri, precisions=["auto"])
    with pytest.raises(MlflowException, match="There is nothing to quantize"):
        mlflow_tdeploy.extend_model(registered.model_uri, precisions=["ort-cpu-int8-mixed"])


def test_extend_model_refuses_with_the_right_code(tracking, tmp_path):
    info = mlflow_tdeploy.log_model(make_bundle(tmp_path / "made"), "linear")
    linear_graph(tmp_path / "own.onnx")
    cases = {
        "RESOURCE_ALREADY_EXISTS": {"variants": {"onnx-fp32": tmp_path / "own.onnx"}},
        "INVALID_PARAMETER_VALUE": {},
    }
    for code, arguments in cases.items():
        with pytest.raises(MlflowException) as caught:
            mlflow_tdeploy.extend_model(info.model_uri, **arguments)
        assert caught.value.error_code == code
    with pytest.raises(MlflowException, match="Unknown precision or variant 'int3'"):
        mlflow_tdeploy.extend_model(info.model_uri, precisions=["int3"])
