"""Triton repositories that exist already: kept beside the graphs of a model, and had again as they were."""

from __future__ import annotations

import os
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, linear_graph, make_bundle

SHAPES = {"batch": (1, 2, 8)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def repository(tmp_path):
    """A graph and an ensemble, whose version folder is empty as Triton wants it."""
    root = tmp_path / "a repository"
    linear_graph(root / "graph" / "1" / "model.onnx", WEIGHTS)
    (root / "graph" / "config.pbtxt").write_text('name: "graph"\nbackend: "onnxruntime"\n')
    (root / "all" / "1").mkdir(parents=True)
    (root / "all" / "config.pbtxt").write_text('name: "all"\nplatform: "ensemble"\n')
    (root / "all" / ".keep").write_text("")
    (root / "graph" / "stub").write_text("#!/bin/sh\n")
    (root / "graph" / "stub").chmod(0o755)
    return root


def tree(root):
    """Everything below a folder: files with their content, folders with None."""
    found = Path(root).rglob("*")
    return {
        str(path.relative_to(root)): None if path.is_dir() else (path.read_bytes(), os.access(path, os.X_OK))
        for path in found
    }


@pytest.mark.parametrize("how", ["log", "extend"])
def test_a_repository_is_logged_as_a_variant_and_comes_out_unchanged(tracking, repository, tmp_path, how):
    linear_graph(tmp_path / "linear.onnx", WEIGHTS)
    model = {"onnx-fp32": tmp_path / "linear.onnx"} | ({"triton": repository} if how == "log" else {})
    info = mlflow_tdeploy.log_model(model, "m", task="tensors", shapes=SHAPES)
    if how == "extend":
        mlflow_tdeploy.extend_model(info.model_uri, variants={"triton": repository})
    variant = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri)).variants["triton"]
    assert (variant.format, variant.precision.name) == ("triton", "unknown")
    out = mlflow_tdeploy.download_variant(info.model_uri, "triton", tmp_path / "out")
    assert tree(out) == tree(repository)
    with mlflow_tdeploy.load_model(info.model_uri) as opened:  # the graph serves, and says why the repository does not
        x = np.ones((1, 4), np.float32)
        np.testing.assert_allclose(opened.predict({"x": x})["y"], x @ WEIGHTS, rtol=1e-3)
        assert "no runtime opens the format 'triton'" in opened.decision.explain()


def test_a_repository_in_a_remote_store_comes_out_unchanged(remote, repository, tmp_path):
    info = mlflow_tdeploy.log_model(make_bundle(tmp_path / "made"), "m")
    mlflow_tdeploy.extend_model(info.model_uri, variants={"triton": repository})
    result = CliRunner().invoke(main, ["download", info.model_uri, "triton", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "out") == tree(repository)


def test_a_graph_is_downloaded_with_what_belongs_to_it(tmp_path):
    root = make_bundle(tmp_path / "made", {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS})
    mlflow_tdeploy.download_variant(root, "ort-cpu-fp32", tmp_path / "out")
    assert tree(tmp_path / "out") == {
        "model.onnx": ((root / "tdeploy/files/ort-cpu-fp32/model.onnx").read_bytes(), False)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root / "graph", "is a single Triton model. Give the repository"),
        (lambda root: root / "graph" / "1", "is no Triton repository"),
        (lambda root: (root / "link").symlink_to("/etc") or root, "'link' in .* is a link or no plain file"),
        (lambda root: (root / "all" / "p").symlink_to("/etc/passwd") or root, "is a link or no plain file"),
    ],
)
def test_what_is_no_repository_is_refused_and_nothing_is_left(repository, tmp_path, change, message):
    given = change(repository)
    root = make_bundle(tmp_path / "made")
    before = tree(root)
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.extend_model(root, variants={"triton": given})
    assert tree(root) == before
    linear_graph(tmp_path / "linear.onnx", WEIGHTS)
    model = {"onnx-fp32": tmp_path / "linear.onnx", "triton": given}
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.save_model(model, tmp_path / "out", shapes=SHAPES)
    assert not (tmp_path / "out").exists()


def test_a_repository_alone_says_what_is_missing(repository, tmp_path):
    with pytest.raises(MlflowException, match="beside an ONNX graph of the same model"):
        mlflow_tdeploy.save_model({"triton": repository}, tmp_path / "out")


def test_download_refuses_what_cannot_be_had_and_leaves_nothing(tmp_path):
    root = make_bundle(tmp_path / "made")
    with pytest.raises(MlflowException, match="there is none of that id. It has: onnx-fp32"):
        mlflow_tdeploy.download_variant(root, "trt", tmp_path / "out")
    (root / "tdeploy/files/onnx-fp32/model.onnx").write_bytes(b"changed")
    with pytest.raises(MlflowException, match="model.onnx"):
        mlflow_tdeploy.download_variant(root, "onnx-fp32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_repository_cannot_take_the_id_of_what_is_made_and_nothing_is_made_first(repository, tmp_path):
    linear_graph(tmp_path / "linear.onnx", WEIGHTS)
    steps, model = [], {"onnx-fp32": tmp_path / "linear.onnx", "ort-cpu-fp32": repository}
    with pytest.raises(MlflowException, match="'ort-cpu-fp32' is the id of a variant that is made"):
        mlflow_tdeploy.save_model(model, tmp_path / "out", shapes=SHAPES, progress=steps.append)
    assert [step.name for step in steps] in ([], ["write the source"])


def test_download_refuses_a_folder_that_is_taken_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(MlflowException, match="exists already and is not an empty folder"):
        mlflow_tdeploy.download_variant("models:/no-such-model/1", "triton", tmp_path / "out")
