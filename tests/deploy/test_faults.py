"""Whatever fails or is killed on a real Triton: what served serves on, and the next call completes."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import (
    ConflictError,
    IntegrityError,
    NoVariantError,
    ServerError,
    UnreachableError,
    VerificationError,
)
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.at_start import models_at_start
from mlflow_tdeploy.deploy.files import FolderFiles
from mlflow_tdeploy.deploy.publish import INDEX
from mlflow_tdeploy.deploy.switch import Switch
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.local import local_triton
from tests.bundles import WEIGHTS, linear_graph
from tests.deploy.versions import QUICK, STEPS, Killed, changed_weights, factor, killed_at, linear, no_graph, there
from tests.triton.deployables import bundle_of, deployable


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
    from mlflow_tdeploy.runtime.model import open_model
    from mlflow_tdeploy.triton.bundle_version import BundleVersion

    bundle = bundle_of("sentence-embedding", tmp_path / "model")
    with open_model(tmp_path / "model") as model:
        data = VerifyData.of(["a dog", "the cat"] * 8).for_task(bundle.task())
        golden = golden_requests(bundle.task(), data, model.infer)
    monkeypatch.setattr(Bundle, "golden", lambda self: golden)
    original = BundleVersion.write_front

    def other(what, folder, options):
        original(what, folder, options)
        front = folder / str(what.version) / "manifest.json"
        text = front.read_text().replace('"max_length": 8', '"max_length": 1')
        front.unlink()
        front.write_text(text)

    target.deploy(deployable(bundle, version=7), QUICK)
    monkeypatch.setattr(BundleVersion, "write_front", other)
    with pytest.raises(VerificationError, match="with another 'sentence_embedding' than its graph: the tokenizer"):
        target.deploy(deployable(bundle, version=8), QUICK)
    assert target.describe("m")["version"] == 7
    assert there(target)[0].keys() == {"m", "m.v7"}


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_before_each_step_leaves_what_served_and_the_next_call_completes(target, tmp_path, step):
    """Nothing is cleaned up by who is killed: that is left to the next one."""
    target.deploy(linear(tmp_path, 7), QUICK)
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)

    killed = killed_at(target, step)
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert factor(target) == (3 if step == "retire" else 2)
    served = {"m", "m.v8", "m.v9"} if step == "retire" else {"m", "m.v7", "m.v8"}
    assert set(models_at_start(target.files.root)) == served  # a server that is started now is not held up
    done = target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert done.version == 9
    assert factor(target) == 3
    folders, _ = there(target)
    assert folders.keys() == {"m", "m.v8", "m.v9"}
    assert folders["m"] == ["8", "9", "config.pbtxt", INDEX]


@pytest.mark.parametrize("step", STEPS[:-1])
def test_of_a_first_deployment_that_was_killed_nothing_is_loaded_at_a_start(target, tmp_path, step):
    other = target.files.root / "other"
    linear_graph(other / "1" / "model.onnx", WEIGHTS)
    with pytest.raises(Killed):
        killed_at(target, step).deploy(linear(tmp_path, 7), QUICK)
    found = models_at_start(target.files.root)
    shutil.rmtree(other)
    assert found == ["other"]


@pytest.mark.parametrize(
    "step", [one if one == "switch" else pytest.param(one, marks=pytest.mark.slow) for one in STEPS[:-1]]
)
def test_after_a_kill_another_version_can_come(target, tmp_path, step):
    target.deploy(linear(tmp_path, 7), QUICK)

    killed = killed_at(target, step)
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path, 8, 2.0), QUICK)
    target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert factor(target) == 3
    assert there(target)[0].keys() == {"m", "m.v7", "m.v9"}


def test_no_server_and_the_wrong_repository_are_told(target, running, tmp_path):
    other = Deployments(target.client, FolderFiles(tmp_path / "elsewhere"))
    with pytest.raises(ServerError, match="cannot load 'm.v7'"):
        other.deploy(linear(tmp_path, 7), QUICK)
    assert other.files.models() == []
    nobody = Deployments(TritonClient(Connection("http://127.0.0.1:1", timeout=2)), FolderFiles(tmp_path / "elsewhere"))
    with pytest.raises(UnreachableError, match="nobody answers"):
        nobody.deploy(linear(tmp_path, 7), QUICK)
    assert nobody.files.models() == []


@pytest.mark.parametrize(
    "step", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("graph", "answers")), "switch"]
)
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


def test_a_graph_that_a_killed_deployer_has_loaded_is_not_taken_for_another(target, tmp_path):
    """Same name and version, other files: what is loaded must be what is published."""

    killed = killed_at(target, "verify")
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path / "a", 7, 1.0), QUICK)
    target.deploy(linear(tmp_path / "b", 7, 2.0), QUICK)
    assert factor(target) == 2
    for name in target.files.models():  # somebody empties the repository under the server
        for path in target.files.below(name):
            target.files.remove(f"{name}/{path}")
    with pytest.raises(ConflictError, match="does not have it: is that the server's repository"):
        target.deploy(linear(tmp_path / "c", 7, 3.0), QUICK)
    assert target.delete("m")
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
    killed = killed_at(target, "never")
    original = target.client.bring_up

    def bring_up(model, version):
        if model == "m":
            raise Killed
        original(model, version)

    before = target.files.read("m/config.pbtxt")
    monkeypatch.setattr(target.client, "bring_up", bring_up)
    with pytest.raises(Killed):
        killed.deploy(linear(tmp_path, 8, 2.0), none)
    written = before.replace(b"versions: 7", b"versions: 8").replace(b'string_value: "7"', b'string_value: "8"')
    monkeypatch.undo()
    target.files.write("m/config.pbtxt", written)  # as if it had been killed before it took that back
    reached = []
    seen = Deployments(target.client, target.files, on_step=lambda step: reached.append((step, factor(target))))
    seen.deploy(linear(tmp_path, 8, 2.0), none)
    assert {answer for step, answer in reached if step not in ("retire", "switch")} == {1.0}
    assert factor(target) == 2
    assert there(target)[0].keys() == {"m", "m.v8"}


def test_a_rollback_that_was_killed_is_completed_and_goes_no_further(target, tmp_path):
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


def test_a_variant_that_triton_cannot_open_is_refused_and_leaves_nothing(target, tmp_path):
    what = linear(tmp_path, 7)
    stripped = dataclasses.replace(what.variant, shared=what.variant.files)
    with pytest.raises(NoVariantError, match="takes its weights from another graph"):
        target.deploy(dataclasses.replace(what, variant=stripped), QUICK)
    assert there(target)[0] == {}


def test_a_delete_that_was_killed_holds_no_server_up(target, tmp_path):
    target.deploy(linear(tmp_path, 7), QUICK)

    def stop(step):
        if step == "remove m":
            raise Killed

    with pytest.raises(Killed):
        Deployments(target.client, target.files, on_step=stop).delete("m")
    assert target.files.models() == ["m"]  # half of it is there
    assert models_at_start(target.files.root) == []
    assert target.delete("m")
    assert target.files.models() == []


def test_who_is_interrupted_right_after_the_switch_keeps_what_answers(target, tmp_path, monkeypatch):
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    switch = Switch._switch

    def interrupted(self, *arguments):
        switch(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Switch, "_switch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert factor(target) == 2
    assert target.route("m").active == 8
    target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    target.rollback("m")
    assert factor(target) == 2


def test_a_network_that_goes_away_while_a_route_is_loaded_leaves_nobody_without_files(target, tmp_path, monkeypatch):
    """The server has loaded it, and nobody was told: its files stay, and the next call finds out."""
    target.deploy(linear(tmp_path, 7, 1.0), QUICK)
    call, away = TritonClient._call, []

    def lost(self, doing, *arguments, **more):
        if away:
            raise UnreachableError("nobody answers")
        found = call(self, doing, *arguments, **more)
        if doing == "load 'm'":
            away.append(doing)
            raise UnreachableError("the connection was closed")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TritonClient, "_call", lost)
        with pytest.raises(UnreachableError, match="the connection was closed"):
            target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert away
    assert factor(target) == 2
    described = target.describe("m")
    assert (described["version"], described["answers"], described["ready"]) == (7, 8, False)
    assert target.rollback("m", 7).changed
    assert factor(target) == 1
    target.deploy(linear(tmp_path, 8, 2.0), QUICK)
    assert factor(target) == 2
    assert there(target)[0].keys() == {"m", "m.v7", "m.v8"}


def test_a_version_that_answers_and_whose_files_are_lost_can_be_replaced(target, tmp_path):
    for version, times in ((7, 1.0), (8, 2.0)):
        target.deploy(linear(tmp_path, version, times), QUICK)
    before = target.route("m")
    target.rollback("m")
    target._write_route("m", target.route("m"))
    shutil.copyfile(target.files.root / "m/config.pbtxt", tmp_path / "seven")
    target.rollback("m", 8)
    shutil.copyfile(tmp_path / "seven", target.files.root / "m/config.pbtxt")
    shutil.rmtree(target.files.root / "m.v8")
    shutil.rmtree(target.files.root / "m" / "8")
    assert before.active == 8
    assert target.route("m").active == 7
    assert factor(target) == 2
    target.deploy(linear(tmp_path, 9, 3.0), QUICK)
    assert factor(target) == 3
