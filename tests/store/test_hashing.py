import hashlib
import os
import time

import pytest

from mlflow_tdeploy.core.errors import IntegrityError
from mlflow_tdeploy.store import hashing
from mlflow_tdeploy.store.hashing import HashCache, record_file, record_tree, sha256_file, verify_file


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "files" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 8192)  # 2 MiB: more than one piece
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "_YOUNG_NS", 0)
    return HashCache(tmp_path / "cache")


def test_sha256_file_is_the_digest_when_file_has_several_pieces(weights):
    assert sha256_file(weights) == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_record_file_describes_content(tmp_path, weights):
    record = record_file(tmp_path, "files/model.onnx")
    assert (record.path, record.size) == ("files/model.onnx", 2 << 20)
    assert record.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_record_tree_is_sorted_and_recursive(tmp_path, weights):
    (weights.parent / "b" / "c").mkdir(parents=True)
    (weights.parent / "b" / "c" / "x").write_bytes(b"x")
    (weights.parent / "a").write_bytes(b"")
    assert [r.path for r in record_tree(tmp_path, "files")] == ["files/a", "files/b/c/x", "files/model.onnx"]


def test_record_tree_refuses_when_a_link_leads_out(tmp_path, weights):
    root = tmp_path / "bundle"
    (root / "files").mkdir(parents=True)
    (root / "files" / "link").symlink_to(weights)
    with pytest.raises(IntegrityError, match="leads out"):
        record_tree(root, "files")


def test_record_tree_refuses_when_a_folder_is_a_link(tmp_path, weights):
    (tmp_path / "files" / "loop").symlink_to(tmp_path / "files")
    with pytest.raises(IntegrityError, match="files/loop"):
        record_tree(tmp_path, "files")


def test_record_file_does_not_wait_when_it_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match="not a plain file"):
        record_file(tmp_path, "pipe")


def test_verify_file_says_missing_when_file_is_missing(tmp_path, weights):
    record = record_file(tmp_path, "files/model.onnx")
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"model\.onnx' is missing"):
        verify_file(weights, record)


def test_verify_file_says_size_when_file_is_truncated(tmp_path, weights):
    record = record_file(tmp_path, "files/model.onnx")
    os.truncate(weights, 1000)
    with pytest.raises(IntegrityError, match=r"model\.onnx' has 1000 bytes, its record says 2097152"):
        verify_file(weights, record)


def test_verify_file_says_changed_when_a_byte_differs(tmp_path, weights):
    record = record_file(tmp_path, "files/model.onnx")
    _flip(weights)
    with pytest.raises(IntegrityError, match=r"model\.onnx' was changed"):
        verify_file(weights, record)


def test_verify_file_uses_the_cache_when_file_is_unchanged(weights, tmp_path, cache):
    record = record_file(tmp_path, "files/model.onnx")
    verify_file(weights, record, cache)
    assert HashCache(tmp_path / "cache").get(weights, weights.stat()) == record.sha256
    cache.put(weights, weights.stat(), "0" * 64)
    with pytest.raises(IntegrityError, match="0000"):  # so the digest came from the cache, not from the content
        verify_file(weights, record, cache)


def test_verify_file_notices_when_a_tamper_keeps_size_and_mtime(tmp_path, weights, cache):
    record = record_file(tmp_path, "files/model.onnx")
    verify_file(weights, record, cache)
    before = weights.stat()
    time.sleep(0.02)
    _flip(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (weights.stat().st_mtime_ns, weights.stat().st_size) == (before.st_mtime_ns, before.st_size)
    with pytest.raises(IntegrityError, match="was changed"):
        verify_file(weights, record, cache)


def test_verify_file_notices_when_file_is_replaced_by_another_of_same_size_and_times(tmp_path, weights, cache):
    record = record_file(tmp_path, "files/model.onnx")
    verify_file(weights, record, cache)
    before = weights.stat()
    other = weights.with_name("other")
    other.write_bytes(weights.read_bytes())
    _flip(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, weights)
    with pytest.raises(IntegrityError, match="was changed"):
        verify_file(weights, record, cache)


def test_put_remembers_nothing_when_file_is_young(tmp_path, weights):
    cache = HashCache(tmp_path / "cache")
    verify_file(weights, record_file(tmp_path, "files/model.onnx"), cache)
    assert cache.get(weights, weights.stat()) is None


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 130, b"0" * 64 + b" " + b"1" * 64])
def test_get_ignores_an_entry_when_it_is_torn(tmp_path, weights, cache, content):
    record = record_file(tmp_path, "files/model.onnx")
    verify_file(weights, record, cache)
    (entry,) = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    entry.write_bytes(content)
    assert cache.get(weights, weights.stat()) is None
    verify_file(weights, record, cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_get_ignores_an_entry_when_another_user_wrote_it(tmp_path, weights, cache):
    verify_file(weights, record_file(tmp_path, "files/model.onnx"), cache)
    (entry,) = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    os.chown(entry, 12345, 12345)
    assert cache.get(weights, weights.stat()) is None


def test_verify_file_works_when_the_cache_cannot_be_written(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(hashing, "_YOUNG_NS", 0)
    (tmp_path / "file").write_text("")
    verify_file(weights, record_file(tmp_path, "files/model.onnx"), HashCache(tmp_path / "file" / "below"))


def test_hash_cache_lies_below_the_chosen_folder_when_environment_names_one(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(hashing, "_YOUNG_NS", 0)
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "chosen"))
    verify_file(weights, record_file(tmp_path, "files/model.onnx"), HashCache())
    assert any(p.is_file() for p in (tmp_path / "chosen" / "hashes").rglob("*"))


def _flip(path):
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"\xff")
