"""Versions on a real Triton: brought, switched, rolled back and removed."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    ServerError,
)
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.wire import rows_of
from mlflow_tdeploy.deploy.apply import Deployments, Settings
from mlflow_tdeploy.deploy.at_start import models_at_start
from mlflow_tdeploy.deploy.files import FolderFiles
from mlflow_tdeploy.deploy.publish import INDEX, Sent
from mlflow_tdeploy.deploy.tidy import Tidy
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import record_file
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.local import local_triton
from tests.bundles import linear_graph
from tests.deploy.versions import QUICK, Killed, factor, killed_at, linear, there
from tests.triton.deployables import bundle_of, deployable


def test_a_version_is_brought_switched_rolled_back_and_removed(target, tmp_path):
    first = target.deploy(linear(tmp_path, 7, 1.0), QUICK, create=True)
    assert (first.before, first.version, first.changed) == (None, 7, True)
    assert factor(target) == 1
    again = target.deploy(linear(tmp_path, 7), QUICK)
    assert not again.changed
    assert again.sent == Sent()
    with pytest.raises(ConflictError, match="deployed already: version 7 answers"):
        target.deploy(linear(tmp_path, 8, 2.0), QUICK, create=True)
    second = target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert (second.before, second.version) == (7, 8)
    assert factor(target) == 2
    assert factor(target, "m.v7") == 1
    assert there(target)[0].keys() == {"m", "m.v7", "m.v8"}
    back = target.rollback("m")
    assert (back.before, back.version) == (8, 7)
    assert factor(target) == 1
    target.rollback("m", 8)
    third = target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert factor(target) == 3
    assert third.version == 9
    folders, ready = there(target)
    assert folders == {
        "m": ["8", "9", "config.pbtxt", INDEX],
        "m.v8": ["8", "config.pbtxt", INDEX, "warmup"],
        "m.v9": ["9", "config.pbtxt", INDEX, "warmup"],
    }
    assert {"m", "m.v8", "m.v9"} <= ready
    with pytest.raises(NotFoundError, match="no version 7 to go back to. Kept are: 8"):
        target.rollback("m", 7)
    described = target.describe("m")
    assert (described["version"], described["previous"], described["ready"]) == (9, [8], True)
    assert (described["variant"], target.names()) == ("onnx-fp32", ["m"])
    assert target.delete("m")
    assert not target.delete("m")
    assert there(target)[0] == {}
    with pytest.raises(NotFoundError, match="There is no deployment 'm'"):
        target.rollback("m")


def test_another_client_sees_the_same(target, running, tmp_path):
    """Nothing is remembered anywhere but in the repository and on the server."""
    target.deploy(linear(tmp_path, 7), QUICK)
    other = Deployments(TritonClient(Connection(f"grpc://127.0.0.1:{running[0].grpc}")), FolderFiles(running[1]))
    assert other.names() == ["m"]
    assert other.describe("m")["version"] == 7
    assert not other.deploy(linear(tmp_path, 7), QUICK).changed


def test_a_version_with_another_tokenizer_brings_its_own(target, tmp_path):
    """Graph, tokenizer and what comes after belong together: two versions that differ in all of them."""
    old = bundle_of("text-classification", tmp_path / "old")
    new = bundle_of("sentence-embedding", tmp_path / "new")
    path = new.path("assets/tokenizer.json")
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    assets = tuple(record_file(new.root, file.path) for file in new.manifest.assets)
    (new.root / "manifest.json").write_text(to_json(dataclasses.replace(new.manifest, assets=assets)))
    target.deploy(deployable(old, version=7), QUICK)
    asked = {"text": rows_of(["cat", "dog"])}
    before = target.client.infer("m", asked)
    target.deploy(deployable(Bundle.open(tmp_path / "new"), version=8), QUICK)
    after = target.client.infer("m", asked)
    assert "label" in before
    assert list(after) == ["sentence_embedding"]
    assert (
        after["sentence_embedding"][0] == target.client.infer("m", {"text": rows_of(["zzz"])})["sentence_embedding"][0]
    ).all()
    target.rollback("m")
    np.testing.assert_array_equal(target.client.infer("m", asked)["score"], before["score"])


def test_a_name_that_is_taken_is_left_alone(target, tmp_path, running):
    theirs = running[1] / "m"
    (theirs / "1").mkdir(parents=True)
    (theirs / "config.pbtxt").write_text(
        'name: "m" backend: "onnxruntime" max_batch_size: 8 input [{name: "x" data_type: TYPE_FP32 dims: [4]}] '
        'output [{name: "y" data_type: TYPE_FP32 dims: [3]}]'
    )
    linear_graph(theirs / "1" / "model.onnx")
    try:
        for call in (lambda: target.deploy(linear(tmp_path, 7), QUICK), lambda: target.delete("m")):
            with pytest.raises(ConflictError, match="not deployed by mlflow-tdeploy"):
                call()
        target.client.load("m")
        assert target.names() == []
        assert factor(target) == 1
    finally:
        target.client.unload("m")
        for path in ("1/model.onnx", "config.pbtxt"):
            (theirs / path).unlink()
        (theirs / "1").rmdir()
        theirs.rmdir()


def test_what_begins_with_a_name_is_not_what_has_it(target, tmp_path):
    for name in ("bert", "bert-large"):
        target.deploy(linear(tmp_path, 7, name=name), QUICK)
    target.delete("bert")
    assert target.names() == ["bert-large"]
    assert factor(target, "bert-large") == 1


def test_a_version_is_not_changed_in_place(target, tmp_path):
    target.deploy(linear(tmp_path, 7), QUICK)
    from mlflow_tdeploy.triton.options import TritonOptions

    with pytest.raises(ConflictError, match="Version 7 of 'm' is deployed with other files or options"):
        target.deploy(linear(tmp_path, 7), dataclasses.replace(QUICK, options=TritonOptions(instances=2)))
    assert factor(target) == 1


def test_a_server_that_was_restarted_empty_is_filled_again(server, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    for _ in range(2):
        with local_triton(repository, server=server) as triton:
            target = Deployments(TritonClient(Connection(f"http://127.0.0.1:{triton.http}")), FolderFiles(repository))
            assert target.deploy(linear(tmp_path, 7), QUICK).changed
            assert factor(target) == 1
            assert target.describe("m")["ready"]


def test_switching_under_load_loses_no_request_and_asks_no_version_before_it_is_verified(target, tmp_path):
    verified = {7}
    target.deploy(linear(tmp_path, 7, 7.0), QUICK)
    for version in (8, 9):
        linear(tmp_path, version, float(version))
    answers, failures, stop = Counter(), [], threading.Event()

    def load():
        while not stop.is_set():
            try:
                answers[int(factor(target))] += 1
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    early = []
    seen = Deployments(
        target.client,
        target.files,
        on_step=lambda step: early.append(set(answers) - verified) if step == "switch" else None,
    )
    try:
        for version in (8, 9, 8, 9):
            if version in verified:
                seen.rollback("m", version)
            else:
                seen.deploy(linear(tmp_path, version), QUICK)
            verified.add(version)
            time.sleep(0.3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set().union(*early) == set()
    assert answers.keys() == {7, 8, 9}
    assert sum(answers.values()) > 100


@pytest.mark.slow
def test_a_library_goes_with_the_last_version_that_uses_it(target, tmp_path, monkeypatch):
    """Another version of this package brings another library; each version keeps its own."""

    from mlflow_tdeploy.triton import bundle_version
    from mlflow_tdeploy.triton.library import library

    other = tmp_path / "library-0123456789abcdef"
    shutil.copytree(library(), other)
    monkeypatch.setattr(bundle_version, "library", lambda: other)
    target.deploy(linear(tmp_path, 7), QUICK)
    monkeypatch.undo()

    def libraries():
        return sorted(path.name for path in (target.files.root / "m").glob("library-*"))

    target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert libraries() == sorted([other.name, library().name])
    target.rollback("m")
    assert factor(target) == 1
    target.rollback("m", 8)
    target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert libraries() == [library().name]


def test_going_back_goes_further_back_and_forward_by_name(target, tmp_path):
    keeping = dataclasses.replace(QUICK, keep=2)
    for version in (7, 8, 9):
        target.deploy(linear(tmp_path, version, float(version)), keeping)
    answers = []
    for _ in range(2):
        target.rollback("m")
        answers.append(factor(target))
    assert answers == [8, 7]
    with pytest.raises(NotFoundError, match="no version before to go back to. Kept are: 8, 9"):
        target.rollback("m")
    target.rollback("m", 9)
    assert factor(target) == 9
    assert target.describe("m")["previous"] == [8, 7]


def test_one_deployment_that_is_damaged_says_nothing_about_the_others(target, tmp_path):
    for name in ("bert", "bert-large"):
        target.deploy(linear(tmp_path, 7, name=name), QUICK)
    whole = target.files.read("bert/config.pbtxt")
    target.files.write("bert/config.pbtxt", b"garbage: 1")
    assert target.names() == ["bert-large"]
    with pytest.raises(IntegrityError, match="'bert/config.pbtxt' in .* is damaged"):
        target.describe("bert")
    target.files.write("bert/config.pbtxt", whole)


def test_other_labels_are_another_version(target, tmp_path):
    """What comes after the graph is in the manifest only: the same weights and tokenizer are not the same model."""
    bundle = bundle_of("text-classification", tmp_path / "model")
    target.deploy(deployable(bundle, version=7), QUICK)
    config = {**bundle.manifest.task_config, "labels": ["x", "y", "z"]}
    (bundle.root / "manifest.json").write_text(to_json(dataclasses.replace(bundle.manifest, task_config=config)))
    other = Bundle.open(tmp_path / "model")
    with pytest.raises(ConflictError, match="with other files or options"):
        target.deploy(deployable(other, version=7), QUICK)
    target.deploy(deployable(other, version=8), QUICK)
    assert set(target.client.infer("m", {"text": rows_of(["cat"])})["label"].ravel()) <= {b"x", b"y", b"z"}


@pytest.fixture
def elsewhere(target, tmp_path):
    """The same server, with a repository that is not its own."""
    return Deployments(target.client, FolderFiles(tmp_path / "elsewhere"))


def test_a_repository_that_is_not_the_servers_changes_nothing_there(target, elsewhere, tmp_path):
    for version in (7, 8):
        target.deploy(linear(tmp_path, version, float(version)), QUICK)
    for call in (
        lambda: elsewhere.deploy(linear(tmp_path, 8), QUICK, create=True),
        lambda: elsewhere.deploy(linear(tmp_path, 9, 9.0), QUICK),
    ):
        with pytest.raises(ConflictError, match=r"answers to 'm' with version 8, and .*elsewhere' does not have it"):
            call()
    assert factor(target) == 8
    assert target.describe("m")["ready"]
    assert elsewhere.files.models() == []


def test_what_the_server_answers_with_is_not_changed_though_the_route_knows_it_no_more(target, tmp_path):
    """The deployer of 8 was killed between writing the route and loading it, and nothing is kept."""
    none_kept = dataclasses.replace(QUICK, keep=0)
    target.deploy(linear(tmp_path, 7), none_kept)
    written = (target.files.root / "m" / "config.pbtxt").read_text()
    target.files.write("m/config.pbtxt", written.replace('string_value: "7"', 'string_value: "8"').encode())
    assert target.route("m").kept == (8,)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConflictError, match="with other files or options"):
        target.deploy(linear(tmp_path / "other", 7, 3.0), none_kept)
    assert factor(target) == 1
    assert target.deploy(linear(tmp_path, 7), none_kept).version == 7  # that very one is
    assert target.route("m").kept == (7,)


def test_a_file_that_is_gone_is_sent_again(target, tmp_path):
    target.deploy(linear(tmp_path, 7), QUICK)
    (target.files.root / "m.v7" / "7" / "model.onnx").unlink()
    assert target.deploy(linear(tmp_path, 7), QUICK).sent.files == 1
    assert not target.deploy(linear(tmp_path, 7), QUICK).changed
    target.client.unload("m.v7")
    target.client.load("m.v7")
    assert factor(target) == 1


def test_what_is_not_loaded_is_not_ready_and_is_loaded_by_going_to_it(target, tmp_path):
    target.deploy(linear(tmp_path, 7), QUICK)
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    target.client.unload("m.v8")
    assert not target.describe("m")["ready"]
    assert target.rollback("m", 8).changed
    assert target.describe("m")["ready"]
    assert factor(target) == 2


def test_going_back_after_a_restart_goes_back(target, tmp_path):
    for version in (7, 8):
        target.deploy(linear(tmp_path, version, float(version)), QUICK)
    for model in ("m", "m.v7", "m.v8"):
        target.client.unload(model)
    assert target.rollback("m").version == 7
    assert factor(target) == 7


def test_what_was_tried_goes_with_the_deployment(target, tmp_path):
    with pytest.raises(Killed):
        killed_at(target, "answers").deploy(linear(tmp_path, 7), QUICK)
    assert "m.v7.check" in target.files.models()
    assert target.delete("m")
    assert target.files.models() == []
    assert not target.delete("m")


def test_who_lost_the_lease_changes_no_route(target, tmp_path):
    target.deploy(linear(tmp_path, 7), QUICK)

    def lose(step):
        if step == "switch":
            (target.files.root / ".lease-m").write_text("another's")

    late = Deployments(target.client, target.files, on_step=lose)
    with pytest.raises(ConflictError, match="Another deployer has taken over 'm'"):
        late.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert "m.v8" in target.files.models()  # it may be the other one's by now
    (target.files.root / ".lease-m").unlink()
    assert factor(target) == 1
    assert target.route("m").active == 7


def test_a_kept_version_whose_files_are_lost_is_not_switched_to(target, tmp_path):
    for version in (7, 8):
        target.deploy(linear(tmp_path, version, float(version)), QUICK)
    target.client.unload("m.v7")
    shutil.rmtree(target.files.root / "m.v7")
    with pytest.raises(ServerError, match="cannot load 'm.v7'"):
        target.rollback("m")
    assert factor(target) == 8


def test_triton_starts_with_all_models_while_one_is_changed(server, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    with local_triton(repository, server=server) as triton:
        target = Deployments(TritonClient(Connection(f"http://127.0.0.1:{triton.http}")), FolderFiles(repository))
        target.deploy(linear(tmp_path, 7), QUICK)
    with target.files.lease("m"), local_triton(repository, models=["*"], server=server) as triton:
        assert triton.ready


@pytest.mark.slow
def test_versions_may_be_kept_on_disk_only(target, tmp_path):
    resting = dataclasses.replace(QUICK, keep=2, keep_loaded=False)
    for version in (7, 8, 9):
        target.deploy(linear(tmp_path, version, float(version)), resting)
    loaded = {version: target.client.ready(f"m.v{version}") for version in (7, 8, 9)}
    assert loaded == {7: False, 8: False, 9: True}
    assert target.graphs("m") == ["m.v7", "m.v8", "m.v9"]
    assert target.rollback("m", grace=0.0).version == 8
    assert factor(target) == 8
    assert target.rollback("m", grace=0.0).version == 7
    assert factor(target) == 7
    assert {version: target.client.ready(f"m.v{version}") for version in (7, 8, 9)} == {7: True, 8: False, 9: False}
    assert target.rollback("m", 9, grace=0.0).version == 9
    assert factor(target) == 9
    target.deploy(
        linear(tmp_path, 10, 10.0), dataclasses.replace(QUICK, keep=1)
    )  # from now on what is kept stays loaded
    assert target.client.ready("m.v9")
    assert target.graphs("m") == ["m.v10", "m.v9"]
    target.delete("m")
    assert not target.files.models()


def test_what_was_gone_back_from_is_nothing_to_go_back_to(target, tmp_path):
    keeping = dataclasses.replace(QUICK, keep=2)
    for version in (7, 8):
        target.deploy(linear(tmp_path, version, float(version)), keeping)
    target.rollback("m", grace=0.0)
    target.client.unload("m")  # as if the server had been restarted
    target.client.unload("m.v7")
    target.deploy(linear(tmp_path, 7, 7.0), keeping)
    assert (target.route("m").previous, target.route("m").ahead) == ((), (8,))
    target.deploy(linear(tmp_path, 9, 9.0), keeping)
    assert (target.route("m").previous, target.route("m").ahead) == ((7,), ())
    assert target.graphs("m") == ["m.v7", "m.v9"]
    assert target.rollback("m", grace=0.0).version == 7


def test_keeping_fewer_counts_at_once(target, tmp_path):
    keeping = dataclasses.replace(QUICK, keep=2)
    for version in (7, 8, 9):
        target.deploy(linear(tmp_path, version, float(version)), keeping)
    assert target.route("m").previous == (8, 7)
    fewer = dataclasses.replace(QUICK, keep=1)
    assert target.deploy(linear(tmp_path, 9, 9.0), fewer).changed
    assert (target.route("m").previous, target.graphs("m")) == ((8,), ["m.v8", "m.v9"])
    assert not target.client.ready("m.v7")
    assert target.serving("m").kept == (9, 8)
    assert not target.deploy(linear(tmp_path, 9, 9.0), fewer).changed
    assert target.deploy(linear(tmp_path, 9, 9.0), dataclasses.replace(QUICK, keep=0)).changed
    assert target.graphs("m") == ["m.v9"]


def test_a_damaged_version_keeps_no_server_from_starting(target, tmp_path, caplog):
    for version in (7, 8):
        target.deploy(linear(tmp_path, version, float(version)), QUICK)
    (target.files.root / "m.v7" / "7" / "model.onnx").unlink()
    assert models_at_start(target.files.root) == ["m", "m.v8"]
    assert "'m.v7' is not loaded: its file '7/model.onnx' is gone or damaged" in caplog.text


def test_keeping_on_disk_only_counts_at_once(target, tmp_path):
    for version in (7, 8):
        target.deploy(linear(tmp_path, version, float(version)), QUICK)
    assert target.client.ready("m.v7")
    resting = dataclasses.replace(QUICK, keep_loaded=False)
    assert target.deploy(linear(tmp_path, 8, 8.0), resting).changed
    assert not target.client.ready("m.v7")
    assert not target.deploy(linear(tmp_path, 8, 8.0), resting).changed
    assert models_at_start(target.files.root) == ["m", "m.v8"]
    assert target.rollback("m", grace=0.0).version == 7


def test_going_back_waits_for_the_requests_of_the_time_before(target, tmp_path, monkeypatch):
    """Else they would not be waited for when what they need is retired."""
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    before, routed, real = target.route("m"), [], Tidy._is_drained

    def busy(self, name, version=None):
        if version in (7, 8) and len(routed) < 3:
            routed.append((target.serving("m").active, version))
            return False
        return real(self, name, version)

    monkeypatch.setattr(Tidy, "_is_drained", busy)
    target.rollback("m", retire=False)
    assert routed == [(8, 7)] * 3
    routed.clear()
    target.restore("m", before, retire=False)
    assert routed == [(7, 8)] * 3
    assert factor(target) == 2


def test_who_has_waited_for_requests_waits_no_second_time(target, tmp_path, monkeypatch):
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    target.deploy(linear(tmp_path, 8, 2.0), Settings(**{**vars(QUICK), "keep": 0}), retire=False)
    assert target.drain("m", 0.0)
    monkeypatch.setattr(Tidy, "_drained", lambda *_: pytest.fail("it waits"))
    target.retire("m")
    assert target.files.models() == ["m", "m.v8"]


def test_a_version_that_returns_waits_for_the_requests_of_the_time_before(target, tmp_path, monkeypatch):
    """A server lists one model of a name and number: the old front could not be told from the one that comes."""
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    routed, real = [], Tidy._is_drained

    def busy(self, name, version=None):
        if version == 8 and len(routed) < 3:
            routed.append(target.serving("m").active)
            return False
        return real(self, name, version)

    monkeypatch.setattr(Tidy, "_is_drained", busy)
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert routed == [7, 7, 7]
    assert factor(target) == 2
