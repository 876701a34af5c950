"""A repository in a real S3 with signed requests (rclone's), which a real Triton loads from."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError, StorageError, VerificationError
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.files import open_files
from mlflow_tdeploy.deploy.publish import Sent, publish, publish_copy, read_index, remove
from mlflow_tdeploy.deploy.s3 import S3Files, parse_s3
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.local import local_triton
from tests.deploy.conftest import url_for_triton
from tests.deploy.versions import QUICK, STEPS, Killed, changed_weights, factor, killed_at, linear


@pytest.fixture
def files(s3_server, s3_keys, request):
    prefix = request.node.name.replace("[", "-").replace("]", "")
    found = open_files(f"s3://{s3_server}/bucket/{prefix}/models")
    assert isinstance(found, S3Files)
    return found


@pytest.mark.parametrize(
    ("url", "parts", "triton"),
    [
        ("s3://bucket", (None, "bucket", ""), "s3://bucket"),
        ("s3://bucket/a/b/", (None, "bucket", "a/b"), "s3://bucket/a/b"),
        ("s3://host:9000/bucket/a", ("http://host:9000", "bucket", "a"), "s3://http://host:9000/bucket/a"),
        ("s3://https://host/bucket", ("https://host", "bucket", ""), "s3://https://host/bucket"),
    ],
)
def test_addresses_are_read_as_triton_writes_them(url, parts, triton):
    assert parse_s3(url) == parts
    assert url_for_triton(url) == triton


@pytest.mark.parametrize("url", ["s3://key:secret@bucket", "s3://https://key:secret@host:9000/bucket"])
def test_an_address_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(InvalidInputError, match="holds no user and no password") as told:
        parse_s3(url)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["s3://", "s3://host:9000/"])
def test_an_address_without_a_bucket_is_refused(url):
    with pytest.raises(InvalidInputError, match="is no repository"):
        parse_s3(url)


def test_files_are_written_read_listed_and_removed(files, tmp_path):
    assert files.read("m/config.pbtxt") is None
    assert files.models() == []
    files.write("m/config.pbtxt", b"config")
    (tmp_path / "graph").write_bytes(os.urandom(20 << 20))  # in parts
    files.put("m/7/model.onnx", tmp_path / "graph")
    files.copy("m/7/model.onnx", "m-large/7/model.onnx")
    assert files.read("m-large/7/model.onnx") == (tmp_path / "graph").read_bytes()
    assert files.below("m") == {"config.pbtxt": 6, "7/model.onnx": 20 << 20}
    assert files.models() == ["m", "m-large"]
    files.remove("m/config.pbtxt")
    files.remove("m/config.pbtxt")
    assert files.below("m") == {"7/model.onnx": 20 << 20}
    with pytest.raises(InvalidInputError, match="Unsafe path"):
        files.read("../secret")


def test_publishing_sends_once_and_copies_inside_the_store(files, tmp_path):
    source = tmp_path / "source"
    (source / "7").mkdir(parents=True)
    (source / "7" / "model.onnx").write_bytes(b"graph")
    (source / "config.pbtxt").write_bytes(b"config")
    for name in ("bert", "bert-large"):
        assert publish(files, name, source) == Sent(2, 11)
        assert publish(files, name, source) == Sent()
    publish_copy(files, "bert", "copy", source)
    assert files.read("copy/7/model.onnx") == b"graph"
    remove(files, "bert")
    assert files.models() == ["bert-large", "copy"]
    assert read_index(files, "bert-large").whole


def test_one_deployer_at_a_time(files):
    with (
        files.lease("m"),
        files.lease("other"),
        pytest.raises(ConflictError, match=f"process {os.getpid()} on"),
        files.lease("m"),
    ):
        pass
    with files.lease("m"):
        pass


def test_of_those_that_begin_at_the_same_moment_one_goes_on(files):
    """Each has written its own before any looks for others."""
    count = 4
    written, rounds = threading.Barrier(count), 5

    class Together(S3Files):
        def _wait(self, *lease):
            written.wait(30)
            super()._wait(*lease)

    def take(got, lost, other):
        try:
            with Together(files.url).lease("m"):
                got.append(True)
                end = time.monotonic() + 30
                while len(lost) < count - 1 and time.monotonic() < end:
                    time.sleep(0.01)
        except ConflictError as error:
            lost.append(str(error))
        except Exception as error:  # a thread's own would be lost
            other.append(repr(error))

    for _ in range(rounds):
        got, lost, other = [], [], []
        threads = [threading.Thread(target=take, args=(got, lost, other)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not [one for one in threads if one.is_alive()]
        assert (len(got), len(lost), other) == (1, count - 1, [])
        assert all("is being changed by process" in one for one in lost)


def test_an_old_lease_is_taken_over(files):
    lease, other = ".lease-m.0123456789abcdef", ".lease-m.large.0123456789abcdef"
    files.write(other, b"{}")  # another deployment's
    files.write(lease, b'{"host": "elsewhere", "pid": 1, "held": true}')
    with pytest.raises(ConflictError, match="process 1 on elsewhere"), files.lease("m"):
        pass
    with files.lease("m", seconds=-1):
        assert files.read(lease) is None
    with files.lease("m") as held:
        held()
        names = {one["Key"].rpartition("/")[2] for one in files._list(files._key(".lease-m."))}
        (own,) = names - {other}
        files.remove(own)
        with pytest.raises(ConflictError, match="Another deployer has taken over 'm'"):
            held()
    assert files.read(other) == b"{}"


def test_what_the_store_refuses_is_told(s3_server, s3_keys, monkeypatch):
    with pytest.raises(StorageError, match="there is no bucket 'none'"):
        S3Files(f"s3://{s3_server}/none/models").write("a", b"")
    monkeypatch.setattr("mlflow_tdeploy.deploy.s3._ATTEMPTS", 1)
    with pytest.raises(StorageError, match="cannot write 'a'"):
        S3Files("s3://127.0.0.1:1/bucket").write("a", b"")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="the secret key is not the one|access is denied") as caught:
        S3Files(f"s3://{s3_server}/bucket/models").write("a", b"")
    assert "wrong" not in str(caught.value)
    with pytest.raises(StorageError, match="cannot send 'a': the secret key is not the one|access is denied"):
        S3Files(f"s3://{s3_server}/bucket/models").put("a", Path(__file__))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    with pytest.raises(StorageError, match="[Cc]redentials"):
        S3Files(f"s3://{s3_server}/bucket/models").write("a", b"")


@pytest.fixture
def target(files, server):
    files.write("keep/.keep", b"")  # a store has no empty folder
    with local_triton(url_for_triton(files.url), server=server) as triton:
        yield Deployments(TritonClient(Connection(f"http://127.0.0.1:{triton.http}")), files)


def test_versions_are_brought_switched_rolled_back_and_removed(target, tmp_path):
    target.deploy(linear(tmp_path, 7), QUICK, create=True)
    assert not target.deploy(linear(tmp_path, 7), QUICK).changed
    second = target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert factor(target) == 2
    assert second.sent.size < 1 << 20  # the library is there already
    with pytest.raises(VerificationError):
        target.deploy(changed_weights(linear(tmp_path, 9, 3.0)), QUICK)
    assert factor(target) == 2
    target.rollback("m")
    assert factor(target) == 1
    assert [name for name in target.files.models() if name != "keep"] == ["m", "m.v7", "m.v8"]
    target.delete("m")
    assert target.files.models() == ["keep"]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_before_each_step_is_completed_by_the_next_call(target, tmp_path, monkeypatch, step):
    target.deploy(linear(tmp_path, 7), QUICK)

    killed = killed_at(target, step)
    with contextlib.suppress(Killed):
        killed.deploy(linear(tmp_path, 8, 2.0), QUICK)
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert factor(target) == 2
    assert [name for name in target.files.models() if name != "keep"] == ["m", "m.v7", "m.v8"]
