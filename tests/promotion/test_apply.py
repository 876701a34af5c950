"""A plan is done on real servers: all of a target, or none of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.switch import Switch
from mlflow_tdeploy.deploy.wanted import Wanted
from mlflow_tdeploy.promotion import apply as applying
from mlflow_tdeploy.promotion import plan as planning
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.apply import apply
from mlflow_tdeploy.promotion.compatible import Difference
from mlflow_tdeploy.promotion.look import make_plan
from mlflow_tdeploy.promotion.spec import Spec
from tests.flavor.text_bundles import make_text_bundle


def test_all_servers_of_a_target_get_a_version_or_none_does(two, words, tmp_path, versions):
    spec, second = two
    done = apply(make_plan(spec), spec)
    assert [one.state for one in done] == ["done", "done"]
    assert versions() == [1, 1]
    assert [one.action for one in make_plan(spec).steps] == ["none", "none"]
    assert apply(make_plan(spec), spec) == ()

    words.set_registered_model_alias("words", "champion", 2)
    old = make_plan(spec)
    command = ["apply", "--file", str(tmp_path / "tdeploy.yaml"), "--yes"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert done.output.count("done       both words at http") == 2
    assert versions() == [2, 2]
    stale = apply(old, spec)
    assert {one.state for one in stale} == {"done"}  # what it wants is there
    assert versions() == [2, 2]

    words.set_registered_model_alias("words", "champion", 1)
    plan = make_plan(spec)
    second.stop()
    taken_back, failed = apply(plan, spec)
    assert (taken_back.state, failed.state) == ("taken back", "failed")
    assert "nobody answers" in failed.why
    assert versions(1) == [2]
    assert [one.action for one in make_plan(spec).steps] == ["update", "unknown"]
    answer = deployments_at(spec.targets["both"], spec.targets["both"].servers[0]).client.infer(
        "words", {"text": np.array([[b"the cat"]], object)}
    )
    assert answer["sentence_embedding"].shape[0] == 1


def test_a_plan_that_is_older_than_what_is_there_is_not_done(two, words, versions):
    spec, _ = two
    empty = make_plan(spec)
    apply(empty, spec)
    words.set_registered_model_alias("words", "champion", 2)
    apply(make_plan(spec), spec)
    done = apply(empty, spec)  # version 1, where nothing was
    assert [one.state for one in done] == ["left", "left"]
    assert done[0].why == "The registry does not want version 1 any more. Plan again."
    words.set_registered_model_alias("words", "champion", 1)
    done = apply(empty, spec)
    assert [one.state for one in done] == ["failed", "left"]
    assert "Version 2 of 'words' answers, the plan has seen None. Plan again." in done[0].why
    assert versions() == [2, 2]


def test_one_model_under_two_names_is_served_as_each_rule_says(two, words):
    spec, _ = two
    rule = spec.models[0]
    new = rule.model_copy(update={"deploy_as": "words-new", "alias": "new", "serve": {**rule.serve, "keep": 3}})
    words.set_registered_model_alias("words", "new", 2)
    both = spec.model_copy(update={"models": (rule, new)})
    assert {one.state for one in apply(make_plan(both), both)} == {"done"}
    first = deployments_at(spec.targets["both"], spec.targets["both"].servers[0])
    said = {name: first.describe(name)["config"].get("keep") for name in ("words", "words-new")}
    assert said == {"words": None, "words-new": 3}
    assert {one.action for one in make_plan(both).steps} == {"none"}


def test_whatever_fails_on_one_server_is_taken_back_on_the_others(two, words, monkeypatch, versions):
    spec, _ = two
    bring, asked = Wanted.for_server, []

    def failing(wanted):
        asked.append(wanted)
        if len(asked) == 2:
            raise MlflowException("the registry went away")
        return bring(wanted)

    monkeypatch.setattr(Wanted, "for_server", failing)
    done = apply(make_plan(spec), spec)
    assert [one.state for one in done] == ["taken back", "failed"]
    assert versions() == [None, None]


def failing_at(monkeypatch, place, error):
    """Have the deployment at one server of two fail."""
    deploy, asked = Deployments.deploy, []

    def failing(self, *arguments, **more):
        asked.append(1)
        if len(asked) == place:
            raise error
        return deploy(self, *arguments, **more)

    monkeypatch.setattr(Deployments, "deploy", failing)


@pytest.mark.parametrize("error", [pytest.param(RuntimeError("no"), marks=pytest.mark.slow), KeyboardInterrupt()])
def test_what_is_taken_back_is_as_it_was_and_can_go_back_further(two, words, versions, monkeypatch, error):
    spec, _ = two
    for version in (1, 2):
        words.set_registered_model_alias("words", "champion", version)
        apply(make_plan(spec), spec)
    words.create_model_version("words", words.get_model_version("words", "1").source)
    before = [routes(spec, place) for place in (0, 1)]
    with monkeypatch.context() as patch:
        failing_at(patch, 2, error)
        with contextlib.suppress(KeyboardInterrupt, MlflowException):
            mlflow_tdeploy.promote("models:/words/3", alias="champion", file=spec)
    assert len(before[0].previous) == 1
    assert [(one.active, one.previous, one.ahead) for one in (routes(spec, 0), routes(spec, 1))] == [
        (one.active, one.previous, one.ahead) for one in before
    ]
    assert int(dict(words.get_registered_model("words").aliases)["champion"]) == 2
    mlflow_tdeploy.rollback("words", file=spec)
    assert versions() == [1, 1]
    for place in (0, 1):
        target = spec.targets["both"]
        assert deployments_at(target, target.servers[place]).graphs("words") == ["words.v1", "words.v2"]


def routes(spec, place):
    target = spec.targets["both"]
    return deployments_at(target, target.servers[place]).route("words")


def test_going_back_by_the_registry_passes_no_gate_that_it_has_passed(two, words, versions, monkeypatch):
    """As after a rollback that was killed when it had moved the alias."""
    spec, _ = two
    for version in (1, 2):
        mlflow_tdeploy.promote(f"models:/words/{version}", alias="champion", file=spec)
    found = [Difference("the label bad is gone", breaking=True)]
    monkeypatch.setattr(planning, "differences", lambda before, after: tuple(found))
    monkeypatch.setattr(applying, "metric_gate", lambda *arguments: pytest.fail("it is asked"))
    words.set_registered_model_alias("words", "champion", 1)
    assert [one.action for one in make_plan(spec).steps] == ["update", "update"]
    apply(make_plan(spec), spec)
    assert versions() == [1, 1]


def test_one_refusal_refuses_a_version_on_all_servers_of_the_target(two, words, versions, tmp_path):
    spec, _ = two
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=spec)
    made = make_text_bundle(tmp_path / "other", "text-classification")
    mlflow_tdeploy.log_model(made, "words", registered_model_name="words")
    words.set_registered_model_alias("words", "champion", 3)
    target = spec.targets["both"]
    deployments_at(target, target.servers[0]).delete("words")  # it would take whatever comes
    plan = make_plan(spec)
    assert [one.action for one in plan.steps] == ["refuse", "refuse"]
    assert plan.steps[0].why.startswith(f"refused at {target.servers[1].url}: signature")
    apply(plan, spec)
    assert versions() == [None, 1]


def test_a_server_whose_files_cannot_be_read_is_told_and_stops_no_other(two, words, versions):
    spec, _ = two
    apply(make_plan(spec), spec)
    place = Path(spec.targets["both"].servers[0].repository) / "words" / "config.pbtxt"
    place.unlink()
    place.mkdir()
    words.set_registered_model_alias("words", "champion", 2)
    plan = make_plan(spec)
    assert [one.action for one in plan.steps] == ["unknown", "update"]
    assert "directory" in plan.steps[0].why


def test_other_options_of_what_serves_are_refused_with_what_to_do(two, words):
    spec, _ = two
    apply(make_plan(spec), spec)
    rule = spec.models[0]
    other = rule.model_copy(update={"serve": {**rule.serve, "max_queue_delay_microseconds": 900}})
    plan = make_plan(spec.model_copy(update={"models": (other,)}))
    assert [one.action for one in plan.steps] == ["refuse", "refuse"]
    assert "register it once more and move the alias" in plan.steps[0].why


@pytest.mark.parametrize("place", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_who_is_interrupted_right_after_a_switch_takes_back_that_server_too(two, words, versions, monkeypatch, place):
    spec, _ = two
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=spec)
    switch, asked = Switch._switch, []

    def interrupted(self, *arguments):
        switch(self, *arguments)
        asked.append(1)
        if len(asked) == place:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Switch, "_switch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mlflow_tdeploy.promote("models:/words/2", alias="champion", file=spec)
    assert versions() == [1, 1]
    assert {one.action for one in make_plan(spec).steps} == {"none"}


@pytest.fixture
def shared(start, tmp_path):
    """Three servers that have one repository."""
    folder = tmp_path / "shared"
    folder.mkdir()
    urls = [start(folder).url for _ in range(3)]
    text = f"targets: {{all: {{servers: [{', '.join(urls)}], repository: '{folder}'}}}}\n"
    text += "models: [{name: words, alias: champion, to: all, serve: {device: cpu, variant: onnx-fp32, keep: 0}}]\n"
    (tmp_path / "shared.yaml").write_text(text)
    return Spec.read(tmp_path / "shared.yaml")


def loaded(spec, target="all"):
    """Return which models each server has loaded, and which version answers."""
    found = [deployments_at(spec.targets[target], one) for one in spec.targets[target].servers]
    ready = [{state.name for state in one.client.models() if state.state == "READY"} for one in found]
    return ready, [one.serving("words").active for one in found]


@pytest.mark.slow
def test_servers_with_one_repository_are_changed_and_taken_back_together(shared, words, monkeypatch):
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=shared)
    assert loaded(shared) == ([{"words", "words.v1"}] * 3, [1, 1, 1])
    with monkeypatch.context() as patch:
        failing_at(patch, 3, RuntimeError("no"))
        with pytest.raises(MlflowException, match="Everything is as it was"):
            mlflow_tdeploy.promote("models:/words/2", alias="champion", file=shared)
    assert loaded(shared) == ([{"words", "words.v1"}] * 3, [1, 1, 1])
    mlflow_tdeploy.promote("models:/words/2", alias="champion", file=shared)
    assert loaded(shared) == ([{"words", "words.v2"}] * 3, [2, 2, 2])
    folder = Path(shared.targets["all"].repository)
    assert {one.name for one in folder.iterdir() if one.is_dir()} == {"words", "words.v2"}
    assert {one.action for one in make_plan(shared).steps} == {"none"}


def test_a_model_that_is_called_otherwise_now_is_the_same(two, words, versions):
    spec, _ = two
    rule = spec.models[0].model_copy(update={"deploy_as": "words"})
    apply(make_plan(spec), spec)
    words.rename_registered_model("words", "speech")
    renamed = spec.model_copy(update={"models": (rule.model_copy(update={"name": "speech"}),)})
    assert {one.action for one in make_plan(renamed).steps} == {"none"}


def test_what_a_deleted_version_answers_is_known_all_the_same(two, words, versions, tmp_path):
    spec, _ = two
    apply(make_plan(spec), spec)
    made = make_text_bundle(tmp_path / "labels", "text-classification")
    mlflow_tdeploy.log_model(made, "labels", registered_model_name="words")
    words.delete_model_version("words", "1")
    words.set_registered_model_alias("words", "champion", 3)
    assert {one.why for one in make_plan(spec).refused} == {
        "signature: compatible, and the task is text-classification, it was sentence-embedding (breaking)"
    }
    for server in spec.targets["both"].servers:
        (Path(server.repository) / "words/1/manifest.json").unlink()
    assert all("nobody knows what the version that serves takes" in one.why for one in make_plan(spec).refused)
    gates = spec.models[0].gates.model_copy(update={"signature": "any"})
    free = spec.model_copy(update={"models": (spec.models[0].model_copy(update={"gates": gates}),)})
    assert {one.action for one in make_plan(free).steps} == {"update"}


def test_targets_with_a_server_in_common_do_not_undo_each_other(two, words):
    spec, _ = two
    words.set_registered_model_alias("words", "next", 2)
    rule = spec.models[0]
    other = rule.model_copy(update={"alias": "next", "to": ("again",)})
    targets = {**spec.targets, "again": spec.targets["both"]}
    both = spec.model_copy(update={"targets": targets, "models": (rule, other)})
    steps = make_plan(both).steps
    assert {one.action for one in steps} == {"refuse"}
    assert "have http://127.0.0.1:" in steps[0].why
    apart = both.model_copy(update={"models": (rule, other.model_copy(update={"deploy_as": "words-next"}))})
    assert {one.action for one in make_plan(apart).steps} == {"create"}
