"""Downloads of a part of a model, against a real MLflow server."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

from mlflow_tdeploy.core.errors import IntegrityError, NotFoundError, StorageError
from mlflow_tdeploy.flavor.config import policy_of
from mlflow_tdeploy.registry_io import append, append_evidence, fetch_variant, locate, open_records
from mlflow_tdeploy.registry_io.fetch import fetch_records, fetch_view
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.cache import ContentCache
from mlflow_tdeploy.store.prune import prune, views_home
from tests.bundles import accuracy, fill
from tests.registry_io.models import log, stage


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


@pytest.fixture
def downloads(monkeypatch):
    """What is downloaded, by its path in the model."""
    found, real = [], HttpArtifactRepository._download_file

    def counted(self, remote_file_path, local_path):
        found.append(remote_file_path)
        return real(self, remote_file_path, local_path)

    monkeypatch.setattr(HttpArtifactRepository, "_download_file", counted)
    return found


def test_records_far_away_are_asked_for_once(remote, model, downloads):
    location = locate(log(model).model_uri)
    bundle, fetch = open_records(location, packaging=False)
    assert [str(path) for path in downloads] == ["tdeploy/records.zip", "MLmodel"]
    assert fetch is not None
    assert sorted(bundle.variants) == ["onnx-fp32", "ort-cpu-fp32"]
    assert bundle.evidence("ort-cpu-fp32")
    assert bundle.golden()
    bundle.task()
    assert not (bundle.root.parent / "requirements.txt").exists()
    open_records(location)  # who loads it wants the rest, too
    assert (bundle.root.parent / "requirements.txt").is_file()


def test_what_was_saved_about_the_choice_is_with_the_records(remote, model, tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    location = locate(log(model, model_config={"variant": "onnx-fp32"}).model_uri)
    bundle, _ = open_records(location, packaging=False)
    assert policy_of(bundle, {}).variant == "onnx-fp32"


def test_a_store_that_only_downloads_as_mlflow_does_is_asked_that_way(remote, model, tmp_path, monkeypatch):
    """As Unity Catalog's: what downloads a single file there says nothing and does nothing."""
    location = locate(log(model).model_uri)
    real = HttpArtifactRepository._download_file

    def download(self, artifact_path, dst_path):
        real(self, artifact_path, os.path.join(dst_path, os.path.basename(artifact_path)))
        return os.path.join(dst_path, os.path.basename(artifact_path))

    monkeypatch.setattr(HttpArtifactRepository, "_download_file", lambda *given: None)
    monkeypatch.setattr(HttpArtifactRepository, "download_artifacts", download)
    assert location.download("tdeploy/manifest.json", tmp_path).read_bytes().startswith(b"{")


def test_what_was_added_since_is_fetched_beside_the_pack(remote, model, tmp_path, downloads):
    location = locate(log(model).model_uri)
    append(location.uri, stage(tmp_path / "new", model), tmp_path / "new", [accuracy("onnx-fp16")])
    append_evidence(location, [accuracy("ort-cpu-fp32")])
    downloads.clear()
    bundle, _ = open_records(location, packaging=False)
    assert sorted(bundle.variants) == ["onnx-fp16", "onnx-fp32", "ort-cpu-fp32"]
    assert bundle.evidence("onnx-fp16")
    assert len(bundle.evidence("ort-cpu-fp32")) == 1 + len(Bundle.open(model).evidence("ort-cpu-fp32"))
    first, second, *others = downloads
    assert (first, second) == ("tdeploy/records.zip", "MLmodel")
    assert sorted(path.split("/")[1] for path in others) == ["evidence", "evidence", "variants"]  # and nothing twice


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_records_without_a_pack_that_can_be_read_are_fetched_one_by_one(remote, model, tmp_path, monkeypatch, content):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    location = locate(log(model).model_uri)
    if content is None:  # as an older version has logged it
        location.repository.delete_artifacts("tdeploy/records.zip")
    else:
        (tmp_path / "records.zip").write_bytes(content)
        location.repository.log_artifact(str(tmp_path / "records.zip"), "tdeploy")
    bundle, _ = open_records(location, packaging=False)
    assert sorted(bundle.variants) == ["onnx-fp32", "ort-cpu-fp32"]
    assert bundle.evidence("ort-cpu-fp32")
    assert bundle.golden()


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


def test_fetch_view_puts_the_manifest_last(remote, model, monkeypatch):
    """Another process that finds it there takes the rest for whole."""
    location = locate(log(model).model_uri)
    moved, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b)), real(a, b)))
    root = fetch_view(location).root
    mine = [path.name for path in moved if root.parent in path.parents]
    assert len(mine) > 3
    assert mine[-1] == "manifest.json"


def test_fetch_view_fetches_once_more_what_is_pruned_at_that_moment(remote, model, monkeypatch):
    location = locate(log(model).model_uri)
    opened, original = [], Bundle.open.__func__

    def late(cls, path):
        if "views" in str(path) and not Path(path).name.startswith("."):
            opened.append(path)
            if len(opened) == 1:
                prune(0)
        return original(cls, path)

    monkeypatch.setattr(Bundle, "open", classmethod(late))
    assert set(fetch_view(location).variants) == {"onnx-fp32", "ort-cpu-fp32"}
    assert len(opened) == 2


@pytest.mark.parametrize("moment", ["while it is filled", "after it was filled"])
def test_fetch_view_fetches_once_more_what_is_pruned(remote, model, monkeypatch, moment):
    """While: the folder of the next file is gone. After, by a process that fills it anew: it lacks what came first."""
    location = locate(log(model).model_uri)
    real, moved = os.replace, []

    def replace(source, target):
        if "views" in str(target) and ".tdeploy-" not in str(target):
            moved.append(target)
            if moment == "while it is filled" and len(moved) == 2:
                prune(0)
        real(source, target)
        if moment == "after it was filled" and len(moved) == 2:
            root = next(path for path in Path(target).parents if path.parent == views_home())
            with (root / "open").open("w"):  # its inode is not free yet: the next folder has another one
                prune(0)
                root.mkdir()

    monkeypatch.setattr(os, "replace", replace)
    bundle = fetch_view(location)
    assert set(bundle.variants) == {"onnx-fp32", "ort-cpu-fp32"}
    assert (bundle.root.parent / "MLmodel").is_file()
    assert bundle.golden() is not None


def test_fetch_view_asks_once_for_a_model_that_is_not_there(remote, model, monkeypatch, tmp_path):
    location, asked = locate(log(model).model_uri), []
    repository = location.repository
    monkeypatch.setattr(repository, "list_artifacts", lambda path=None: asked.append(path) or [])
    with pytest.raises(NotFoundError, match="holds no bundle"):
        fetch_view(location)
    assert len(asked) == 1


def test_fetch_view_gives_up_where_it_is_pruned_again_and_again(remote, model, monkeypatch):
    location, original = locate(log(model).model_uri), Bundle.open.__func__

    def late(cls, path):
        if "views" in str(path) and not Path(path).name.startswith("."):
            prune(0)
        return original(cls, path)

    monkeypatch.setattr(Bundle, "open", classmethod(late))
    with pytest.raises(NotFoundError, match="pruned 3 times"):
        fetch_view(location)


def test_fetch_names_the_cache_where_its_disk_is_full(remote, model, small_disk, monkeypatch):
    location = locate(log(model).model_uri)
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(small_disk))
    bundle, fetch = open_records(location)
    fill(small_disk / "rest")
    before = sorted(small_disk.rglob("*"))
    with pytest.raises(StorageError, match="Cannot fetch variant .*'.*small.*TDEPLOY_CACHE_DIR.* is full"):
        open_model(bundle.root, fetch=fetch)
    assert sorted(small_disk.rglob("*")) == before
    with pytest.raises(StorageError, match="Cannot fetch 'models:/.*TDEPLOY_CACHE_DIR.* is full"):
        open_records(replace(location, root=location.root))
    with pytest.raises(MlflowException, match="TDEPLOY_CACHE_DIR") as caught:
        mlflow.tdeploy.load_model(location.uri)
    assert caught.value.error_code == "IO_ERROR"
    assert sorted(small_disk.rglob("*")) == before
