"""Versions that are tried out on everybody's requests before they answer all of them, as ``tdeploy.yaml`` says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.cli.watch import _look_once as look_once
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.rollout import Rollout
from mlflow_tdeploy.core.wire import rows_of
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.document import parse
from mlflow_tdeploy.promotion.look import make_plan
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.promotion.specfile import SpecFile
from mlflow_tdeploy.promotion.strategy import Strategy
from mlflow_tdeploy.promotion.watch import Watch
from tests.flavor.text_bundles import make_text_bundle
from tests.processes import program

QUICK = {"percent": 50, "minutes": 0.03, "requests": 5, "slower": 100}


def tried(spec, **how):
    """Return the same with a strategy."""
    rule = spec.models[0].model_copy(update={"strategy": Strategy.model_validate(how)})
    return spec.model_copy(update={"models": (rule,)})


@contextlib.contextmanager
def asking(spec):
    """Ask the first server all the time; yields how often it answered, and what failed."""
    server = spec.targets["both"].servers[0]
    client, found, over = deployments_at(spec.targets["both"], server).client, [0, []], threading.Event()

    def ask():
        while not over.is_set():
            try:
                client.infer("words", {"text": rows_of(["a cat", "dog"])})
                found[0] += 1
            except Exception as error:
                found[1].append(error)
            time.sleep(0.01)

    running = threading.Thread(target=ask)
    running.start()
    try:
        yield found
    finally:
        over.set()
        running.join()


def otherwise(tmp_path):
    """Register a third version, whose vectors have other directions."""
    made = make_text_bundle(tmp_path / "other", times=-1.0)
    mlflow_tdeploy.log_model(made, "words", registered_model_name="words")


def test_a_canary_is_tried_out_on_the_first_server_and_then_all_follow(two, words, versions):
    spec, _ = two
    spec = tried(spec, canary=QUICK)
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=spec)  # nothing served: nothing to try it beside
    words.set_registered_model_alias("words", "champion", 2)
    steps = make_plan(spec).steps
    assert [one.strategy for one in steps] == ["canary on 50 % of the requests for 0.03 min", ""]
    words.set_registered_model_alias("words", "champion", 1)
    with asking(spec) as (_, failed):
        mlflow_tdeploy.promote("models:/words/2", alias="champion", file=spec)
    assert not failed
    assert versions() == [2, 2]
    assert "canary: " in mlflow_tdeploy.history("words")[0].why
    assert "0 failed" in mlflow_tdeploy.history("words")[0].why
    words.set_registered_model_alias("words", "champion", 1)
    assert [one.strategy for one in make_plan(spec).steps] == ["", ""]  # it has answered before, and is kept


def test_a_shadow_that_answers_otherwise_is_refused_and_registry_and_servers_are_as_they_were(
    two, words, versions, tmp_path
):
    spec, _ = two
    spec = tried(spec, shadow={**QUICK, "percent": 100, "minutes": 1})
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=spec)
    otherwise(tmp_path)
    with asking(spec) as (_, failed), pytest.raises(MlflowException, match="The shadow was ended: 0 of .* alike"):
        mlflow_tdeploy.promote("models:/words/3", alias="champion", file=spec)
    assert not failed
    assert versions() == [1, 1]
    assert dict(words.get_registered_model("words").aliases) == {"champion": 1}
    assert "The shadow was ended" in words.get_model_version("words", "3").tags["tdeploy.both.words"]


@pytest.mark.slow
def test_a_watcher_tries_out_beside_its_looks_and_not_again_what_was_worse(two, words, versions, tmp_path):
    spec, _ = two
    spec = tried(spec, canary={**QUICK, "minutes": 1})
    watch = Watch(lambda: spec, interval=0.5)
    watch.look()
    assert versions() == [1, 1]
    otherwise(tmp_path)
    words.set_registered_model_alias("words", "champion", 3)
    running = threading.Thread(target=watch.run)
    running.start()
    try:
        time.sleep(6.0)  # nobody asks: it goes on
        assert watch.view.looks > 4
        assert any("version 3 is being tried out" in one.why for one in watch.view.standings)
        with asking(spec) as (_, failed):
            wait_for(lambda: watch.view.actions and watch.view.actions[0].decision == "failed")
        assert not failed
        looks, actions = watch.view.looks, len(watch.view.actions)
        wait_for(lambda: watch.view.looks > looks + 3)
        assert (versions(), len(watch.view.actions)) == ([1, 1], actions)
        assert {one.state for one in watch.view.standings} == {"drift"}
        words.set_registered_model_alias("words", "champion", 2)
        wait_for(lambda: any("version 2 is being tried out" in one.why for one in watch.view.standings))
    finally:
        watch.stop()
        running.join(30)
    assert not running.is_alive()
    assert versions() == [1, 1]
    assert "The watcher is being stopped" in watch.view.actions[0].why


@pytest.mark.slow
def test_who_watches_once_waits_for_what_is_tried_out(two, words, versions, tmp_path, capsys):
    spec, _ = two
    mlflow_tdeploy.apply(file=spec)
    words.set_registered_model_alias("words", "champion", 2)
    file = tmp_path / "tdeploy.yaml"
    how = "strategy: {canary: {percent: 50, minutes: 0.03, requests: 5, slower: 100}}"
    file.write_text(file.read_text().replace("to: both,", f"to: both, {how},"))
    with asking(spec) as (_, failed):
        code = look_once(SpecFile(file))  # the command itself changes the process
    assert (code, failed, versions()) == (0, [], [2, 2])
    assert capsys.readouterr().out.count("in sync") == 2


def test_an_alias_that_is_moved_on_ends_what_is_tried_out(two, words, versions):
    spec, _ = two
    spec = tried(spec, canary={**QUICK, "minutes": 10})
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=spec)
    words.set_registered_model_alias("words", "champion", 2)
    timer = threading.Timer(4.0, words.set_registered_model_alias, ("words", "champion", 1))
    timer.start()
    outcomes = mlflow_tdeploy.apply(file=spec)
    timer.join()
    assert [one.state for one in outcomes] == ["failed", "left"]
    assert "The registry does not want version 2 any more" in outcomes[0].why
    assert versions() == [1, 1]


@pytest.mark.slow
def test_who_is_told_to_end_takes_back_what_was_begun(two, words, versions, tmp_path):
    """As a job that is cancelled: by SIGINT, and soon after by SIGTERM."""
    spec, _ = two
    mlflow_tdeploy.apply(file=spec)
    file = tmp_path / "tdeploy.yaml"
    file.write_text(file.read_text().replace("to: both,", "to: both, strategy: {canary: {minutes: 5}},"))
    first = deployments_at(spec.targets["both"], spec.targets["both"].servers[0])
    for signals in ((signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)):
        command = [sys.executable, "-m", "mlflow_tdeploy.cli", "promote", "models:/words/2", "--alias", "champion"]
        store = mlflow.get_tracking_uri()
        environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "MLFLOW_REGISTRY_URI": store}
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # CI may run in the background
        with program([*command, "--file", str(file)], env=environment, stderr=subprocess.DEVNULL, **heard) as process:
            end = time.monotonic() + 60
            while not first.describe("words").get("tried_out") and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.1)
            for number in signals:
                process.send_signal(number)
                time.sleep(0.2)
            assert process.wait(60) == (143 if len(signals) == 1 else 1)
        assert "tried_out" not in first.describe("words")
        assert versions() == [1, 1]
        assert int(words.get_model_version_by_alias("words", "champion").version) == 1


def test_what_a_killed_deployer_tries_out_is_ended_by_the_next_one(two, words, versions):
    spec, _ = two
    mlflow_tdeploy.apply(file=spec)
    first = deployments_at(spec.targets["both"], spec.targets["both"].servers[0])
    rollout = Rollout(2, "words.v2.check", "words.tally.check", "canary", 0.5, 600.0)
    route = first.route("words")
    first._switch("words", route, replace(route, rollout=to_json(rollout)))
    assert first.describe("words")["tried_out"] == 2
    assert "version 2 is tried out there, which nobody wants any more" in make_plan(spec).steps[0].why
    assert [one.state for one in mlflow_tdeploy.apply(file=spec)] == ["done"]
    assert first.route("words").rollout == ""
    assert {one.action for one in make_plan(spec).steps} == {"none"}


def test_a_plan_shows_the_strategy(two, words, tmp_path):
    spec, _ = two
    mlflow_tdeploy.apply(file=spec)
    words.set_registered_model_alias("words", "champion", 2)
    file = tmp_path / "tdeploy.yaml"
    file.write_text(file.read_text().replace("to: both,", "to: both, strategy: shadow,"))
    done = CliRunner().invoke(main, ["plan", "--file", str(file)])
    assert done.exit_code == 0, done.output
    assert done.output.count("  strategy  shadow on 100 % of the requests for 10 min") == 1


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("strategy: switch", "switch"),
        ("strategy: canary", "canary on 10 % of the requests for 10 min"),
        ("strategy: {canary: }", "canary on 10 % of the requests for 10 min"),
        ("strategy: {canary: {percent: 5, minutes: 60}}", "canary on 5 % of the requests for 60 min"),
        ("strategy: {shadow: {minutes: 1}}", "shadow on 100 % of the requests for 1 min"),
        ("keep: 1", "this key is unknown"),
        ("strategy: {canary: {share: 5}}", "'models[0].strategy.canary.share': this key is unknown. Known here: "
         "percent, minutes, requests, errors, slower, agreement"),
        ("strategy: {canary: {percent: 0}}", "greater than 0"),
        ("strategy: {canary: {}, shadow: {}}", "one way: canary or shadow"),
        ("strategy: often", "'models[0].strategy.often': this key is unknown. Known here: canary, shadow"),
    ],
)  # fmt: skip
def test_a_strategy_is_a_word_or_says_how(said, means):
    text = "targets: {t: {server: 'http://a:1', repository: /r}}\n"
    text += f"models: [{{name: m, alias: a, to: t, {said}}}]\n"
    assert means in outcome_of(lambda: str(Spec.of(parse(text, "tdeploy.yaml")).models[0].strategy))


def outcome_of(what):
    """Return what it says, be it an error."""
    try:
        return what()
    except InvalidInputError as error:
        return str(error)


def wait_for(what, seconds=40.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)
