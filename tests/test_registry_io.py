"""The seam to MLflow's stores, against SQLite and a real MLflow server."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

import mlflow_tdeploy
from mlflow_tdeploy.core import errors
from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, NotFoundError, TDeployError
from mlflow_tdeploy.registry_io import (
    append,
    append_evidence,
    describe,
    fetch_records,
    fetch_variant,
    fetch_view,
    locate,
    mlflow_errors,
    tag_logged_model,
)
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.cache import ContentCache
from mlflow_tdeploy.store.hashing import record_tree
from tests.bundles import WEIGHTS, accuracy, linear_graph, make_bundle

OUR_ERRORS = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, TDeployError)]


@pytest.fixture
def model(tmp_path):
    """A model directory with two variants."""
    return make_bundle(tmp_path / "made", {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS})


def log(model, name="linear", **arguments):
    return mlflow_tdeploy.log_model(model, name=name, registered_model_name=name, **arguments)


def stage(folder: Path, model: Path, variant_id: str = "onnx-fp16", weights: np.ndarray = WEIGHTS):
    """Return the record of a new variant whose files lie in ``folder``."""
    linear_graph(folder / "files" / variant_id / "model.onnx", weights)
    old = Bundle.open(model).variants["onnx-fp32"]
    entry = f"files/{variant_id}/model.onnx"
    return replace(old, id=variant_id, entry=entry, files=record_tree(folder, f"files/{variant_id}"))


# mlflow_errors


@pytest.mark.parametrize("cls", OUR_ERRORS)
def test_mlflow_errors_keeps_code_message_and_cause_of_each_error(cls):
    error = cls("p", "x", "y") if cls is errors.MissingDependencyError else cls("what, why, what to do")
    with pytest.raises(MlflowException) as caught, mlflow_errors():
        raise error
    assert caught.value.error_code == cls.code
    assert cls.code in set(ErrorCode.keys())
    assert caught.value.message == str(error)
    assert caught.value.__cause__ is error


def test_mlflow_errors_explains_a_full_disk():
    with pytest.raises(MlflowException, match="disk is full") as caught, mlflow_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/model.onnx")
    assert "/somewhere/model.onnx" in caught.value.message


@pytest.mark.parametrize("error", [ValueError("theirs"), OSError(errno.ENOENT, "gone"), MlflowException("own")])
def test_mlflow_errors_passes_other_errors_on(error):
    with pytest.raises(type(error)) as caught, mlflow_errors():
        raise error
    assert caught.value is error


def test_mlflow_errors_works_as_a_decorator_more_than_once():
    @mlflow_errors()
    def fail():
        raise NotFoundError("nothing")

    for _ in range(2):
        with pytest.raises(MlflowException, match="nothing"):
            fail()


# locate


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


# fetch


def test_fetch_records_leaves_out_every_variants_files(remote, model, tmp_path):
    info = log(model)
    location = locate(info.model_uri)
    assert location.local is None
    (tmp_path / "view").mkdir()
    bundle = fetch_records(location, tmp_path / "view")
    assert sorted(bundle.variants) == ["onnx-fp32", "ort-cpu-fp32"]
    assert bundle.evidence("ort-cpu-fp32")
    assert bundle.golden()
    assert (tmp_path / "view" / "MLmodel").is_file()
    assert not list((tmp_path / "view").rglob("*.onnx"))


def test_fetch_records_refuses_a_model_of_another_flavor(remote, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("x")
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(tmp_path / "other"), "other")
    (tmp_path / "view").mkdir()
    with pytest.raises(NotFoundError, match="holds no bundle"):
        fetch_records(locate(f"runs:/{run.info.run_id}/other"), tmp_path / "view")


def test_fetch_variant_brings_that_variant_only_and_then_from_the_cache(remote, model, tmp_path, monkeypatch):
    location = locate(log(model).model_uri)
    cache = ContentCache(tmp_path / "cache")
    bundle = fetch_view(location)
    wanted = bundle.variants["ort-cpu-fp32"]
    fetch_variant(location, bundle, wanted, cache)
    bundle.verify(wanted)
    assert not bundle.present(bundle.variants["onnx-fp32"])
    monkeypatch.setattr(type(location), "repository", None)  # no store any more
    (tmp_path / "again").mkdir()
    again = Bundle(tmp_path / "again", bundle.manifest)
    fetch_variant(location, again, wanted, cache)
    again.verify(wanted)


def test_fetch_variant_refuses_content_that_is_not_what_the_record_says(remote, model, tmp_path):
    location = locate(log(model).model_uri)
    bundle = fetch_view(location)
    wanted = bundle.variants["ort-cpu-fp32"]
    changed = replace(wanted, files=(replace(wanted.files[0], sha256=hashlib.sha256(b"other").hexdigest()),))
    with pytest.raises(IntegrityError, match="was changed or is incomplete in its artifact store"):
        fetch_variant(location, bundle, changed, ContentCache(tmp_path / "cache"))
    assert not bundle.present(wanted)


@pytest.mark.parametrize("damaged", ["content", "length", "missing", "fifo"])
def test_fetch_variant_mends_a_damaged_file_and_the_cache_behind_it(remote, model, tmp_path, monkeypatch, damaged):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    location = locate(log(model).model_uri)
    cache = ContentCache()
    bundle = fetch_view(location)
    wanted = bundle.variants["ort-cpu-fp32"]
    fetch_variant(location, bundle, wanted)
    path = bundle.path(wanted.entry)
    assert path.samefile(cache._object(wanted.files[0]))  # one inode: what damages one damages the other
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damaged == "content" else content[:-1])
    if damaged in ("missing", "fifo"):
        path.unlink()
    if damaged == "fifo":
        os.mkfifo(path)
    fetch_variant(location, bundle, wanted)
    bundle.verify(wanted)
    cache.link(wanted.files[0], tmp_path / "from-cache")
    assert (tmp_path / "from-cache").read_bytes() == path.read_bytes()


def test_fetch_variant_leaves_a_sound_file_alone(remote, model, monkeypatch):
    location = locate(log(model).model_uri)
    bundle = fetch_view(location)
    wanted = bundle.variants["ort-cpu-fp32"]
    fetch_variant(location, bundle, wanted)
    before = bundle.path(wanted.entry).stat()
    monkeypatch.setattr(type(location), "repository", None)
    fetch_variant(location, bundle, wanted)
    after = bundle.path(wanted.entry).stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)  # so it is not hashed again


def test_fetch_view_is_the_same_folder_every_time_and_sees_new_records(remote, model, tmp_path):
    location = locate(log(model).model_uri)
    first = fetch_view(location)
    before = (first.root / "manifest.json").stat()
    append(location.uri, stage(tmp_path / "new", model), tmp_path / "new", [accuracy("onnx-fp16")])
    second = fetch_view(location)
    assert second.root == first.root
    assert (second.root / "manifest.json").stat().st_ctime_ns == before.st_ctime_ns  # what did not change stays
    assert "onnx-fp16" in second.variants


# append


@pytest.fixture(params=["tracking", "remote"])
def store(request):
    """SQLite with a local folder, and a server that keeps artifacts behind HTTP."""
    return request.getfixturevalue(request.param)


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


def test_append_removes_what_it_uploaded_when_the_record_cannot_be_written(remote, model, tmp_path, monkeypatch):
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
    assert tree(location) == before


def test_append_evidence_adds_measurements_that_the_next_reader_sees(store, model):
    info = log(model)
    location = locate(info.model_uri)
    before = tree(location)
    append_evidence(location, [replace(accuracy("onnx-fp32"), created="2030"), accuracy("ort-cpu-fp32")])
    assert len(tree(location) - before) == 2
    bundle = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri))
    assert [record.created for record in bundle.evidence("onnx-fp32")][-1] == "2030"
    with pytest.raises(NotFoundError, match="no variant 'nobody'"):
        append_evidence(location, [accuracy("nobody")])


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
from tests.test_registry_io import stage
folder = Path({str(tmp_path / "child")!r} + str({calls}))
variant = stage(folder, Path({str(model)!r}))
append(location, variant, folder, [accuracy("onnx-fp16")])
"""
        environment = {**os.environ, "MLFLOW_TRACKING_URI": remote}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1])
        assert ended.returncode == -signal.SIGKILL
        view = fetch_view(location)
        assert "onnx-fp16" not in view.variants
        with mlflow_tdeploy.load_model(info.model_uri) as loaded:
            assert "onnx-fp16" not in loaded.variants
    written = append(location, variant, tmp_path / "new", [accuracy("onnx-fp16")])  # and nothing stands in the way
    bundle = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri))
    assert bundle.variants["onnx-fp16"] == written
    bundle.verify(written)


def tree(location) -> set[str]:
    """Every file of a model in its store."""
    return {entry.path for entry in location.repository._iter_artifacts_recursive(None) if not entry.is_dir}


# tags and metrics


def test_search_logged_models_finds_an_int8_variant_by_its_cosine(tracking, tmp_path):
    evidence = {
        "onnx-fp32": [accuracy("onnx-fp32")],
        "ort-cpu-int8": [replace(accuracy("ort-cpu-int8"), metrics={"worst_cosine": 0.994})],
    }
    variants = {"onnx-fp32": WEIGHTS, "ort-cpu-int8": WEIGHTS}
    good = log(make_bundle(tmp_path / "good", variants, evidence=evidence))
    evidence["ort-cpu-int8"] = [accuracy("ort-cpu-int8", passed=False)]
    bad = log(make_bundle(tmp_path / "bad", variants, evidence=evidence))

    def search(text):
        return {found.model_id for found in mlflow.search_logged_models(filter_string=text, output_format="list")}

    int8 = "tags.`tdeploy.variant.ort-cpu-int8` = 'ok' AND metrics.`ort-cpu-int8.worst_cosine` > {}"
    assert search(int8.format(0.99)) == {good.model_id}
    assert search(int8.format(0.995)) == set()
    assert search("metrics.`ort-cpu-int8.worst_cosine` > 0.5") == {good.model_id, bad.model_id}
    assert search("tags.`tdeploy.variant.ort-cpu-int8` = 'over budget'") == {bad.model_id}
    assert search("tags.`tdeploy.task` = 'tensors'") == {good.model_id, bad.model_id}


def test_describe_lists_variants_precisions_dims_and_evidence(tmp_path):
    evidence = {"onnx-fp32": [], "ort-cpu-int8": [accuracy("ort-cpu-int8", passed=False)], "onnx-fp16": []}
    variants = {"onnx-fp32": WEIGHTS, "ort-cpu-int8": WEIGHTS, "onnx-fp16": WEIGHTS.astype(np.float16)}
    tags, metrics = describe(Bundle.open(make_bundle(tmp_path / "m", variants, evidence=evidence)))
    assert tags["tdeploy.variants"] == "onnx-fp32"
    assert tags["tdeploy.precisions"] == "fp32"
    assert tags["tdeploy.dims"] == "batch=1..8"
    assert tags["tdeploy.budget"] == "worst_cosine >= 0.99"
    assert tags["tdeploy.variant.onnx-fp32"] == "ok"
    assert tags["tdeploy.variant.onnx-fp16"] == "unverified"
    assert tags["tdeploy.variant.ort-cpu-int8"] == "over budget"
    assert metrics == {"ort-cpu-int8.worst_cosine": 0.9}


def test_tag_logged_model_takes_more_metrics_than_one_batch_holds(tracking, model):
    info = log(model)
    tag_logged_model(info.model_id, {"empty": ""}, {f"v.m{n}": float(n) for n in range(1900)})
    found = MlflowClient().get_logged_model(info.model_id)
    assert {metric.key for metric in found.metrics} >= {"v.m0", "v.m1899"}
    assert "empty" not in found.tags


def test_tag_logged_model_keeps_what_a_newer_host_said_of_a_variant_that_cannot_be_read_here(tracking, model):
    info = log(model)
    root = Path(locate(info.model_uri).local)
    newer = {"tdeploy.variant.trt-int4": "ok", "tdeploy.variants": "trt-int4", "tdeploy.precisions": "int4"}
    MlflowClient().set_logged_model_tags(info.model_id, {**newer, "tdeploy.variant.bad": "over budget"})
    (root / "tdeploy" / "variants" / "trt-int4.json").write_text('{"schema_version": 2}')
    tag_logged_model(info.model_id, *describe(Bundle.open(root)))
    tags = mlflow.get_logged_model(info.model_id).tags
    assert tags["tdeploy.variants"] == "onnx-fp32,ort-cpu-fp32,trt-int4"
    assert tags["tdeploy.precisions"] == "fp32,int4"
    assert tags["tdeploy.variant.trt-int4"] == "ok"
