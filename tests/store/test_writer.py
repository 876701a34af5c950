import dataclasses
import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.store import disk, writer
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import record_tree
from mlflow_tdeploy.store.writer import (
    BundleDraft,
    append_evidence,
    append_variant,
    evidence_name,
    staged_directory,
)
from tests.bundles import WEIGHTS, accuracy, linear_graph, make_bundle


@pytest.fixture
def root(tmp_path):
    return make_bundle(tmp_path / "model") / "tdeploy"


def stage(folder, variant_id, weights=WEIGHTS):
    """Return a new variant whose files lie below ``folder``."""
    linear_graph(folder / "files" / variant_id / "model.onnx", weights)
    base = next(iter(Bundle.open(make_bundle(folder / "base")).variants.values()))
    files = record_tree(folder, f"files/{variant_id}")
    return dataclasses.replace(base, id=variant_id, entry=f"files/{variant_id}/model.onnx", files=files)


@pytest.fixture
def staged(tmp_path):
    return tmp_path / "staged"


@pytest.fixture
def variant(staged):
    return stage(staged, "ort-cpu-fp32")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# staged_directory


@pytest.mark.parametrize("exists", [False, True])
def test_staged_directory_becomes_target_when_block_ends(tmp_path, exists):
    target = tmp_path / "a" / "model"
    if exists:
        target.mkdir(parents=True)
    with staged_directory(target) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "x").write_text("content")
        assert fresh.parent == target.parent
        assert not (target / "sub").exists()
    assert (target / "sub" / "x").read_text() == "content"
    assert os.listdir(target.parent) == ["model"]


def test_staged_directory_removes_what_a_killed_writer_left_long_ago(tmp_path):
    def staged(name, *, seconds_ago):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x").write_text("content")
        for path in (folder / "sub" / "x", folder / "sub", folder):
            os.utime(path, (time.time() - seconds_ago,) * 2)

    staged(".tdeploy-0123456789abcdef", seconds_ago=7200)
    staged(".tdeploy-0123456789abcde0", seconds_ago=60)  # perhaps another host is writing there
    staged(".tdeploy-mine", seconds_ago=7200)  # no name of ours
    with staged_directory(tmp_path / "first") as fresh:
        for path in (fresh, *fresh.rglob("*")):
            os.utime(path, (time.time() - 7200,) * 2)  # slow, and alive
        with staged_directory(tmp_path / "second"):
            pass
    assert sorted(os.listdir(tmp_path)) == [".tdeploy-0123456789abcde0", ".tdeploy-mine", "first", "second"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_staged_directory_leaves_nothing_when_block_raises(tmp_path, error):
    def save():
        with staged_directory(tmp_path / "model") as fresh:
            (fresh / "x").write_text("content")
            raise error

    with pytest.raises(error):
        save()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("taken", ["file", "folder", "dangling link"])
def test_staged_directory_refuses_when_target_is_taken(tmp_path, taken):
    target = tmp_path / "model"
    if taken == "file":
        target.write_text("mine")
    elif taken == "folder":
        target.mkdir()
        (target / "x").write_text("mine")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(ConflictError, match=r"model' exists already"), staged_directory(target):
        pytest.fail("not reached")
    assert os.listdir(tmp_path) == ["model"]


def test_staged_directory_keeps_the_other_when_target_appears_meanwhile(tmp_path):
    target = tmp_path / "model"

    def save():
        with staged_directory(target) as fresh:
            (fresh / "x").write_text("ours")
            target.mkdir()
            (target / "x").write_text("theirs")

    with pytest.raises(ConflictError, match="in the meantime"):
        save()
    assert (target / "x").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["model"]


def test_staged_directory_is_readable_as_the_umask_says(tmp_path):
    with staged_directory(tmp_path / "model"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_staged_directory_hits_the_target_when_the_block_changes_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with staged_directory("model"):
        os.chdir(tmp_path / "other")
    assert (tmp_path / "model").is_dir()


# BundleDraft


def test_draft_refuses_when_folder_holds_something(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ConflictError):
        BundleDraft(tmp_path)


def test_draft_refuses_a_second_manifest_and_a_second_record(root):
    bundle = Bundle.open(root)
    draft = BundleDraft.__new__(BundleDraft)
    draft.root = root
    with pytest.raises(ConflictError):
        draft.write_manifest(bundle.manifest)
    with pytest.raises(ConflictError):
        draft.write_variant(bundle.variants["onnx-fp32"])


def test_write_variant_refuses_when_a_file_is_not_there_as_recorded(tmp_path, variant):
    draft = BundleDraft(tmp_path / "tdeploy")
    with pytest.raises(IntegrityError, match=r"files/ort-cpu-fp32/model\.onnx' is not there"):
        draft.write_variant(variant)
    assert not list((tmp_path / "tdeploy").rglob("*.json"))


def test_write_golden_is_empty_when_there_are_no_requests(tmp_path):
    assert BundleDraft(tmp_path / "tdeploy").write_golden(()) == ()
    assert os.listdir(tmp_path / "tdeploy") == []


# append_evidence


def test_append_evidence_returns_its_path(root):
    path = append_evidence(root, accuracy("onnx-fp32"))
    assert path.startswith("evidence/onnx-fp32/")
    assert (root / path).is_file()


def test_append_evidence_refuses_when_variant_has_no_record(root):
    with pytest.raises(NotFoundError, match="no variant 'trt-fp16'"):
        append_evidence(root, accuracy("trt-fp16"))
    assert not (root / "evidence" / "trt-fp16").exists()


def test_evidence_name_is_unique_and_sorts_by_time():
    names = [evidence_name() for _ in range(200)]
    assert len(set(names)) == 200
    stamps = [name.split("-")[0] for name in names]
    assert stamps == sorted(stamps)


# append_variant


def test_append_variant_adds_without_touching_a_file(root, staged, variant):
    before = snapshot(root)
    added = append_variant(root, variant, staged, [accuracy(variant.id), accuracy(variant.id)])
    after = snapshot(root)
    assert {name: after[name] for name in before} == before
    bundle = Bundle.open(root)
    assert bundle.variants[variant.id] == added
    assert added.digest == variant.digest
    bundle.verify(bundle.variants[variant.id])
    assert len(bundle.evidence(variant.id)) == 2
    assert not list(root.rglob(".tdeploy-*"))
    shutil.rmtree(staged)
    bundle.verify(bundle.variants[variant.id])


def test_append_variant_adds_a_record_only_when_files_were_dropped(root, variant):
    append_variant(root, dataclasses.replace(variant, files=()), None, [accuracy(variant.id, passed=False)])
    bundle = Bundle.open(root)
    assert bundle.variants[variant.id].dropped
    assert not (root / "files" / variant.id).exists()
    assert bundle.evidence(variant.id)[0].passed is False


def test_append_variant_refuses_when_id_is_taken(root, staged):
    again = stage(staged, "onnx-fp32", WEIGHTS * 2)
    before = snapshot(root)
    with pytest.raises(ConflictError, match="'onnx-fp32' already"):
        append_variant(root, again, staged, [accuracy("onnx-fp32")])
    assert snapshot(root) == before


@pytest.mark.parametrize("damage", ["truncate", "change", "remove"])
def test_append_variant_changes_nothing_when_a_staged_file_is_damaged(root, staged, variant, damage):
    path, before = staged / variant.entry, snapshot(root)
    if damage == "truncate":
        os.truncate(path, 3)
    elif damage == "change":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=r"model\.onnx'"):
        append_variant(root, variant, staged, [])
    assert snapshot(root) == before


def test_append_variant_refuses_when_a_staged_file_is_a_link_outside(root, staged, variant, tmp_path):
    os.rename(staged / variant.entry, tmp_path / "elsewhere.onnx")
    (staged / variant.entry).symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(IntegrityError, match="leads out"):
        append_variant(root, variant, staged, [])


def test_append_variant_refuses_when_a_new_file_is_elsewhere(root, staged, variant):
    moved = dataclasses.replace(variant.files[0], path="files/onnx-fp32/model.onnx")
    with pytest.raises(InvalidInputError, match="must be below 'files/ort-cpu-fp32/'"):
        append_variant(root, dataclasses.replace(variant, files=(moved,)), staged, [])


def test_append_variant_refuses_when_evidence_is_about_another(root, staged, variant):
    with pytest.raises(InvalidInputError, match="Evidence about 'onnx-fp32'"):
        append_variant(root, variant, staged, [accuracy("onnx-fp32")])


def test_append_variant_refuses_when_there_is_no_bundle(tmp_path, staged, variant):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="holds no bundle"):
        append_variant(tmp_path / "empty", variant, staged, [])
    assert os.listdir(tmp_path / "empty") == []


def test_append_variant_removes_what_a_killed_appender_left_long_ago_and_nothing_younger(root, staged, variant):
    home = root / "files" / variant.id
    torn = root / "variants" / ".tdeploy-0123456789abcdef"
    torn.write_text("{")
    os.utime(torn, (1, 1))
    for name, age in (("0ld", 7200), ("f00d", 0), (".tdeploy-0123456789abcdef", 7200)):
        (home / name).mkdir(parents=True)
        (home / name / "model.onnx").write_text("of a killed one, or of one that is at work")
        then = time.time() - age
        for path in (home / name / "model.onnx", home / name):
            os.utime(path, (then, then))
    added = append_variant(root, variant, staged, [accuracy(variant.id)])
    assert {path.name for path in home.iterdir()} == {"f00d", Path(added.entry).parts[2]}
    assert not torn.exists()
    Bundle.open(root).verify(added)


def test_append_variant_keeps_old_files_that_are_in_the_bundle_already(root, variant, staged):
    shutil.copytree(staged / "files" / variant.id, root / "files" / variant.id / "0ld")
    there = writer.moved(variant, f"files/{variant.id}/0ld")
    for path in (root / "files" / variant.id / "0ld").rglob("*"):
        os.utime(path, (1, 1))
    os.utime(root / "files" / variant.id / "0ld", (1, 1))
    append_variant(root, there, None, [])
    Bundle.open(root).verify(there)


def test_append_variant_keeps_files_when_it_cannot_look_at_the_record(root, staged, variant, monkeypatch):
    real, path = writer.write_once, Path.read_bytes

    def interrupted(target, content):
        real(target, content)
        if target.parent.name == "variants":
            monkeypatch.setattr(Path, "read_bytes", refused)
            raise KeyboardInterrupt

    def refused(self):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(writer, "write_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_variant(root, variant, staged, [])
    monkeypatch.setattr(Path, "read_bytes", path)
    bundle = Bundle.open(root)
    bundle.verify(bundle.variants[variant.id])


def test_append_variant_gives_files_back_to_one_that_only_slept(root, staged, variant, monkeypatch):
    other = stage(staged.parent / "other", variant.id, WEIGHTS * 2)
    sleeper = append_variant(make_bundle(staged.parent / "twin") / "tdeploy", other, staged.parent / "other", [])
    shutil.copytree(staged.parent / "twin/tdeploy/files" / variant.id, root / "files" / variant.id)
    for path in (root / "files" / variant.id).rglob("*"):
        os.utime(path, (1, 1))
    real = os.rename

    def ends_meanwhile(source, target):
        real(source, target)
        if ".tdeploy-" in str(target):
            record = root / "variants" / f"{variant.id}.json"
            if not record.exists():
                record.write_text(to_json(sleeper))

    monkeypatch.setattr(writer.os, "rename", ends_meanwhile)
    with pytest.raises(ConflictError):
        append_variant(root, variant, staged, [])
    bundle = Bundle.open(root)
    bundle.verify(bundle.variants[variant.id])


def test_append_variant_stamps_evidence_with_the_files_it_is_about(root, staged, variant):
    append_variant(root, variant, staged, [accuracy(variant.id)])
    (record,) = Bundle.open(root).evidence(variant.id)
    assert record.files == variant.digest


def test_append_variant_keeps_the_files_when_an_interrupt_comes_right_after_the_record(
    root, staged, variant, monkeypatch
):
    real = writer.write_once

    def interrupted(path, content):
        real(path, content)
        if path.parent.name == "variants":
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_variant(root, variant, staged, [accuracy(variant.id)])
    bundle = Bundle.open(root)
    bundle.verify(bundle.variants[variant.id])
    assert bundle.evidence(variant.id)


def test_append_variant_takes_its_own_files_back_and_no_others_when_somebody_was_first(
    root, staged, variant, monkeypatch
):
    """The other appender's record appears between the look at it and our own."""
    real, other = writer._refuse_recorded, stage(staged.parent / "other", variant.id, WEIGHTS * 2)
    first = []

    def late(root, variant_id):
        real(root, variant_id)
        if not first:
            first.append(True)
            first.append(append_variant(root, other, staged.parent / "other", [accuracy(variant.id)]))

    monkeypatch.setattr(writer, "_refuse_recorded", late)
    with pytest.raises(ConflictError, match="'ort-cpu-fp32' already"):
        append_variant(root, variant, staged, [accuracy(variant.id)])
    bundle = Bundle.open(root)
    assert bundle.variants[variant.id] == first[1]
    bundle.verify(first[1])
    assert len(bundle.evidence(variant.id)) == 1
    assert len(list((root / "files" / variant.id).iterdir())) == 1


def test_append_variant_copies_and_verifies_when_there_are_no_hard_links(root, staged, variant, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    monkeypatch.setattr(disk.os, "link", refuse)
    added = append_variant(root, variant, staged, [accuracy(variant.id)])
    Bundle.open(root).verify(added)
    assert not os.path.samefile(staged / variant.entry, root / added.entry)


def test_append_variant_changes_nothing_when_a_copy_is_damaged_on_the_way(root, staged, variant, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    before = snapshot(root)
    monkeypatch.setattr(disk.os, "link", refuse)
    monkeypatch.setattr(disk.shutil, "copyfileobj", lambda read, write, _: write.write(bytes(len(read.read()))))
    with pytest.raises(IntegrityError, match="was changed"):
        append_variant(root, variant, staged, [])
    assert snapshot(root) == before


def test_append_variant_takes_its_files_back_when_the_record_cannot_be_written(root, staged, variant):
    before = snapshot(root)
    bad = dataclasses.replace(variant, session={"limit": float("nan")})
    with pytest.raises(Exception, match="JSON"):
        append_variant(root, bad, staged, [accuracy(variant.id)])
    assert snapshot(root) == before
    assert isinstance(bad, Variant)
    append_variant(root, variant, staged, [])
