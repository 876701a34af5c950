import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import ConflictError, StorageError
from mlflow_tdeploy.store import disk
from mlflow_tdeploy.store.disk import cache_home, link_or_copy, own_folder, storage_errors, write_once
from mlflow_tdeploy.store.staging import staged_directory


@pytest.fixture
def no_hard_links(monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted", str(source))

    monkeypatch.setattr(disk.os, "link", refuse)


def test_write_once_makes_folder_and_file(tmp_path):
    write_once(tmp_path / "a" / "b.json", b"{}")
    assert (tmp_path / "a" / "b.json").read_bytes() == b"{}"
    assert os.listdir(tmp_path / "a") == ["b.json"]


def test_write_once_keeps_the_first_when_name_is_taken(tmp_path):
    write_once(tmp_path / "x", b"first")
    with pytest.raises(ConflictError, match="never overwritten"):
        write_once(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.usefixtures("no_hard_links")
def test_write_once_is_exclusive_when_file_system_has_no_hard_links(tmp_path):
    write_once(tmp_path / "x", b"first")
    with pytest.raises(ConflictError):
        write_once(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.usefixtures("no_hard_links")
def test_write_once_names_the_claim_when_a_writer_without_hard_links_was_killed(tmp_path):
    (tmp_path / ".tdeploy-claim-x").touch()
    with pytest.raises(ConflictError, match=r"remove '.*\.tdeploy-claim-x'"):
        write_once(tmp_path / "x", b"content")
    assert not (tmp_path / "x").exists()


def test_write_once_is_readable_as_the_umask_says(tmp_path):
    write_once(tmp_path / "x", b"")
    (tmp_path / "plain").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.usefixtures("no_hard_links")
def test_link_or_copy_copies_when_file_system_has_no_hard_links(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert link_or_copy(tmp_path / "a", tmp_path / "b") is False
    assert (tmp_path / "b").read_bytes() == b"content"
    with pytest.raises(FileExistsError):
        link_or_copy(tmp_path / "a", tmp_path / "b")


def test_link_or_copy_links_where_it_can(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert link_or_copy(tmp_path / "a", tmp_path / "b") is True
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Quota exceeded"),
        RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ],
)
def test_storage_errors_says_full_when_disk_is_full(error):
    with pytest.raises(StorageError, match="Cannot write 'x': the disk .* is full"), storage_errors("write 'x'"):
        raise error


def test_storage_errors_names_the_file_when_access_is_refused():
    with pytest.raises(StorageError, match="Read-only.*'/ro/file'"), storage_errors("write 'x'"):
        raise OSError(errno.EROFS, "Read-only file system", "/ro/file")


def test_storage_errors_leaves_other_errors_alone():
    with pytest.raises(KeyError), storage_errors("write 'x'"):
        raise KeyError("x")


def test_cache_home_is_absolute_when_user_has_no_home(monkeypatch):
    monkeypatch.delenv("TDEPLOY_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does without HOME and passwd entry
    assert cache_home().is_absolute()


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """A user without a home; returns the folder that anybody could have made for the cache."""
    monkeypatch.delenv("TDEPLOY_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: str(tmp_path))
    disk._private.cache_clear()
    return tmp_path / f"mlflow_tdeploy-{os.geteuid()}"


def test_cache_home_is_readable_by_this_user_only_when_user_has_no_home(no_home):
    assert cache_home() == no_home
    assert no_home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("whose", ["writable by all", "a link", "somebody else's"])
def test_cache_home_is_a_private_folder_when_somebody_else_made_the_usual_one(no_home, tmp_path, monkeypatch, whose):
    if whose == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        no_home.symlink_to(tmp_path / "theirs")
    else:
        no_home.mkdir()
        no_home.chmod(0o777 if whose == "writable by all" else 0o755)
    if whose == "somebody else's":
        if os.geteuid() != 0:
            pytest.skip("giving a folder away needs root")
        os.chown(no_home, 4321, 4321)
    found = cache_home()
    assert found != no_home
    assert found.stat().st_mode & 0o777 == 0o700
    assert cache_home() == found  # the same one all the time


def test_own_folder_is_private_when_the_cache_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "file"))
    folder = own_folder("views")
    assert folder.is_dir()
    assert (tmp_path / "file") not in folder.parents


def test_cache_home_is_the_chosen_folder_when_environment_names_one(monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", "/somewhere")
    assert cache_home() == Path("/somewhere")


def test_write_once_has_the_content_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    """A machine that loses power must not come back with a record that is empty."""
    calls = []

    def traced(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            what = arguments[0]
            calls.append((name, stat.S_ISDIR(os.fstat(what).st_mode)) if name == "fsync" else name)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "link", "rename", "replace"):
        monkeypatch.setattr(os, name, traced(name))
    write_once(tmp_path / "record.json", b"{}")
    assert calls == [("fsync", False), "link", ("fsync", True)]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a handle is of")
def test_a_saved_folder_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / "model").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with staged_directory(tmp_path / "model") as fresh:
        (fresh / "files").mkdir()
        (fresh / "files" / "weights").write_bytes(b"1")
    *before, last = synced
    assert {Path(path).name for path, named in before if not named} >= {"weights", "files"}
    assert not any(named for _, named in before)
    assert last == (str(tmp_path), True)
