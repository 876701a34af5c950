"""What would be done about a difference between registry and servers: as records, and on a real Triton."""

from __future__ import annotations

import dataclasses
import json

import mlflow
import pytest
from click.testing import CliRunner

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.deploy.choose import choose, served
from mlflow_tdeploy.deploy.plan import Settings
from mlflow_tdeploy.deploy.settings import DeploySettings, as_record
from mlflow_tdeploy.promotion.actual import Observed
from mlflow_tdeploy.promotion.candidate import Candidate, candidate
from mlflow_tdeploy.promotion.compatible import Asked
from mlflow_tdeploy.promotion.plan import Before, Plan, settled, step
from mlflow_tdeploy.promotion.registry import Desired
from mlflow_tdeploy.promotion.spec import Rule
from tests.flavor.text_bundles import make_text_bundle


def asked(longest=128):
    x, y = TensorSpec("x", "float32", ("batch",)), TensorSpec("y", "float32", ("batch",))
    return Asked("tensors", {}, Signature((Dim("batch", 1, 1, longest),), (x,), (y,)))


RULE = Rule.model_validate({"name": "m", "alias": "champion", "to": "a"})
WANTED = Desired("m", 8, "m", "a", RULE)
COMING = Candidate("int8", "sha-8", "key-8", 5_000, asked(), {"worst_cosine": 0.99}, "int8 (fast)")
SERVES = Observed(
    "http://a:8000", "m", True,
    {"version": 7, "variant": "fp32", "digest": "sha-7", "key": "key-7", "model_uri": "models:/m/7", "ready": True,
     "answers": 7},
)  # fmt: skip
BEFORE = Before(asked(), {"worst_cosine": 1.0})


def now(**more):
    return dataclasses.replace(SERVES, described={**SERVES.described, **more})


def test_another_version_is_brought_and_what_speaks_for_it_is_told():
    found = step(WANTED, SERVES, COMING, BEFORE)
    assert (found.action, found.before, found.after, found.variants) == ("update", 7, 8, ("fp32", "int8"))
    assert (found.digest, found.moves, found.evidence) == ("sha-8", 5_000, {"worst_cosine": (1.0, 0.99)})
    assert [one.gate for one in found.verdicts if one.passed] == ["variant", "bundle", "signature"]
    first = step(WANTED, Observed("http://a:8000", "m"), COMING, Before())
    assert (first.action, first.before, first.why) == ("create", None, "int8 (fast)")


def test_what_is_there_already_is_nothing_to_do():
    there = now(version=8, key="key-8", model_uri="models:/m/8", digest="sha-8")
    assert step(WANTED, there, COMING, BEFORE).action == "none"
    assert (
        step(WANTED, now(version=8, key="key-8", model_uri="models:/m/8", ready=False), COMING, BEFORE).action
        == "update"
    )
    other = step(WANTED, now(version=8, key="other", model_uri="models:/m/8"), COMING, BEFORE)
    assert (other.action, other.verdicts[-1].gate) == ("refuse", "options")
    kept = dataclasses.replace(WANTED, rule=RULE.model_copy(update={"serve": {"keep": 3}}))
    otherwise = step(kept, there, COMING, BEFORE)
    assert (otherwise.action, otherwise.again, otherwise.moves) == ("update", True, 0)
    assert otherwise.why == "version 8 answers, and not as is said now"
    same_files = step(WANTED, now(digest="sha-8"), COMING, BEFORE)
    assert (same_files.action, same_files.moves) == ("update", 0)


def test_a_version_that_was_deployed_as_it_is_said_needs_no_look_at_the_model():
    rule = Rule.model_validate({"name": "m", "alias": "champion", "to": "a", "serve": {"keep": 2}})
    wanted = dataclasses.replace(WANTED, rule=rule, version=7)
    there = now(config={"keep": 2})
    found = settled(wanted, there)
    assert found is not None
    assert (found.action, found.before, found.after, found.variants, found.digest) == (
        "none", 7, 7, ("fp32", "fp32"), "sha-7",
    )  # fmt: skip
    for other in (
        now(config={"keep": 3}),
        now(config={"keep": 2}, ready=False),
        now(config={"keep": 2}, model_uri="models:/m/6"),
    ):
        assert settled(wanted, other) is None
    assert settled(dataclasses.replace(wanted, version=8), there) is None
    auto = dataclasses.replace(wanted, rule=rule.model_copy(update={"variants": "auto"}))
    assert settled(auto, there) is None


@pytest.mark.parametrize(
    ("gate", "coming", "action"),
    [
        ("compatible", asked(64), "refuse"),
        ("compatible", asked(256), "update"),
        ("same", asked(256), "refuse"),
        ("any", asked(64), "update"),
    ],
)
def test_a_signature_that_breaks_who_asks_is_refused_unless_it_may(gate, coming, action):
    rule = Rule.model_validate({"name": "m", "alias": "champion", "to": "a", "gates": {"signature": gate}})
    wanted = dataclasses.replace(WANTED, rule=rule)
    found = step(wanted, SERVES, dataclasses.replace(COMING, asked=coming), BEFORE)
    assert found.action == action
    assert found.differences
    if action == "refuse":
        assert "axis 0 of input 'x' is" in found.why
        assert found.verdicts[-1].gate == "signature"


def test_what_cannot_be_deployed_or_asked_is_told_and_what_nobody_wants_serves_on():
    bad = dataclasses.replace(COMING, refused="No variant serves there")
    found = step(WANTED, SERVES, bad, BEFORE)
    assert (found.action, found.why, [one.gate for one in found.verdicts]) == ("refuse", bad.refused, ["variant"])
    away = step(WANTED, Observed("http://a:8000", "m", False, why="nobody answers"), None, Before())
    assert (away.action, away.why) == ("unknown", "nobody answers")
    gone = step(dataclasses.replace(WANTED, version=None), SERVES, None, BEFORE)
    assert gone.action == "keep"
    assert gone.why == "no version of it has the alias 'champion': what serves serves on"
    missing = step(dataclasses.replace(WANTED, version=None, registered=False), SERVES, None, BEFORE)
    assert (missing.action, missing.why) == ("unknown", "there is no registered model 'm' (yet)")
    silent = step(WANTED, now(answers=None, ready=False), bad, BEFORE)
    assert (silent.action, silent.silent) == ("refuse", True)
    assert silent.why == f"version 7 is deployed there and does not answer; {bad.refused}"
    whole = Plan((found, away, gone, step(WANTED, SERVES, COMING, BEFORE)))
    assert ([one.action for one in whole.changes], len(whole.refused)) == (["update"], 2)


def test_what_this_package_has_not_logged_is_refused_and_told_where_to_take_it(tracking, tmp_path):
    client = mlflow.MlflowClient()
    client.create_registered_model("other")
    (tmp_path / "artifacts" / "other").mkdir(parents=True)
    client.create_model_version("other", source=(tmp_path / "artifacts" / "other").as_uri())
    wanted = dataclasses.replace(WANTED, model="other", version=1)
    found = candidate(wanted, Observed("http://a:8000", "m"))
    assert found.refused.startswith("No bundle at")
    assert "mlflow deployments create -t tdeploy" in found.refused
    gone = candidate(dataclasses.replace(wanted, version=7), Observed("http://a:8000", "m"))
    assert "other" in gone.refused


@pytest.fixture
def words(tracking, tmp_path):
    """Three versions: two alike, and one of another task."""
    for number, task in enumerate(("sentence-embedding", "sentence-embedding", "text-classification")):
        made = make_text_bundle(tmp_path / str(number), task)
        mlflow_tdeploy.log_model(made, "words", registered_model_name="words")
    found = mlflow.MlflowClient()
    found.set_registered_model_alias("words", "champion", 1)
    return found


def plan(tmp_path, *more):
    done = CliRunner().invoke(main, ["plan", "--file", str(tmp_path / "tdeploy.yaml"), *more])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done


def test_a_plan_of_a_real_registry_and_a_real_server_moves_nothing(target, running, words, tmp_path):
    triton, repository = running
    (tmp_path / "tdeploy.yaml").write_text(
        f"targets: {{here: {{server: '{triton.url}', repository: '{repository}'}},\n"
        f"  away: {{server: 'http://127.0.0.1:1', repository: '{repository}'}}}}\n"
        f"models: [{{name: words, alias: champion, to: [here, away], serve: {{device: cpu, variant: onnx-fp32}}}}]\n"
    )
    before = sorted(repository.rglob("*"))
    first = plan(tmp_path)
    assert first.exit_code == 1
    assert "create  here words at" in first.output
    assert "version none -> 1" in first.output
    assert "unknown away words at http://127.0.0.1:1: version none" in first.output
    assert "1 to change, 1 refused or unknown, 2 in all" in first.output
    assert sorted(repository.rglob("*")) == before

    said = {"device": "cpu", "variant": "onnx-fp32"}
    settings = DeploySettings.of(said)
    what = choose("models:/words/1", settings, name="words")
    target.deploy(what, Settings(grace=0.0, options=served(settings, what), config=as_record(said)))
    try:
        here = json.loads(plan(tmp_path, "--json").output)["steps"][1]
        assert (here["action"], here["before"], here["after"]) == ("none", 1, 1)
        words.set_registered_model_alias("words", "champion", 2)
        here = json.loads(plan(tmp_path, "--json").output)["steps"][1]
        assert (here["action"], here["after"], here["variants"]) == ("update", 2, ["onnx-fp32", "onnx-fp32"])
        assert here["moves"] == 0  # the same weights
        words.set_registered_model_alias("words", "champion", 3)
        refused = plan(tmp_path)
        assert "refuse  here words" in refused.output
        assert "the task is text-classification, it was sentence-embedding (breaking)" in refused.output
        words.delete_registered_model_alias("words", "champion")
        assert "keep    here words" in plan(tmp_path).output
    finally:
        target.delete("words")
