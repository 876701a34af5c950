"""URIs and the files behind them, against SQLite."""

from __future__ import annotations

import shutil

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import NotFoundError
from mlflow_tdeploy.registry_io import (
    locate,
)
from mlflow_tdeploy.registry_io.folder import listed
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import linear_graph, make_bundle
from tests.registry_io.models import log


def test_locate_finds_the_same_files_when_given_any_form_of_uri(tracking, model):
    with mlflow.start_run() as run:
        info = log(model)
    client = MlflowClient()
    client.set_registered_model_alias("linear", "champion", "1")
    client.copy_model_version("models:/linear/1", "copy")
    client.copy_model_version("models:/copy/1", "copy-of-copy")
    uris = [
        info.model_uri,
        "models:/linear/1",
        "models:/linear@champion",
        "models:/linear/latest",
        "models:/copy/1",
        "models:/copy-of-copy/1",
        "tdeploy:/linear@champion",
        "tdeploy:/linear/1",
        f"runs:/{run.info.run_id}/linear",
    ]
    found = [locate(uri) for uri in uris]
    assert {location.model_id for location in found} == {info.model_id}
    (folder,) = {location.local for location in found}
    assert sorted(Bundle.open(folder).variants) == ["onnx-fp32", "ort-cpu-fp32"]
    assert {locate(form).local for form in (folder, str(folder), folder.as_uri())} == {folder}


def test_locate_takes_the_newest_version_when_asked_for_latest(tracking, model, tmp_path):
    log(model)
    second = log(make_bundle(tmp_path / "second"))
    assert locate("models:/linear/latest").model_id == second.model_id


def test_locate_says_so_when_nothing_is_there(tracking, tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        locate(tmp_path / "nowhere")
    for uri in ("models:/nobody/1", "models:/nobody@champion", "runs:/" + "0" * 32 + "/model", "tdeploy:/nobody/1"):
        with pytest.raises(MlflowException) as caught:
            locate(uri)
        assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_locate_takes_a_models_id_from_its_own_folder_only(tracking, model, tmp_path):
    info = log(model)
    own = locate(info.model_uri).local
    copy = tmp_path / "backup" / info.model_id
    shutil.copytree(own, copy)
    for uri in (own, own / "tdeploy", own.as_uri()):
        assert locate(uri).model_id == info.model_id
    assert locate(copy).model_id is None
    other = tmp_path / f"m-{'0' * 32}"
    shutil.copytree(own, other)
    assert locate(other).model_id is None  # nobody knows that id


def test_extending_a_copy_leaves_the_registered_model_alone(tracking, model, tmp_path):
    info = log(model)
    copy = tmp_path / "backup" / info.model_id / "artifacts"
    shutil.copytree(locate(info.model_uri).local, copy)
    before = mlflow.get_logged_model(info.model_id).tags
    linear_graph(tmp_path / "mine.onnx")
    mlflow_tdeploy.extend_model(str(copy), variants={"mine": tmp_path / "mine.onnx"})
    assert "mine" in Bundle.open(copy).variants
    assert mlflow.get_logged_model(info.model_id).tags == before


def test_a_password_in_an_address_is_in_no_message(tracking):
    location = locate("http://user:s3cret@127.0.0.1:1/model")
    assert "s3cret" not in location.uri
    assert "s3cret" in location.root  # that is what it is reached with
    with pytest.raises(NotFoundError, match="No model at 'http://127.0.0.1:1/model'") as told:
        listed(location)
    assert "s3cret" not in str(told.value)
    short = locate("http://me:pw@127.0.0.1:1/model")
    assert short.said(ValueError("some name at http://me:pw@127.0.0.1:1/model: pw")) == (
        "some name at http://127.0.0.1:1/model: …"
    )
