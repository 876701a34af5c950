import os
import shutil
import time

import pytest

from mlflow_tdeploy.store import prune
from mlflow_tdeploy.store.cache import ContentCache
from mlflow_tdeploy.store.disk import own_folder, temporary
from mlflow_tdeploy.store.hashing import record_file
from mlflow_tdeploy.store.layout import ABANDONED_S


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Three contents of 1000 bytes, used one after the other; the oldest and the newest have a view."""
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    cache, records = ContentCache(), []
    for index in range(3):
        (tmp_path / "file").write_bytes(bytes([index]) * 1000)
        record = record_file(tmp_path, "file")
        cache.add(tmp_path / "file", record)
        (tmp_path / "file").unlink()
        records.append(record)
        if index != 1:
            cache.link(record, prune.views_home() / str(index) / "files" / "weights")
        for path in (cache._object(record).with_suffix(".used"), prune.views_home() / str(index)):
            if path.exists():
                os.utime(path, ns=(index, index))
    return cache, records


def test_usage_counts_what_is_shared_once(host):
    assert prune.usage() == prune.Usage(objects=3000, views=2000, engines=0, total=3000)


def test_prune_removes_least_recently_used_objects_and_views_together(host):
    cache, records = host
    assert prune.prune(2000) == 1000
    assert [cache.has(record) for record in records] == [False, True, True]
    assert sorted(path.name for path in prune.views_home().iterdir()) == ["2"]
    assert prune.prune(2000) == 0


def test_prune_keeps_what_was_used_again(host):
    cache, records = host
    cache.use(records[0])
    prune.used(prune.views_home() / "0")
    prune.prune(1000)
    assert [cache.has(record) for record in records] == [True, False, False]
    assert (prune.views_home() / "0" / "files" / "weights").read_bytes() == bytes(1000)


def test_prune_removes_everything_when_nothing_may_be_left(host):
    assert prune.prune(0) == 3000
    assert prune.usage() == prune.Usage(0, 0, 0, 0)
    assert list(prune.views_home().iterdir()) == []


def test_prune_removes_what_killed_processes_left_long_ago_and_nothing_younger(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    leftovers = {}
    for age in (0.0, 2 * ABANDONED_S):
        for folder in (ContentCache()._directory / "ab", prune.views_home()):
            folder.mkdir(parents=True, exist_ok=True)
            path = temporary(folder)
            path.write_bytes(b"half") if folder.name == "ab" else (path.mkdir(), (path / "big").write_bytes(b"half"))
            os.utime(path, (time.time() - age,) * 2)
            leftovers.setdefault(age, []).append(path)
    assert prune.prune(0) == 8
    assert [path.exists() for path in leftovers[2 * ABANDONED_S]] == [False, False]
    assert [path.exists() for path in leftovers[0.0]] == [True, True]


def test_prune_takes_a_view_away_at_once(tmp_path, monkeypatch):
    """Whoever opens it meanwhile must find all of it or nothing."""
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    view = prune.views_home() / "f00d"
    (view / "tdeploy").mkdir(parents=True)
    (view / "tdeploy/manifest.json").write_text("{}")
    seen, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (seen.append(view.exists()), rmtree(path, **how)))
    prune.prune(0)
    assert seen == [False]


def test_prune_sweeps_what_a_killed_download_left_inside_a_view(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path))
    left = prune.views_home() / "key" / "tdeploy" / ".tdeploy-fetch-abc"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(bytes(1000))
    assert prune.prune(10**9) == 0  # whoever downloads may still be at it
    long_ago = time.time() - 2 * ABANDONED_S
    os.utime(left, (long_ago, long_ago))
    assert prune.prune(10**9) == 1000
    assert not left.exists()


def test_engines_that_were_built_here_count_and_are_pruned_with_the_rest(host):
    home = own_folder(prune.ENGINES)
    for name, used in (("old", 0), ("new", 10)):
        (home / name).mkdir(parents=True)
        (home / name / "model.engine").write_bytes(bytes(500))
        os.utime(home / name, ns=(used, used))
    assert prune.usage().engines == 1000
    prune.prune(2500)
    assert [path.name for path in home.iterdir()] == ["new"]
