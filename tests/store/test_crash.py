"""Kills, races and full disks: real processes, real signals, real file systems."""

import dataclasses
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time

import pytest

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import ConflictError, StorageError
from mlflow_tdeploy.store import hashing, staging
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.cache import ContentCache
from mlflow_tdeploy.store.hashing import HashCache, record_file, record_tree, verify_file
from mlflow_tdeploy.store.staging import staged_directory, workspace
from mlflow_tdeploy.store.writer import append_evidence, append_variant
from tests.bundles import WEIGHTS, accuracy, fill, make_bundle
from tests.forking import end_in_time, forked
from tests.store.staging import snapshot, stage

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
#: The audit events before which a writer may die.
STEPS = frozenset(
    ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree", "os.truncate")
)


def in_child(work, *, kill_before=None):
    """Run ``work`` in a forked child, killed before its n-th file operation; return how it ended.

    Returns:
        0 when it ended well, 3 for a ConflictError, 4 for a StorageError, -9 when it was killed.
    """
    return forked(lambda: _run(work, kill_before))


def _run(work, kill_before):
    left = [kill_before]

    def hook(event, _):
        if event in STEPS and left[0] is not None:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_before is not None:
        sys.addaudithook(hook)
    try:
        work()
    except ConflictError:
        return 3
    except StorageError:
        return 4
    except BaseException:
        return 5
    left[0] = None
    return 0


def test_staged_directory_leaves_all_or_nothing_when_killed_at_any_point(tmp_path):
    finished = make_bundle(tmp_path / "finished")
    for point in range(1, 1000):
        target = tmp_path / str(point) / "model"

        def save(target=target):
            with staged_directory(target) as fresh:
                shutil.copytree(finished, fresh, dirs_exist_ok=True)

        ended = in_child(save, kill_before=point)
        if target.exists():
            bundle = Bundle.open(target)
            bundle.verify(bundle.variants["onnx-fp32"])
            assert len(bundle.golden()) == len(bundle.evidence("onnx-fp32")) == 1
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if not target.exists():
            save()  # what is left over does not stand in the way
    assert point > 20


def test_save_model_leaves_all_or_nothing_when_killed_at_any_point(tmp_path):
    finished = make_bundle(tmp_path / "finished")
    mlflow_tdeploy.save_model(finished, tmp_path / "warm")  # every import is done before the first fork
    count = _steps(lambda: mlflow_tdeploy.save_model(finished, tmp_path / "counted"))
    seen = set()
    for point in sorted({*range(1, count, max(1, count // 12)), *range(count - 6, count + 1)}):
        target = tmp_path / str(point) / "model"

        def save(target=target):
            mlflow_tdeploy.save_model(finished, target)

        assert in_child(save, kill_before=point) in (-signal.SIGKILL, 0)
        seen.add(target.exists())
        if target.exists():
            with mlflow_tdeploy.load_model(str(target)) as model:
                assert model.decision.chosen.variant == "onnx-fp32"
            assert (target / "MLmodel").is_file()
            assert (target / "requirements.txt").is_file()
        else:
            save()  # what is left over does not stand in the way
            assert Bundle.open(target).variants
    assert seen == {True, False}


def _steps(work):
    """Return how many file operations ``work`` does, counted in a child of its own."""
    read, write = os.pipe()

    def counted():
        count = [0]
        sys.addaudithook(lambda event, _: count.__setitem__(0, count[0] + (event in STEPS)))
        work()
        os.write(write, str(count[0]).encode())

    assert in_child(counted) == 0
    os.close(write)
    with os.fdopen(read) as file:
        return int(file.read())


def test_append_variant_leaves_all_or_nothing_when_killed_at_any_point(tmp_path):
    variant = stage(tmp_path / "staged", "ort-cpu-fp32")
    seen = set()
    for point in range(1, 1000):
        root = make_bundle(tmp_path / str(point)) / "tdeploy"
        before = snapshot(root)

        def append(root=root):
            append_variant(root, variant, tmp_path / "staged", [accuracy(variant.id)])

        ended = in_child(append, kill_before=point)
        bundle = Bundle.open(root)
        whole = variant.id in bundle.variants
        seen.add(whole)
        _check(bundle, before, variant if whole else None)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        assert in_child(append) == (3 if whole else 0)  # the next appender is not blocked
        bundle.reload()
        _check(bundle, before, variant)
    assert point > 20
    assert seen == {True, False}


def _check(bundle, before, added):
    after = snapshot(bundle.root)
    assert {name: after[name] for name in before} == before
    bundle.verify(bundle.variants["onnx-fp32"])
    if added:
        bundle.verify(bundle.variants[added.id])
        assert bundle.evidence(added.id)


def test_append_evidence_leaves_whole_records_when_killed_at_any_point(tmp_path):
    root = make_bundle(tmp_path) / "tdeploy"
    bundle = Bundle.open(root)
    for point in range(1, 100):
        count = len(bundle.evidence("onnx-fp32"))
        ended = in_child(lambda: append_evidence(root, accuracy("onnx-fp32")), kill_before=point)
        bundle.reload()
        assert len(bundle.evidence("onnx-fp32")) in (count, count + 1)
        if ended == 0:
            break
    assert point > 3


def _race(works):
    """Run every work in a process of its own, all let go at once; return how each ended."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(works))

    def start(work):
        end_in_time(60)
        barrier.wait()
        os._exit(_run(work, None))

    processes = [context.Process(target=start, args=(work,)) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_append_variant_lets_one_win_when_two_add_the_same_id_at_once(tmp_path):
    staged = [tmp_path / f"staged{index}" for index in range(2)]
    variants = [stage(folder, "ort-cpu-fp32", WEIGHTS * index) for index, folder in enumerate(staged)]
    for turn in range(10):
        root = make_bundle(tmp_path / str(turn)) / "tdeploy"
        works = [
            lambda index=index, root=root: append_variant(
                root, variants[index], staged[index], [accuracy("ort-cpu-fp32", created=str(index))]
            )
            for index in range(2)
        ]
        ended = _race(works)
        assert sorted(ended) == [0, 3]
        bundle = Bundle.open(root)
        winner = ended.index(0)
        assert bundle.variants["ort-cpu-fp32"].digest == variants[winner].digest
        bundle.verify(bundle.variants["ort-cpu-fp32"])
        assert [record.created for record in bundle.evidence("ort-cpu-fp32")] == [str(winner)]
        assert not list(root.rglob(".tdeploy-*"))


def test_append_variant_adds_both_when_two_add_different_ids_at_once(tmp_path):
    ids = ["ort-cpu-fp32", "ort-cpu-int8"]
    variants = [stage(tmp_path / variant_id, variant_id) for variant_id in ids]
    for turn in range(10):
        root = make_bundle(tmp_path / str(turn)) / "tdeploy"
        works = [
            lambda variant=variant, root=root: append_variant(
                root, variant, tmp_path / variant.id, [accuracy(variant.id)]
            )
            for variant in variants
        ]
        assert _race(works) == [0, 0]
        bundle = Bundle.open(root)
        assert sorted(bundle.variants) == ["onnx-fp32", *ids]
        for variant in variants:
            bundle.verify(bundle.variants[variant.id])
            assert len(bundle.evidence(variant.id)) == 1


def test_staged_directory_lets_one_win_when_two_save_to_one_path_at_once(tmp_path):
    for turn in range(10):
        target = tmp_path / str(turn) / "model"

        def save(index, target=target):
            with staged_directory(target) as fresh:
                (fresh / "a").write_text(str(index))
                (fresh / "b").write_text(str(index))

        ended = _race([lambda index=index, save=save: save(index) for index in range(2)])
        assert sorted(ended) == [0, 3]
        assert (target / "a").read_text() == (target / "b").read_text() == str(ended.index(0))
        assert os.listdir(target.parent) == ["model"]


# Full disks


@pytest.fixture
def big(tmp_path):
    """A new variant of two MiB."""
    variant = stage(tmp_path / "staged", "ort-cpu-fp32")
    (tmp_path / "staged" / "files" / variant.id / "model.onnx.data").write_bytes(bytes(2 << 20))
    return dataclasses.replace(variant, files=record_tree(tmp_path / "staged", f"files/{variant.id}"))


def test_staged_directory_leaves_nothing_when_disk_is_full(small_disk):
    full = pytest.raises(StorageError, match=r"Cannot write '.*model': the disk .* is full")
    with full, staged_directory(small_disk / "model") as fresh:
        (fresh / "weights").write_bytes(bytes(2 << 20))
    assert os.listdir(small_disk) == []


def test_append_variant_leaves_bundle_as_it_was_when_disk_is_full(small_disk, tmp_path, big):
    root = make_bundle(small_disk) / "tdeploy"
    before = snapshot(root)
    with pytest.raises(StorageError, match=r"Cannot write '.*files/ort-cpu-fp32/.*is full"):
        append_variant(root, big, tmp_path / "staged", [accuracy(big.id)])
    assert snapshot(root) == before
    assert not list(root.rglob(".tdeploy-*"))


def test_append_evidence_leaves_nothing_when_disk_is_full(small_disk):
    root = make_bundle(small_disk) / "tdeploy"
    fill(small_disk / "rest")
    before = snapshot(root)
    with pytest.raises(StorageError, match="is full"):
        append_evidence(root, accuracy("onnx-fp32"))
    assert snapshot(root) == before


def test_content_cache_leaves_nothing_when_disk_is_full(small_disk, tmp_path):
    (tmp_path / "a").write_bytes(bytes(2 << 20))
    record = record_file(tmp_path, "a")
    with pytest.raises(StorageError, match="TDEPLOY_CACHE_DIR"):
        ContentCache(small_disk).add(tmp_path / "a", record)
    assert not ContentCache(small_disk).has(record)
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_hash_cache_is_ignored_when_disk_is_full(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "_YOUNG_NS", 0)
    (tmp_path / "a").write_bytes(b"content")
    fill(small_disk / "rest")
    verify_file(tmp_path / "a", record_file(tmp_path, "a"), HashCache(small_disk))


def test_append_variant_leaves_bundle_as_it_was_when_file_size_is_limited(tmp_path, big, monkeypatch):
    root = make_bundle(tmp_path / "model") / "tdeploy"
    before = snapshot(root)

    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    def append():
        monkeypatch.setattr(os, "link", refuse)  # in the child only: a link would need no space
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        append_variant(root, big, tmp_path / "staged", [])

    assert in_child(append) == 4
    assert snapshot(root) == before
    assert not list(root.rglob(".tdeploy-*"))


def test_a_folder_that_is_made_and_not_locked_yet_is_left_alone(tmp_path):
    """Between the two calls another writer may look for leftovers."""
    made = tmp_path / f".tdeploy-{'0' * 16}-{staging._host()}"
    made.mkdir()
    with staged_directory(tmp_path / "model"):
        pass
    assert made.exists()
    os.utime(made, (time.time() - 60,) * 2)
    with staged_directory(tmp_path / "other"):
        pass
    assert not made.exists()


def test_what_a_killed_process_of_this_host_left_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_UNLOCKED_S", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def work():
        with staged_directory(tmp_path / "model") as fresh, workspace() as folder:
            (fresh / "large").write_bytes(b"x")
            (folder / "large").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    assert len(list(tmp_path.rglob("large"))) == 2
    with staged_directory(tmp_path / "other"), workspace() as mine:
        with workspace() as another:  # whose process lives is left alone
            assert mine != another
        assert mine.is_dir()
        assert not list(tmp_path.rglob("large"))
    assert not mine.exists()
