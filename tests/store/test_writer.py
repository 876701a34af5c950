import os
import time
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.staging import staged_directory
from mlflow_tdeploy.store.writer import BundleDraft, append_evidence, evidence_name
from tests.bundles import accuracy

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


def test_staged_directory_refuses_a_mount_point_before_anything_is_made(tmp_path, monkeypatch):
    """An empty volume of a container looks like any empty folder, and nothing can be renamed to it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with (
        pytest.raises(InvalidInputError, match="mount point.*Choose a folder inside it"),
        staged_directory(tmp_path / "volume"),
    ):
        pytest.fail("nothing may be built")


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


def test_staged_directory_says_which_part_of_the_path_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(InvalidInputError, match=r"/file' is a file\. Choose another path")
    with refused, staged_directory(tmp_path / "file" / "model"):
        pass
