import os
import threading
import time

import pytest

from mlflow_tdeploy.core.errors import IntegrityError, NotFoundError
from mlflow_tdeploy.store.cache import ContentCache
from mlflow_tdeploy.store.hashing import record_file


@pytest.fixture
def cache(tmp_path):
    return ContentCache(tmp_path / "objects")


def _file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name, record_file(tmp_path, name)


def test_link_gives_the_content_that_was_added(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content")
    assert not cache.has(record)
    cache.add(path, record)
    path.unlink()
    assert cache.has(record)
    cache.link(record, tmp_path / "view" / "files" / "a")
    assert (tmp_path / "view" / "files" / "a").read_bytes() == b"content"


def test_add_keeps_nothing_when_content_is_not_what_the_record_says(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content")
    path.write_bytes(b"tampere")
    with pytest.raises(IntegrityError, match="was changed"):
        cache.add(path, record)
    assert not cache.has(record)
    assert not [p for p in (tmp_path / "objects").rglob("*") if p.is_file()]


def test_has_is_false_when_the_object_is_truncated(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content")
    cache.add(path, record)
    path.unlink()
    os.truncate(cache._object(record), 3)
    assert not cache.has(record)
    path.write_bytes(b"content")
    cache.add(path, record)  # and it mends itself
    assert cache.has(record)


def test_link_says_fetch_when_content_is_not_here(tmp_path, cache):
    _, record = _file(tmp_path, "a", b"content")
    with pytest.raises(NotFoundError, match="Fetch"):
        cache.link(record, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_link_forgets_a_content_when_it_was_damaged(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content")
    cache.add(path, record)
    path.write_bytes(b"changed")  # the same inode
    with pytest.raises(NotFoundError, match="damaged in the cache"):
        cache.link(record, tmp_path / "b")
    assert not cache.has(record)
    assert not (tmp_path / "b").exists()


def test_link_leaves_ctime_alone_when_target_is_linked_already(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content")
    cache.add(path, record)
    cache.link(record, tmp_path / "b")
    before = (tmp_path / "b").stat().st_ctime_ns
    time.sleep(0.02)
    cache.link(record, tmp_path / "b")
    assert (tmp_path / "b").stat().st_ctime_ns == before


def test_link_replaces_when_target_has_other_content(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content")
    cache.add(path, record)
    (tmp_path / "b").write_bytes(b"partial")
    cache.link(record, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"


def test_discard_forgets_a_content(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content")
    cache.add(path, record)
    cache.discard(record)
    assert not cache.has(record)


def test_default_folder_is_below_the_chosen_one_when_environment_names_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "chosen"))
    path, record = _file(tmp_path, "a", b"content")
    ContentCache().add(path, record)
    assert (tmp_path / "chosen" / "objects" / record.sha256[:2] / record.sha256).read_bytes() == b"content"


def test_add_and_link_are_whole_when_many_threads_work_at_once(tmp_path, cache):
    path, record = _file(tmp_path, "a", b"content" * 10_000)
    failures = []

    def work(index):
        try:
            for turn in range(20):
                cache.add(path, record)
                cache.link(record, tmp_path / f"view{index}-{turn}")
                assert (tmp_path / f"view{index}-{turn}").stat().st_size == record.size
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not list(tmp_path.rglob(".tdeploy-*"))
