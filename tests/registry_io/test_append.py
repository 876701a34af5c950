"""Variants and evidence added to a model, against SQLite and a real MLflow server."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, NotFoundError
from mlflow_tdeploy.registry_io import (
    append,
    append_evidence,
    fetch_variant,
    locate,
)
from mlflow_tdeploy.registry_io.fetch import fetch_view
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, accuracy
from tests.registry_io.models import log, stage, tree


@pytest.mark.parametrize("uri", ["models:/appended/{version}", "{model_uri}"])
def test_append_adds_a_variant_that_serves_when_the_model_is_loaded_again(store, model, tmp_path, uri):
    info = log(model, name="appended")
    uri = uri.format(version=info.registered_model_version, model_uri=info.model_uri)
    variant = stage(tmp_path / "new", model, "onnx-fp16")
    written = append(uri, variant, tmp_path / "new", [accuracy("onnx-fp16")])
    x = np.array([[1, 2, 3, 4]], np.float32)
    with mlflow_tdeploy.load_model(uri, variant="onnx-fp16") as loaded:
        np.testing.assert_allclose(loaded.infer({"x": x})["y"], x @ WEIGHTS)
        assert loaded.variants["onnx-fp16"] == written
        assert loaded.bundle.evidence("onnx-fp16")
    whole = Bundle.open(mlflow.artifacts.download_artifacts(uri))  # what models:/ downloads has it, too
    whole.verify(whole.variants["onnx-fp16"])


def test_append_refuses_an_id_that_is_taken_and_changes_nothing(store, model, tmp_path):
    info = log(model)
    variant = stage(tmp_path / "new", model, "ort-cpu-fp32", WEIGHTS * 2)
    before = tree(locate(info.model_uri))
    with pytest.raises(ConflictError, match="ort-cpu-fp32"):
        append(info.model_uri, variant, tmp_path / "new", [accuracy("ort-cpu-fp32")])
    assert tree(locate(info.model_uri)) == before


def test_append_uploads_nothing_when_a_staged_file_is_not_what_the_record_says(store, model, tmp_path):
    info = log(model)
    variant = stage(tmp_path / "new", model)
    (tmp_path / "new" / variant.entry).write_bytes(b"truncated")
    before = tree(locate(info.model_uri))
    with pytest.raises(IntegrityError):
        append(info.model_uri, variant, tmp_path / "new", [])
    assert tree(locate(info.model_uri)) == before


def test_append_leaves_whole_variants_only_when_two_hosts_add_the_same_id(store, model, tmp_path):
    info = log(model)
    local = locate(info.model_uri).local is not None
    staged = {n: stage(tmp_path / f"new{n}", model, "onnx-fp16", WEIGHTS * n) for n in (1, 2)}

    def add(n):
        try:
            evidence = replace(accuracy("onnx-fp16"), files=staged[n].digest)
            return append(info.model_uri, staged[n], tmp_path / f"new{n}", [evidence])
        except ConflictError:
            return None

    with ThreadPoolExecutor(2) as pool:
        written = [variant for variant in pool.map(add, staged) if variant]
    bundle = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri))
    found = bundle.variants["onnx-fp16"]
    assert found in written
    bundle.verify(found)
    # A store behind a server has no exclusive create, so that both may have written; evidence tells them apart.
    assert len(written) == 1 if local else len(written) in (1, 2)
    assert [record.files for record in bundle.evidence("onnx-fp16")] == [found.digest]


def test_append_of_a_loser_leaves_no_evidence_that_counts_for_the_winner(remote, model, tmp_path, monkeypatch):
    info = log(model)
    location = locate(info.model_uri)
    loser, winner = (stage(tmp_path / f"new{n}", model, "onnx-fp16", WEIGHTS * n) for n in (1, 2))
    module = sys.modules["mlflow_tdeploy.registry_io.append"]  # the package has a function of that name
    monkeypatch.setattr(module, "_refuse_existing", lambda *_: None)  # both looked in the same instant
    for n, variant, passed in ((1, loser, True), (2, winner, False)):
        record = replace(accuracy("onnx-fp16", passed=passed, created=f"203{3 - n}"), files=variant.digest)
        append(location, variant, tmp_path / f"new{n}", [record])
    bundle = fetch_view(location)
    assert bundle.variants["onnx-fp16"].digest == winner.digest
    assert [record.passed for record in bundle.evidence("onnx-fp16")] == [False]


def test_append_leaves_files_without_a_record_when_the_record_may_still_arrive(remote, model, tmp_path, monkeypatch):
    """After a timeout the server may yet write it; files that nobody names only take room."""
    info = log(model)
    location = locate(info.model_uri)
    before = tree(location)
    real = type(location.repository).log_artifact

    def broken(self, local_file, artifact_path=None):
        if artifact_path.endswith("variants"):
            raise OSError(errno.ECONNRESET, "connection reset")
        return real(self, local_file, artifact_path)

    monkeypatch.setattr(type(location.repository), "log_artifact", broken)
    with pytest.raises(OSError, match="connection reset"):
        append(info.model_uri, stage(tmp_path / "new", model), tmp_path / "new", [accuracy("onnx-fp16")])
    assert {path.split("/")[1] for path in tree(location) - before} == {"files", "evidence", "added.txt"}
    assert "onnx-fp16" not in fetch_view(location).variants
    monkeypatch.setattr(type(location.repository), "log_artifact", real)
    written = append(location, stage(tmp_path / "again", model), tmp_path / "again", [accuracy("onnx-fp16")])
    bundle = fetch_view(location)
    fetch_variant(location, bundle, written)
    bundle.verify(bundle.variants["onnx-fp16"])


def test_append_takes_its_own_files_back_when_anothers_record_is_there(remote, model, tmp_path, monkeypatch):
    location = locate(log(model).model_uri)
    kind, real = type(location.repository), type(location.repository).log_artifact
    first = []

    def late(self, local_file, artifact_path=None):
        if artifact_path.endswith("variants") and not first:
            first.append(True)
            other = stage(tmp_path / "other", model, weights=2 * WEIGHTS)
            first.append(append(location, other, tmp_path / "other", [accuracy("onnx-fp16")]))
            raise ConnectionError("refused")
        return real(self, local_file, artifact_path)

    monkeypatch.setattr(kind, "log_artifact", late)
    with pytest.raises(ConnectionError, match="refused"):
        append(location, stage(tmp_path / "new", model), tmp_path / "new", [accuracy("onnx-fp16")])
    assert len({path.rsplit("/", 1)[0] for path in tree(location) if path.startswith("tdeploy/files/onnx-fp16/")}) == 1
    assert fetch_view(location).variants["onnx-fp16"] == first[1]


def test_append_evidence_adds_measurements_that_the_next_reader_sees(store, model):
    info = log(model)
    location = locate(info.model_uri)
    before = tree(location)
    append_evidence(location, [replace(accuracy("onnx-fp32"), created="2030"), accuracy("ort-cpu-fp32")])
    names = {path.split("/")[1] for path in tree(location) - before}
    assert (len(tree(location) - before), names) == (3, {"evidence", "added.txt"})
    bundle = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri))
    assert [record.created for record in bundle.evidence("onnx-fp32")][-1] == "2030"
    with pytest.raises(NotFoundError, match="no variant 'nobody'"):
        append_evidence(location, [accuracy("nobody")])


@pytest.mark.parametrize("answers", [True, False], ids=["the store answers again", "the store stays away"])
def test_append_keeps_what_it_uploaded_when_the_reply_to_the_record_is_lost(
    remote, model, tmp_path, monkeypatch, answers
):
    location = locate(log(model).model_uri)
    variant = stage(tmp_path / "new", model)
    kind = type(location.repository)
    send, look = kind.log_artifact, kind.list_artifacts
    gone = []

    def lost(self, path, target):
        send(self, path, target)
        if target.endswith("/variants"):
            gone.append(not answers)
            raise ConnectionError("read timed out")

    def refused(self, path=None):
        if any(gone):
            raise ConnectionError("nobody there")
        return look(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "log_artifact", lost)
        patch.setattr(kind, "list_artifacts", refused)
        with pytest.raises(ConnectionError, match="read timed out"):
            append(location, variant, tmp_path / "new", [accuracy("onnx-fp16")])
    bundle = fetch_view(location)
    fetch_variant(location, bundle, bundle.variants["onnx-fp16"])
    bundle.verify(bundle.variants["onnx-fp16"])
    assert bundle.evidence("onnx-fp16")


def test_append_leaves_no_visible_variant_when_it_is_killed(remote, model, tmp_path):
    info = log(model)
    location = locate(info.model_uri)
    variant = stage(tmp_path / "new", model)
    for calls in (1, 2):  # killed when the weights are up, and when the evidence is, too
        code = f"""
import os, signal
from pathlib import Path
from mlflow_tdeploy.registry_io import append, locate
location = locate({info.model_uri!r})
kind, left = type(location.repository), [{calls}]
def dying(real):
    def send(*arguments, **keywords):
        real(*arguments, **keywords)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    return send
for name in ("log_artifact", "log_artifacts"):
    setattr(kind, name, dying(getattr(kind, name)))
from tests.bundles import accuracy
from tests.registry_io.models import stage
folder = Path({str(tmp_path / "child")!r} + str({calls}))
variant = stage(folder, Path({str(model)!r}))
append(location, variant, folder, [accuracy("onnx-fp16")])
"""
        environment = {**os.environ, "MLFLOW_TRACKING_URI": remote}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2])
        assert ended.returncode == -signal.SIGKILL
        view = fetch_view(location)
        assert "onnx-fp16" not in view.variants
        with mlflow_tdeploy.load_model(info.model_uri) as loaded:
            assert "onnx-fp16" not in loaded.variants
    written = append(location, variant, tmp_path / "new", [accuracy("onnx-fp16")])  # and nothing stands in the way
    bundle = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri))
    assert bundle.variants["onnx-fp16"] == written
    bundle.verify(written)


def test_append_notices_a_rival_that_was_done_while_it_uploaded(remote, model, tmp_path, monkeypatch):
    location = locate(log(model).model_uri)
    module = sys.modules["mlflow_tdeploy.registry_io.append"]
    upload, rivals = module._upload, []

    def slow(where, path, folder):
        upload(where, path, folder)
        if not rivals and folder.startswith("files/"):
            rivals.append(True)
            other = stage(tmp_path / "other", model, weights=2 * WEIGHTS)
            rivals.append(append(location, other, tmp_path / "other", [accuracy("onnx-fp16")]))

    monkeypatch.setattr(module, "_upload", slow)
    with pytest.raises(ConflictError, match="already"):
        append(location, stage(tmp_path / "new", model), tmp_path / "new", [accuracy("onnx-fp16")])
    bundle = fetch_view(location)
    assert bundle.variants["onnx-fp16"] == rivals[1]
    assert len(bundle.evidence("onnx-fp16")) == 1
