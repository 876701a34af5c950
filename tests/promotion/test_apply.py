"""A plan is done on real servers: all of a target, or none of it."""

from __future__ import annotations

import numpy as np
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

from mlflow_tdeploy.cli import main
from mlflow_tdeploy.deploy.wanted import Wanted
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.apply import apply
from mlflow_tdeploy.promotion.look import make_plan


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
