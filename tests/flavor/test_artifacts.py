"""The scheme ``tdeploy:``: what is downloaded, and that MLflow's own commands take it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.flavor.artifacts import TDeployArtifactRepository, split_uri
from mlflow_tdeploy.flavor.origin import origin_fetch, write_origin
from mlflow_tdeploy.registry_io import Location
from mlflow_tdeploy.store.bundle import Bundle
from tests.flavor.text_bundles import embed, make_text_bundle


@pytest.fixture(params=["tracking", "remote"])
def version(request, tmp_path):
    """A registered version with the alias champion, in a local store and behind a server."""
    request.getfixturevalue(request.param)
    info = mlflow_tdeploy.log_model(make_text_bundle(tmp_path / "made"), "words", registered_model_name="served")
    MlflowClient().set_registered_model_alias("served", "champion", info.registered_model_version)
    return info.registered_model_version


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("tdeploy:/m@champion", ("tdeploy:/m@champion", "")),
        ("tdeploy:/m@champion/MLmodel", ("tdeploy:/m@champion", "MLmodel")),
        ("tdeploy:/m/7", ("tdeploy:/m/7", "")),
        ("tdeploy:/m/7/tdeploy/manifest.json", ("tdeploy:/m/7", "tdeploy/manifest.json")),
        (f"tdeploy:/m-{'0' * 32}/MLmodel", (f"tdeploy:/m-{'0' * 32}", "MLmodel")),
    ],
)
def test_split_uri_tells_version_and_file_apart(uri, parts):
    assert split_uri(uri) == parts


@pytest.mark.parametrize("uri", ["tdeploy:/", "tdeploy:/m"])
def test_split_uri_refuses_what_names_no_version(uri):
    with pytest.raises(InvalidInputError, match="tdeploy:/name@alias"):
        split_uri(uri)


@pytest.mark.parametrize("form", ["tdeploy:/served@champion", "tdeploy:/served/{}"])
def test_pyfunc_loads_a_version_by_the_scheme(version, form):
    model = mlflow.pyfunc.load_model(form.format(version))
    np.testing.assert_allclose(model.predict(["good film"])[0], embed("good film"), rtol=1e-3)
    assert model.get_raw_model().decision.chosen.variant == "ort-cpu-int8"


def test_download_brings_one_variant_and_all_records(version, tmp_path):
    (tmp_path / "got").mkdir()
    path = mlflow.artifacts.download_artifacts("tdeploy:/served@champion", dst_path=str(tmp_path / "got"))
    bundle = Bundle.open(path)
    present = {name: bundle.present(variant) for name, variant in bundle.variants.items()}
    assert present == {"ort-cpu-int8": True, "onnx-fp32": False}
    assert bundle.evidence("onnx-fp32")
    assert {"MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml"} <= {p.name for p in Path(path).iterdir()}


def test_a_model_that_was_downloaded_by_the_scheme_gets_another_variant_when_it_is_forced(version, tmp_path):
    (tmp_path / "got").mkdir()
    path = mlflow.artifacts.download_artifacts("tdeploy:/served@champion", dst_path=str(tmp_path / "got"))
    model = mlflow.pyfunc.load_model(path, model_config={"variant": "onnx-fp32"})
    np.testing.assert_array_equal(model.predict(["good film"])[0], embed("good film"))
    again = mlflow.pyfunc.load_model(path)
    np.testing.assert_array_equal(again.predict(["good"], params={"variant": "onnx-fp32"})[0], embed("good"))


def test_download_brings_the_variant_that_was_saved_as_the_models_choice(remote, tmp_path):
    made = make_text_bundle(tmp_path / "made")
    mlflow_tdeploy.log_model(made, "words", registered_model_name="forced", model_config={"variant": "onnx-fp32"})
    (tmp_path / "got").mkdir()
    path = mlflow.artifacts.download_artifacts("tdeploy:/forced/1", dst_path=str(tmp_path / "got"))
    bundle = Bundle.open(path)
    present = {name: bundle.present(variant) for name, variant in bundle.variants.items()}
    assert present == {"ort-cpu-int8": False, "onnx-fp32": True}


def test_write_origin_keeps_everything_and_is_never_half_written(remote, tmp_path, monkeypatch):
    bundle = Bundle.open(make_text_bundle(tmp_path / "made"))
    location = Location("tdeploy:/a/1", "mlflow-artifacts:/1", "m-" + "0" * 32, "http://tracking")
    write_origin(bundle, location)
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(origin_fetch(bundle).args[0]), real(a, b)))
    write_origin(bundle, replace(location, root="mlflow-artifacts:/2"))
    assert seen == [location]  # whoever reads in the middle sees the old one whole
    assert origin_fetch(bundle).args[0] == replace(location, root="mlflow-artifacts:/2")


def test_a_bundle_cannot_name_the_server_that_a_host_fetches_from(tmp_path):
    bundle = Bundle.open(make_text_bundle(tmp_path / "made"))
    (bundle.root / ".origin.json").write_text('{"uri": "x", "root": "http://evil"}')
    assert origin_fetch(bundle) is None


def test_single_files_come_by_the_scheme(version):
    path = mlflow.artifacts.download_artifacts(f"tdeploy:/served/{version}/tdeploy/manifest.json")
    assert Path(path).read_text().startswith("{")
    assert "tdeploy" in mlflow.models.Model.load("tdeploy:/served@champion").flavors


def test_list_artifacts_shows_what_the_version_holds(version):
    found = {entry.path for entry in mlflow.artifacts.list_artifacts("tdeploy:/served@champion")}
    assert {"served@champion/MLmodel", "served@champion/tdeploy"} <= found
    inside = {entry.path for entry in TDeployArtifactRepository("tdeploy:/served@champion").list_artifacts("tdeploy")}
    assert {"tdeploy/manifest.json", "tdeploy/variants"} <= inside


def test_the_scheme_is_read_only(version, tmp_path):
    repository = TDeployArtifactRepository("tdeploy:/served@champion")
    for write in (repository.log_artifact, repository.log_artifacts):
        with pytest.raises(MlflowException, match="read-only"):
            write(str(tmp_path))


def test_the_scheme_says_why_nothing_can_serve(remote, tmp_path):
    made = make_text_bundle(tmp_path / "made", failed=("onnx-fp32", "ort-cpu-int8"))
    mlflow_tdeploy.log_model(made, "words", registered_model_name="hopeless")
    with pytest.raises(MlflowException, match="No variant of this model can serve here"):
        mlflow.pyfunc.load_model("tdeploy:/hopeless/1")


def test_write_origin_writes_no_password_and_for_this_user_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    bundle = Bundle.open(make_text_bundle(tmp_path / "made"))
    location = Location("models:/m/1", "s3://bucket/m", None, "postgresql://mlflow:s3cret@db/mlflow")
    write_origin(bundle, location)
    (note,) = (tmp_path / "cache" / "origins").rglob("*.json")
    assert "s3cret" not in note.read_text()
    assert note.stat().st_mode & 0o077 == 0
    assert origin_fetch(bundle).args[0] == replace(location, tracking_uri=None)
    write_origin(Bundle.open(make_text_bundle(tmp_path / "other")), replace(location, root="ftp://u:s3cret@host/m"))
    assert list((tmp_path / "cache" / "origins").rglob("*.json")) == [note]


def test_write_origin_forgets_bundles_that_are_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("one", "two"):
        bundle = Bundle.open(make_text_bundle(tmp_path / name))
        write_origin(bundle, Location("models:/m/1", "s3://bucket/m"))
        shutil.rmtree(tmp_path / name)
    assert len(list((tmp_path / "cache" / "origins").rglob("*.json"))) == 1
