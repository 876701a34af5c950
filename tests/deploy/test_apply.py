"""Versions on a real Triton: brought, switched, rolled back and removed; whatever fails, what served serves on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    ServerError,
    UnreachableError,
    VerificationError,
)
from mlflow_tdeploy.core.wire import TEXT
from mlflow_tdeploy.deploy.apply import Deployments, Settings
from mlflow_tdeploy.deploy.files import FolderFiles
from mlflow_tdeploy.deploy.publish import INDEX, Sent
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.local import local_triton
from tests.bundles import WEIGHTS, linear_graph, make_bundle
from tests.triton.deployables import bundle_of, deployable

QUICK = Settings(grace=0.0)
X = np.array([[1, 2, 3, 4], [0, 1, 0, 1]], np.float32)


@pytest.fixture(scope="module")
def running(server, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    with local_triton(repository, server=server) as triton:
        yield triton, repository


@pytest.fixture
def target(running):
    """Yield the deployments of an empty server; all that a test leaves there goes."""
    triton, repository = running
    found = Deployments(TritonClient(Connection(f"http://127.0.0.1:{triton.http}")), FolderFiles(repository))
    yield found
    for name in ("m", "bert", "bert-large"):
        with contextlib.suppress(Exception):
            found.delete(name)


def linear(tmp_path, version, factor=1.0, **more):
    """Return version ``version`` of a model that is ``factor`` times another one."""
    root = tmp_path / f"model-{version}"
    if not root.exists():
        make_bundle(root, {"onnx-fp32": WEIGHTS})
        bundle = Bundle.open(root)
        scale(bundle, factor)
    return deployable(Bundle.open(root), version=version, **more)


def scale(bundle, factor):
    """Make another model of a bundle: graph and golden answers."""
    from mlflow_tdeploy.core.golden import GoldenRequest, dump
    from mlflow_tdeploy.core.records import to_json
    from mlflow_tdeploy.store.hashing import record_file

    x = np.array([[1, 2, 3, 4]], np.float32)
    y = x @ (WEIGHTS * np.float32(factor))
    text, npz = dump((GoldenRequest({"x": x}, {"x": x}, {"y": y}, {"y": y}),))
    paths = [file.path for file in bundle.manifest.golden]
    for path, content in zip(sorted(paths), (text.encode(), npz), strict=True):
        bundle.path(path).write_bytes(content)
    golden = tuple(record_file(bundle.root, path) for path in paths)
    (bundle.root / "manifest.json").write_text(to_json(dataclasses.replace(bundle.manifest, golden=golden)))
    linear_graph(bundle.root / "files/onnx-fp32/model.onnx", WEIGHTS * np.float32(factor))
    variant = bundle.variants["onnx-fp32"]
    files = tuple(record_file(bundle.root, file.path) for file in variant.files)
    (bundle.root / "variants/onnx-fp32.json").write_text(to_json(dataclasses.replace(variant, files=files)))


def factor(target, name="m", version=None):
    """Return which model answers."""
    got = target.client.infer(name, {"x": X}, version=version)["y"]
    ratio = got / (X @ WEIGHTS)
    assert np.allclose(ratio, ratio[0, 0], rtol=1e-4)
    return round(float(ratio[0, 0]), 3)


def there(target):
    """Return what lies in the repository and what is loaded."""
    folders = {name: sorted(os.listdir(target.files.root / name)) for name in target.files.models()}
    ready = {one.name for one in target.client.models() if one.state == "READY"}
    return {name: [one for one in found if not one.startswith("library-")] for name, found in folders.items()}, ready


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
    from mlflow_tdeploy.core.records import to_json
    from mlflow_tdeploy.store.hashing import record_file

    assets = tuple(record_file(new.root, file.path) for file in new.manifest.assets)
    (new.root / "manifest.json").write_text(to_json(dataclasses.replace(new.manifest, assets=assets)))
    target.deploy(deployable(old, version=7), QUICK)
    asked = {TEXT: np.array([[b"cat"], [b"dog"]], dtype=object)}
    before = target.client.infer("m", asked)
    target.deploy(deployable(Bundle.open(tmp_path / "new"), version=8), QUICK)
    after = target.client.infer("m", asked)
    assert "label" in before
    assert list(after) == ["sentence_embedding"]
    assert (
        after["sentence_embedding"][0]
        == target.client.infer("m", {TEXT: np.array([[b"zzz"]], dtype=object)})["sentence_embedding"][0]
    ).all()
    target.rollback("m")
    np.testing.assert_array_equal(target.client.infer("m", asked)["score"], before["score"])


def changed_weights(what):
    """Make the graph another one than its golden answers are of, and its record fit it."""
    from mlflow_tdeploy.store.hashing import record_file

    path = what.bundle.path(what.variant.entry)
    path.unlink()
    linear_graph(path, -WEIGHTS)
    files = (record_file(what.bundle.root, what.variant.entry),)
    return dataclasses.replace(what, variant=dataclasses.replace(what.variant, files=files))


def no_graph(what):
    from mlflow_tdeploy.store.hashing import record_file

    path = what.bundle.path(what.variant.entry)
    path.write_bytes(b"no graph")
    files = (record_file(what.bundle.root, what.variant.entry),)
    return dataclasses.replace(what, variant=dataclasses.replace(what.variant, files=files))


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (
            changed_weights,
            VerificationError,
            "answers golden request 0 wrongly on the server: .*What served before serves on",
        ),
        (no_graph, ServerError, "cannot load 'm.v8'"),
    ],
)
def test_a_version_that_is_wrong_never_answers_and_leaves_nothing(target, tmp_path, damage, error, says):
    target.deploy(linear(tmp_path, 7), QUICK)
    before = there(target)
    with pytest.raises(error, match=says):
        target.deploy(damage(linear(tmp_path, 8, 2.0)), QUICK)
    assert factor(target) == 1
    assert there(target)[0] == before[0]
    target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert factor(target) == 3


def test_a_first_version_that_is_wrong_leaves_nothing(target, tmp_path):
    with pytest.raises(VerificationError):
        target.deploy(changed_weights(linear(tmp_path, 7)), QUICK)
    assert there(target)[0] == {}
    assert target.names() == []


def test_a_front_with_another_tokenizer_than_the_graph_is_found(target, tmp_path, monkeypatch):
    """What the server tokenizes is what counts: here its library reads another vocabulary."""
    from mlflow_tdeploy.build.golden import golden_requests
    from mlflow_tdeploy.build.verify_data import VerifyData
    from mlflow_tdeploy.deploy import apply
    from mlflow_tdeploy.runtime.model import open_model

    bundle = bundle_of("sentence-embedding", tmp_path / "model")
    with open_model(tmp_path / "model") as model:
        data = VerifyData.of(["a dog", "the cat"] * 8).for_task(bundle.task())
        golden = golden_requests(bundle.task(), data, model.infer)
    monkeypatch.setattr(Bundle, "golden", lambda self: golden)
    original = apply.write_front

    def other(what, folder, *arguments):
        original(what, folder, *arguments)
        front = folder / str(what.version) / "manifest.json"
        text = front.read_text().replace('"max_length": 8', '"max_length": 1')
        front.unlink()
        front.write_text(text)

    target.deploy(deployable(bundle, version=7), QUICK)
    monkeypatch.setattr(apply, "write_front", other)
    with pytest.raises(VerificationError, match="with another 'sentence_embedding' than its graph: the tokenizer"):
        target.deploy(deployable(bundle, version=8), QUICK)
    assert target.describe("m")["version"] == 7
    assert there(target)[0].keys() == {"m", "m.v7"}


class Killed(BaseException):
    pass


STEPS = ("graph", "verify", "front", "answers", "switch", "retire")


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_before_each_step_leaves_what_served_and_the_next_call_completes(target, tmp_path, monkeypatch, step):
    """Nothing is cleaned up by who is killed: that is left to the next one."""
    target.deploy(linear(tmp_path, 7), QUICK)
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)

    def stop(reached):
        if reached == step:
            raise Killed

    killed = Deployments(target.client, target.files, on_step=stop)
    monkeypatch.setattr(killed, "_undone", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert factor(target) == (3 if step == "retire" else 2)
    done = target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert done.version == 9
    assert factor(target) == 3
    folders, _ = there(target)
    assert folders.keys() == {"m", "m.v8", "m.v9"}
    assert folders["m"] == ["8", "9", "config.pbtxt", INDEX]


@pytest.mark.parametrize("step", STEPS[:-1])
def test_after_a_kill_another_version_can_come(target, tmp_path, monkeypatch, step):
    target.deploy(linear(tmp_path, 7), QUICK)

    def stop(reached):
        if reached == step:
            raise Killed

    killed = Deployments(target.client, target.files, on_step=stop)
    monkeypatch.setattr(killed, "_undone", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path, 8, 2.0), QUICK)
    target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert factor(target) == 3
    assert there(target)[0].keys() == {"m", "m.v7", "m.v9"}


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


def test_no_server_and_the_wrong_repository_are_told(target, running, tmp_path):
    other = Deployments(target.client, FolderFiles(tmp_path / "elsewhere"))
    with pytest.raises(ServerError, match="cannot load 'm.v7'"):
        other.deploy(linear(tmp_path, 7), QUICK)
    assert other.files.models() == []
    nobody = Deployments(TritonClient(Connection("http://127.0.0.1:1", timeout=2)), FolderFiles(tmp_path / "elsewhere"))
    with pytest.raises(UnreachableError, match="nobody answers"):
        nobody.deploy(linear(tmp_path, 7), QUICK)
    assert nobody.files.models() == []


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


def test_a_library_goes_with_the_last_version_that_uses_it(target, tmp_path, monkeypatch):
    """Another version of this package brings another library; each version keeps its own."""
    import shutil

    from mlflow_tdeploy.triton import repository
    from mlflow_tdeploy.triton.library import library

    other = tmp_path / "library-0123456789abcdef"
    shutil.copytree(library(), other)
    monkeypatch.setattr(repository, "library", lambda: other)
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


@pytest.mark.parametrize("step", ["graph", "answers", "switch"])
def test_a_server_that_dies_meanwhile_is_told_and_the_next_one_gets_there(server, tmp_path, step):
    repository = tmp_path / "repository"
    repository.mkdir()
    with local_triton(repository, server=server) as triton:

        def dies(reached):
            if reached == step and target.route("m") is not None:
                triton.process.kill()
                triton.process.wait()

        client = TritonClient(Connection(f"http://127.0.0.1:{triton.http}"))
        target = Deployments(client, FolderFiles(repository), on_step=dies)
        target.deploy(linear(tmp_path, 7), QUICK)
        with pytest.raises(UnreachableError, match="nobody answers there"):
            target.deploy(linear(tmp_path, 8, 2.0), QUICK)
        assert target.route("m").active == 7
    with local_triton(repository, server=server) as triton:
        target = Deployments(TritonClient(Connection(f"http://127.0.0.1:{triton.http}")), FolderFiles(repository))
        target.deploy(linear(tmp_path, 8, 2.0), QUICK)
        assert factor(target) == 2
        target.rollback("m")
        assert factor(target) == 1


def test_a_server_that_looks_for_models_by_itself_is_told(server, tmp_path, monkeypatch):
    from mlflow_tdeploy.triton import local

    original = local._command

    def polling(*arguments):
        return [one.replace("model-control-mode=explicit", "model-control-mode=poll") for one in original(*arguments)]

    monkeypatch.setattr(local, "_command", polling)
    repository = tmp_path / "repository"
    repository.mkdir()
    with local_triton(repository, server=server) as triton:
        for url in (f"http://127.0.0.1:{triton.http}", f"grpc://127.0.0.1:{triton.grpc}"):
            target = Deployments(TritonClient(Connection(url)), FolderFiles(repository))
            with pytest.raises(
                ServerError, match="looks for models by itself .* Start it with --model-control-mode=explicit"
            ):
                target.deploy(linear(tmp_path, 7), QUICK)
            assert target.files.models() == []


_DEPLOYER = """
import os, signal, sys
from pathlib import Path
from mlflow_tdeploy.deploy.apply import Deployments, Settings
from mlflow_tdeploy.deploy.files import open_files
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.triton.client import Connection, TritonClient
from tests.triton.deployables import deployable
url, repository, model, version, step = sys.argv[1:]
def kill(reached):
    if reached == step:
        os.kill(os.getpid(), signal.SIGKILL)
target = Deployments(TritonClient(Connection(url)), open_files(repository), on_step=kill)
target.deploy(deployable(Bundle.open(Path(model)), version=int(version)), Settings(grace=0.0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_sigkill_before_each_step_leaves_what_served_and_the_next_call_completes(target, tmp_path, step):
    """A real one, which leaves its lease as well."""
    for version, times in ((7, 1.0), (8, 2.0)):
        target.deploy(linear(tmp_path, version, times), QUICK)
    linear(tmp_path, 9, 3.0)
    command = [sys.executable, "-c", _DEPLOYER, target.client.connection.url, target.files.url]
    done = subprocess.run([*command, str(tmp_path / "model-9"), "9", step], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert factor(target) == (3 if step == "retire" else 2)
    target.deploy(linear(tmp_path, 9), QUICK)
    assert factor(target) == 3
    assert there(target)[0].keys() == {"m", "m.v8", "m.v9"}


def test_a_graph_that_a_killed_deployer_has_loaded_is_not_taken_for_another(target, tmp_path, monkeypatch):
    """Same name and version, other files: what is loaded must be what is published."""

    def stop(reached):
        if reached == "verify":
            raise Killed

    killed = Deployments(target.client, target.files, on_step=stop)
    monkeypatch.setattr(killed, "_undone", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path / "a", 7, 1.0), QUICK)
    target.deploy(linear(tmp_path / "b", 7, 2.0), QUICK)
    assert factor(target) == 2
    for name in target.files.models():  # somebody empties the repository under the server
        for path in target.files.below(name):
            target.files.remove(f"{name}/{path}")
    target.deploy(linear(tmp_path / "c", 7, 3.0), QUICK)
    assert factor(target) == 3


def test_somebody_elses_model_with_a_versions_name_is_never_unloaded(target, tmp_path, running):
    theirs = running[1] / "m.v3"
    linear_graph(theirs / "3" / "model.onnx")
    (theirs / "config.pbtxt").write_text(
        'name: "m.v3" backend: "onnxruntime" max_batch_size: 8 input [{name: "x" data_type: TYPE_FP32 dims: [4]}] '
        'output [{name: "y" data_type: TYPE_FP32 dims: [3]}]'
    )
    target.client.load("m.v3")
    assert not target.delete("m")
    with pytest.raises(ConflictError, match="not deployed by mlflow-tdeploy"):
        target.deploy(linear(tmp_path, 3), QUICK)
    target.deploy(linear(tmp_path, 7), QUICK)
    target.delete("m")
    assert target.client.ready("m.v3")
    target.client.unload("m.v3")
    for path in ("3/model.onnx", "config.pbtxt"):
        target.files.remove(f"m.v3/{path}")


def test_files_that_were_changed_do_not_go_live(target, tmp_path):
    what = linear(tmp_path, 7)
    linear_graph(what.bundle.path(what.variant.entry), WEIGHTS * np.float32(1.3))
    with pytest.raises(IntegrityError, match="was changed"):
        target.deploy(what, QUICK)
    assert there(target)[0] == {}


def test_delete_needs_the_server_and_ends_what_has_no_files_any_more(target, tmp_path):
    target.deploy(linear(tmp_path, 7), QUICK)
    nobody = Deployments(TritonClient(Connection("http://127.0.0.1:1", timeout=2)), target.files)
    with pytest.raises(UnreachableError):
        nobody.delete("m")
    assert factor(target) == 1
    for name in target.files.models():
        for path in target.files.below(name):
            target.files.remove(f"{name}/{path}")
    assert target.delete("m")
    assert not target.client.ready("m")
    assert not target.client.ready("m.v7")


def test_what_the_server_still_routes_to_stays_whatever_the_repository_says(target, tmp_path, monkeypatch):
    """Killed between writing the route and loading it, where nothing is kept for going back to."""
    none = dataclasses.replace(QUICK, keep=0)
    target.deploy(linear(tmp_path, 7), none)
    killed = Deployments(target.client, target.files)
    original = killed._load

    def load(model, version):
        if model == "m":
            raise Killed
        original(model, version)

    monkeypatch.setattr(killed, "_load", load)
    monkeypatch.setattr(killed, "_undone", lambda *_, **__: contextlib.nullcontext())
    before = target.files.read("m/config.pbtxt")
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path, 8, 2.0), none)
    written = before.replace(b"versions: 7", b"versions: 8").replace(b'string_value: "7"', b'string_value: "8"')
    target.files.write("m/config.pbtxt", written)  # as if it had been killed before it took that back
    reached = []
    seen = Deployments(target.client, target.files, on_step=lambda step: reached.append((step, factor(target))))
    seen.deploy(linear(tmp_path, 8, 2.0), none)
    assert {answer for step, answer in reached if step not in ("retire", "switch")} == {1.0}
    assert factor(target) == 2
    assert there(target)[0].keys() == {"m", "m.v8"}


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


def test_a_rollback_that_was_killed_is_completed_and_goes_no_further(target, tmp_path, monkeypatch):
    keeping = dataclasses.replace(QUICK, keep=2)
    for version in (7, 8, 9):
        target.deploy(linear(tmp_path, version, float(version)), keeping)
    route = target.route("m").moved(8, "", "")
    text = (target.files.read("m/8/route.pbtxt") or b"").decode()
    from mlflow_tdeploy.triton.config import OWN, parse, to_text

    config = parse(text)
    for key, value in route.parameters().items():
        config.parameters[f"{OWN}{key}"].string_value = value
    target.files.write("m/config.pbtxt", to_text(config).encode())  # written, and killed before it was loaded
    assert factor(target) == 9
    assert target.rollback("m").version == 8
    assert factor(target) == 8
    assert target.rollback("m").version == 7


def test_one_deployment_that_is_damaged_says_nothing_about_the_others(target, tmp_path):
    for name in ("bert", "bert-large"):
        target.deploy(linear(tmp_path, 7, name=name), QUICK)
    whole = target.files.read("bert/config.pbtxt")
    target.files.write("bert/config.pbtxt", b"garbage: 1")
    assert target.names() == ["bert-large"]
    with pytest.raises(IntegrityError, match="'bert/config.pbtxt' in .* is damaged"):
        target.describe("bert")
    target.files.write("bert/config.pbtxt", whole)
