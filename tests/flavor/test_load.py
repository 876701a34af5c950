from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.flavor.config import known_only
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, accuracy, make_bundle
from tests.flavor.text_bundles import embed, make_text_bundle


def present(model) -> dict[str, bool]:
    return {name: model.bundle.present(variant) for name, variant in model.variants.items()}


@pytest.fixture
def logged(remote, tmp_path):
    """A model behind a server."""
    return mlflow_tdeploy.log_model(make_text_bundle(tmp_path / "made"), "words")


def test_load_model_fetches_the_chosen_variant_only_when_the_store_is_remote(logged, monkeypatch, tmp_path):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    with mlflow_tdeploy.load_model(logged.model_uri) as model:
        assert model.decision.chosen.variant == "ort-cpu-int8"
        assert present(model) == {"ort-cpu-int8": True, "onnx-fp32": False}
        np.testing.assert_allclose(model.predict(["good"])[0], embed("good"), rtol=1e-3)
        forced = model.predict(["good"], variant="onnx-fp32")  # fetched when it is wanted
        np.testing.assert_array_equal(forced[0], embed("good"))
        assert present(model)["onnx-fp32"]


def test_load_model_downloads_to_the_given_folder(logged, tmp_path):
    with mlflow_tdeploy.load_model(logged.model_uri, str(tmp_path / "here"), variant="onnx-fp32") as model:
        assert model.bundle.root == tmp_path / "here" / "tdeploy"
        assert present(model) == {"ort-cpu-int8": False, "onnx-fp32": True}


def test_load_model_refuses_a_folder_that_holds_another_model(logged, tmp_path):
    """Variants of what was there before would be taken for this one's."""
    here = str(tmp_path / "here")
    mlflow_tdeploy.load_model(logged.model_uri, here).close()
    mlflow_tdeploy.load_model(logged.model_uri, here, variant="onnx-fp32").close()  # the same one may come again
    other = mlflow_tdeploy.log_model(make_bundle(tmp_path / "other"), "other")
    with pytest.raises(MlflowException, match="holds another model.*empty folder") as caught:
        mlflow_tdeploy.load_model(other.model_uri, here)
    assert caught.value.error_code == "RESOURCE_ALREADY_EXISTS"
    (tmp_path / "here/tdeploy/manifest.json").unlink()  # as after a download that was cut off
    with pytest.raises(MlflowException, match="holds another model, or a part of one"):
        mlflow_tdeploy.load_model(other.model_uri, here)
    mlflow_tdeploy.load_model(logged.model_uri, here).close()  # the same one may end what was begun


def test_load_model_lets_several_fill_one_folder_with_the_same_model(logged, tmp_path):
    for turn in range(3):
        target = str(tmp_path / str(turn))
        with ThreadPoolExecutor(3) as pool:
            loads = [pool.submit(mlflow_tdeploy.load_model, logged.model_uri, target) for _ in range(3)]
        for load in loads:
            load.result().close()


def test_load_model_serves_another_variant_when_the_chosen_one_was_tampered_with(logged, tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    whole = mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=str(tmp_path / "whole"))
    bundle = Bundle.open(whole)
    path = bundle.path(bundle.variants["ort-cpu-int8"].entry)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with mlflow_tdeploy.load_model(whole) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert "was changed" in model.decision.failures[0]
    with pytest.raises(MlflowException, match="was changed"):
        mlflow_tdeploy.load_model(whole, strict=True)
    monkeypatch.setenv("TDEPLOY_STRICT", "1")
    with pytest.raises(MlflowException, match="was changed"):
        mlflow.pyfunc.load_model(whole)
    with mlflow_tdeploy.load_model(whole, strict=False) as model:
        assert model.decision.chosen.variant == "onnx-fp32"


@pytest.mark.parametrize(
    ("arguments", "variant"),
    [
        ({}, "ort-cpu-int8"),
        ({"variant": "onnx-fp32"}, "onnx-fp32"),
        ({"model_config": {"variant": "onnx-fp32"}}, "onnx-fp32"),
        ({"model_config": {"variant": "onnx-fp32"}, "variant": "ort-cpu-int8"}, "ort-cpu-int8"),
        ({"runtime": "ort-cpu"}, "ort-cpu-int8"),
    ],
)
def test_load_model_obeys_what_is_forced(tmp_path, arguments, variant):
    mlflow_tdeploy.save_model(make_text_bundle(tmp_path / "made"), tmp_path / "model")
    with mlflow_tdeploy.load_model(str(tmp_path / "model"), **arguments) as model:
        assert model.decision.chosen.variant == variant


def test_load_model_starts_from_the_saved_model_config(tmp_path):
    made = make_text_bundle(tmp_path / "made")
    mlflow_tdeploy.save_model(made, tmp_path / "model", model_config={"variant": "onnx-fp32"})
    with mlflow_tdeploy.load_model(str(tmp_path / "model")) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
    with mlflow_tdeploy.load_model(str(tmp_path / "model"), variant="") as model:
        assert model.decision.chosen.variant == "ort-cpu-int8"


def test_load_model_opens_a_bundle_that_was_written_without_mlflow(tmp_path):
    with mlflow_tdeploy.load_model(str(make_bundle(tmp_path / "made"))) as model:
        x = np.ones((1, 4), np.float32)
        np.testing.assert_allclose(model.predict({"x": x})["y"], x @ WEIGHTS)


def test_load_model_refuses_with_the_right_code(tracking, tmp_path):
    (tmp_path / "empty").mkdir()
    for uri in (str(tmp_path / "nowhere"), str(tmp_path / "empty"), "models:/nobody/1"):
        with pytest.raises(MlflowException) as caught:
            mlflow_tdeploy.load_model(uri)
        assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"
    made = str(make_bundle(tmp_path / "made"))
    for arguments in ({"variant": "none"}, {"runtime": "none"}, {"model_config": {"temperature": 1}}):
        with pytest.raises(MlflowException) as caught:
            mlflow_tdeploy.load_model(made, **arguments)
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_load_model_never_chooses_a_variant_over_budget(tmp_path):
    evidence = {"onnx-fp32": [], "ort-cpu-int8": [accuracy("ort-cpu-int8", passed=False)]}
    made = make_bundle(tmp_path / "made", {"onnx-fp32": WEIGHTS, "ort-cpu-int8": WEIGHTS}, evidence=evidence)
    with mlflow_tdeploy.load_model(str(made)) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
    with pytest.raises(MlflowException, match="over budget: worst_cosine is 0.9"):
        mlflow_tdeploy.load_model(str(made), variant="ort-cpu-int8")


def test_an_opened_text_model_needs_its_tokenizer_file_no_more(tmp_path):
    """What the first request needs is read at opening: it does not wait, and a damaged file shows before it."""
    folder = make_text_bundle(tmp_path / "model")
    with mlflow_tdeploy.load_model(str(folder)) as model:
        (folder / "tdeploy" / "assets" / "tokenizer.json").unlink()
        assert np.allclose(model.predict(["a good film"]), [embed("a good film")], atol=1e-3)


def test_a_loaded_model_raises_what_mlflow_users_catch(tmp_path):
    with mlflow_tdeploy.load_model(str(make_text_bundle(tmp_path / "model"))) as model:
        for call in (
            lambda: model.predict([]),
            lambda: model.predict(["a"], variant="no-such"),
            lambda: model.infer({"input_ids": np.zeros((1, 2), np.int32)}),
        ):
            with pytest.raises(MlflowException) as caught:
                call()
            assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    with pytest.raises(MlflowException, match="closed"):
        model.predict(["a"])


@pytest.mark.parametrize("nothing", ["", None])
def test_load_model_needs_a_uri(nothing):
    with pytest.raises(MlflowException, match="model_uri must name a model"):
        mlflow_tdeploy.load_model(nothing)


def test_load_model_takes_the_path_of_a_configuration_as_pyfunc_does(logged, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("variant: onnx-fp32\n")
    for given in (path, str(path)):
        with mlflow_tdeploy.load_model(logged.model_uri, model_config=given) as model:
            assert model.decision.chosen.variant == "onnx-fp32"
    with pytest.raises(MlflowException, match="model_config must be a mapping or the path of a YAML file, got "):
        mlflow_tdeploy.load_model(logged.model_uri, model_config=["variant"])


def test_an_option_that_is_no_more_is_warned_of_only_where_it_was_switched_on(caplog):
    assert known_only({"threads": 2, "pinned": False, "gone": ""}) == {"threads": 2}
    assert caplog.text == ""
    assert known_only({"pinned": True}) == {}
    assert "The option 'pinned' was saved with the model and is unknown" in caplog.text


@pytest.mark.parametrize("name", ["p%20q", "a#b", "a?b", "äö 中"])
def test_a_folder_is_opened_whatever_it_is_called(tmp_path, name):
    path = tmp_path / name / "model"
    mlflow_tdeploy.save_model(make_text_bundle(tmp_path / "made"), path)
    with mlflow_tdeploy.load_model(str(path)) as model:
        np.testing.assert_allclose(model.predict("good film")[0], embed("good film"), rtol=1e-3)


def test_a_store_whose_package_is_missing_is_named_with_the_install_line(monkeypatch):
    def refuse(uri, **kwargs):
        raise ModuleNotFoundError("No module named 'botocore'", name="botocore")

    monkeypatch.setattr("mlflow_tdeploy.registry_io.location.get_artifact_repository", refuse)
    with pytest.raises(MlflowException, match=r"'s3://b/k' needs the package 'botocore'.*pip install botocore"):
        mlflow_tdeploy.load_model("s3://b/k")


def test_a_model_loaded_by_a_relative_path_serves_from_another_working_directory(tmp_path, monkeypatch):
    make_bundle(tmp_path / "made", {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS})
    monkeypatch.chdir(tmp_path)
    with mlflow_tdeploy.load_model("made") as model:
        monkeypatch.chdir("/")
        x = np.ones((1, 4), np.float32)
        np.testing.assert_allclose(model.predict({"x": x}, variant="onnx-fp32")["y"], x @ WEIGHTS, rtol=1e-6)


@pytest.mark.parametrize("content", ["", "flavors: [", "- 1", "flavors: {}\nutc_time_created: \x00"])
def test_a_damaged_mlmodel_is_named(tmp_path, content):
    mlflow_tdeploy.save_model(make_bundle(tmp_path / "made"), tmp_path / "m")
    (tmp_path / "m" / "MLmodel").write_text(content)
    with pytest.raises(MlflowException, match="MLmodel"):
        mlflow_tdeploy.load_model(str(tmp_path / "m"))


def test_a_loaded_model_says_why_it_cannot_be_pickled(tmp_path):
    with mlflow_tdeploy.load_model(make_bundle(tmp_path)) as model:
        for copy_it in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="load it by its URI where it is needed"):
                copy_it(model)


def test_an_unknown_parameter_is_told_with_those_that_every_model_has(tmp_path):
    with mlflow_tdeploy.load_model(make_bundle(tmp_path)) as model:
        x = np.ones((1, 4), np.float32)
        with pytest.raises(MlflowException, match="Unknown parameter 'foo' .* Known: variant, runtime, strict"):
            model.predict({"x": x}, foo=1)
