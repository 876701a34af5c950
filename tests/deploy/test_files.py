"""Files of a repository: whole or not at all, and nothing of anybody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, InvalidInputError, StorageError
from mlflow_tdeploy.deploy.files import FolderFiles, open_files
from mlflow_tdeploy.deploy.publish import (
    INDEX,
    Sent,
    missing,
    publish,
    publish_copy,
    read_index,
    remove,
    require_ours,
    write_file,
)
from mlflow_tdeploy.registry_io.location import without_password
from mlflow_tdeploy.store.process import this_process


@pytest.fixture
def files(tmp_path):
    return FolderFiles(tmp_path / "repository")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "7").mkdir(parents=True)
    (folder / "7" / "model.onnx").write_bytes(b"graph")
    (folder / "config.pbtxt").write_bytes(b"config")
    return folder


def test_publish_sends_once_and_what_has_changed(files, source):
    assert publish(files, "m", source) == Sent(2, 11)
    assert publish(files, "m", source) == Sent()
    (source / "config.pbtxt").unlink()
    (source / "config.pbtxt").write_bytes(b"another")
    assert publish(files, "m", source) == Sent(1, 7)
    assert files.read("m/config.pbtxt") == b"another"
    (source / "7" / "model.onnx").unlink()
    publish(files, "m", source, keep=True)
    assert files.read("m/7/model.onnx") == b"graph"
    publish(files, "m", source)
    assert files.read("m/7/model.onnx") is None
    assert sorted(os.listdir(files.root / "m")) == ["config.pbtxt", INDEX]


def test_weights_are_links(files, source):
    publish(files, "m", source)
    publish_copy(files, "m", "copy", source)
    assert os.path.samefile(source / "7/model.onnx", files.root / "m/7/model.onnx")
    assert os.path.samefile(source / "7/model.onnx", files.root / "copy/7/model.onnx")


class Stop(BaseException):
    pass


def stopping(files, after):
    """Have a repository stop at its n-th write, as a kill does."""
    calls = iter(range(1000))

    def guarded(method):
        def call(*arguments):
            if next(calls) == after:
                raise Stop
            return method(*arguments)

        return call

    for name in ("write", "put", "copy", "remove"):
        setattr(files, name, guarded(getattr(files, name)))
    return files


@pytest.mark.parametrize("after", range(4))
def test_a_kill_at_any_write_is_completed_by_the_next_call(tmp_path, source, after):
    with pytest.raises(Stop):
        publish(stopping(FolderFiles(tmp_path / "repository"), after), "m", source)
    files = FolderFiles(tmp_path / "repository")
    index = read_index(files, "m")
    assert index is None or not index.whole
    publish(files, "m", source)
    assert read_index(files, "m").whole
    assert files.below("m").keys() == {"7/model.onnx", "config.pbtxt", INDEX}


@pytest.mark.parametrize("after", range(3))
def test_a_kill_while_removing_is_completed_by_the_next_call(tmp_path, source, after):
    publish(FolderFiles(tmp_path / "repository"), "m", source)
    with pytest.raises(Stop):
        remove(stopping(FolderFiles(tmp_path / "repository"), after), "m")
    files = FolderFiles(tmp_path / "repository")
    remove(files, "m")
    remove(files, "m")
    assert files.models() == []


def test_what_a_killed_writer_left_goes_with_the_next_publish(files, source):
    publish(files, "m", source)
    (files.root / "m" / ".tdeploy-0123456789abcdef").write_bytes(b"half")
    files.write(f"m/{INDEX}", json.dumps({"files": {"config.pbtxt": ""}, "whole": False}).encode())
    publish(files, "m", source)
    assert files.below("m").keys() == {"7/model.onnx", "config.pbtxt", INDEX}


def test_nothing_of_another_model_is_touched(files, source):
    for name in ("bert", "bert-large"):
        publish(files, name, source)
    (files.root / "bert" / "7" / "__pycache__").mkdir()
    (files.root / "bert" / "7" / "__pycache__" / "model.pyc").touch()  # the server has made it
    remove(files, "bert")
    assert files.models() == ["bert-large"]
    assert len(files.below("bert-large")) == 3


def test_a_part_of_a_model_can_be_removed(files, source):
    publish(files, "m", source)
    remove(files, "m", "7/")
    assert read_index(files, "m").files.keys() == {"config.pbtxt"}
    assert files.below("m").keys() == {"config.pbtxt", INDEX}


def test_somebody_elses_model_is_left_alone(files, source):
    (files.root / "theirs" / "1").mkdir(parents=True)
    (files.root / "theirs" / "1" / "model.onnx").touch()
    for call in (
        lambda: publish(files, "theirs", source),
        lambda: remove(files, "theirs"),
        lambda: write_file(files, "theirs", "config.pbtxt", b""),
    ):
        with pytest.raises(ConflictError, match="not deployed by mlflow-tdeploy"):
            call()
    assert files.below("theirs").keys() == {"1/model.onnx"}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": 1, "whole": true}', b'{"whole": true}', b"\xff"])
def test_a_damaged_index_is_told(files, content):
    files.write(f"m/{INDEX}", content)
    with pytest.raises(IntegrityError, match="damaged"):
        require_ours(files, "m")


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", ""])
def test_paths_stay_inside(files, path):
    for call in (
        lambda: files.write(path, b""),
        lambda: files.read(path),
        lambda: files.remove(path),
        lambda: files.below(path),
    ):
        with pytest.raises(InvalidInputError, match="Unsafe path"):
            call()


def test_a_full_disk_leaves_what_was_there(files, monkeypatch):
    files.write("m/config.pbtxt", b"before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StorageError):
        files.write("m/config.pbtxt", b"after")
    monkeypatch.undo()
    assert files.read("m/config.pbtxt") == b"before"
    assert files.below("m").keys() == {"config.pbtxt"}


def test_one_deployer_at_a_time(files):
    says = rf"'m' in .* is being changed by process {os.getpid()} on "
    with files.lease("m"), files.lease("other"), pytest.raises(ConflictError, match=says), files.lease("m"):
        pass
    with files.lease("m"):
        pass
    assert list(files.root.iterdir()) == []


def test_the_lease_of_a_dead_process_is_taken_over(files):
    code = (
        "import os, sys; from mlflow_tdeploy.deploy.files import FolderFiles\n"
        "with FolderFiles(sys.argv[1]).lease('m'): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(files.root)], check=True)
    assert (files.root / ".lease-m").exists()
    with files.lease("m"):
        pass


@pytest.mark.parametrize(("age", "free"), [(10, False), (1000, True)])
def test_the_lease_of_another_host_is_waited_for_while_it_is_young(files, age, free):
    path = files.root / ".lease-m"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(path, (time.time() - age, time.time() - age))
    if free:
        with files.lease("m"):
            pass
    else:
        with pytest.raises(ConflictError, match="process 1 on elsewhere"), files.lease("m"):
            pass


@pytest.mark.parametrize("world", [{}, {"boot": "another start"}, {"world": "another container"}])
def test_a_process_of_the_same_number_elsewhere_says_nothing(files, world):
    """A restarted container has its host name and its numbers again: only age tells then."""
    path = files.root / ".lease-m"
    files.root.mkdir(exist_ok=True)
    path.write_text(json.dumps({**this_process(), **world}))
    old = time.time() - 1000
    os.utime(path, (old, old))
    if not world:  # this very process, which is at it still
        with pytest.raises(ConflictError, match=f"process {os.getpid()}"), files.lease("m"):
            pass
        return
    with files.lease("m"):
        pass
    path.write_text(json.dumps({**this_process(), "pid": 1 << 22, **world}))
    with pytest.raises(ConflictError), files.lease("m"):
        pass


def test_who_lost_a_lease_is_told(files):
    with files.lease("m") as held:
        held()
        (files.root / ".lease-m").write_text("another's")
        with pytest.raises(ConflictError, match="Another deployer has taken over 'm'"):
            held()
    assert (files.root / ".lease-m").read_text() == "another's"


def test_what_is_missing_is_sent_again(files, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("aaa")
    (folder / "b").write_text("bbb")
    publish(files, "m", folder)
    assert missing(files, "m") == []
    (files.root / "m" / "a").unlink()
    (files.root / "m" / "b").unlink()
    (files.root / "m" / "b").write_text("cut")  # of the same size: only hashes tell, and nobody reads it
    assert missing(files, "m") == ["a"]
    (files.root / "m" / "b").write_text("c")
    assert missing(files, "m") == ["a", "b"]
    assert publish(files, "m", folder).files == 2
    assert (files.root / "m" / "b").read_text() == "bbb"


def test_a_lease_is_renewed_as_long_as_its_holder_lives(files):
    path = files.root / ".lease-m"
    with files.lease("m", seconds=0.2):
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_a_repository_is_opened_by_its_url(tmp_path):
    assert open_files(f"file://{tmp_path}").url == str(tmp_path)
    with pytest.raises(InvalidInputError, match="No repository at an address that begins with 'ftp'"):
        open_files("ftp://x")


def test_two_that_find_a_dead_lease_do_not_both_take_it(files):
    """The slower one must not take the lease that the faster one has made meanwhile for the dead one."""
    from mlflow_tdeploy.deploy.files import _taken_away

    path = files.root / ".lease-m"
    path.parent.mkdir(parents=True, exist_ok=True)
    dead, alive = {"host": "h", "pid": 1}, {"host": "h", "pid": 2}
    path.write_text(json.dumps(alive))
    assert not _taken_away(path, dead)
    assert json.loads(path.read_text()) == alive
    assert _taken_away(path, alive)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("ftp://me:secret@host:21/a@b", "ftp://me@host:21/a@b"),
        ("sftp://me@host/a:b@c", "sftp://me@host/a:b@c"),
        ("https://token@host/a?token=secret", "https://host/a"),
        ("https://host:8080/a", "https://host:8080/a"),
        ("models:/m@champion", "models:/m@champion"),
        ("runs:/1/m", "runs:/1/m"),
    ],
)
def test_a_password_in_a_models_uri_is_not_shown_to_who_asks_the_server(uri, shown):
    assert without_password(uri) == shown
