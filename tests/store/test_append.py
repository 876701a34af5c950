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
from mlflow_tdeploy.store.writer import append_variant
from tests.bundles import WEIGHTS, accuracy, make_bundle
from tests.store.staging import snapshot, stage


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
