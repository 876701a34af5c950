"""A version is promoted, or gone back from, in the registry and on the servers; or nothing changes anywhere."""

from __future__ import annotations

import json

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.promotion import promote as promoting


def alias(client, name="champion"):
    return int(dict(client.get_registered_model("words").aliases).get(name, 0))


def tags(client, version):
    return dict(client.get_model_version("words", str(version)).tags)


def said(*arguments, code=0):
    done = CliRunner().invoke(main, [str(one) for one in arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_a_version_is_promoted_and_gone_back_from_with_its_alias(two, words, versions, tmp_path):
    _, second = two
    file = tmp_path / "tdeploy.yaml"
    assert [one.state for one in mlflow_tdeploy.promote("models:/words/1", alias="champion", file=file)] == ["done"] * 2
    output = said("promote", "models:/words/2", "--alias", "champion", "--file", file)
    assert output.count("done       both words at http") == 2
    assert (alias(words), versions()) == (2, [2, 2])
    assert said("promote", "models:/words/2", "--alias", "champion", "--file", file) == (
        "It answers everywhere already; the registry says so, too.\n"
    )
    assert tags(words, 2)["tdeploy.both.words"].startswith("serves since ")
    assert tags(words, 1)["tdeploy.both.words"].endswith("then version 2")

    table = said("status", "--file", file)
    assert table.count("in sync") == 2
    rows = json.loads(said("status", "--json", "--file", file))
    assert [(one["wants"], one["serves"], one["variant"]) for one in rows] == [(2, 2, "onnx-fp32")] * 2

    assert said("rollback", "words", "--file", file).count("done") == 2
    assert (alias(words), versions()) == (1, [1, 1])
    assert {one.action for one in mlflow_tdeploy.plan(file).steps} == {"none"}
    with pytest.raises(MlflowException, match="has no version before the one that answers"):
        mlflow_tdeploy.rollback("words", file=file)
    mlflow_tdeploy.rollback("words", 2, file=file)  # forward again
    assert (alias(words), versions()) == (2, [2, 2])

    second.stop()
    with pytest.raises(MlflowException, match="may not serve as 'words' on target 'both'.*does not answer") as error:
        mlflow_tdeploy.promote("models:/words/1", alias="champion", file=file)
    assert error.value.error_code == "INVALID_STATE"
    assert (alias(words), versions(1)) == (2, [2])
    output = said("rollback", "words", "--file", file, code=1)  # an emergency does not wait for the one that is away
    assert "done       both words" in output
    assert "left       both words" in output
    assert (alias(words), versions(1)) == (1, [1])
    assert "unknown" in said("status", "--file", file, code=1)

    events = mlflow_tdeploy.history("words")
    assert [(one.decision, one.trigger, one.before, one.version) for one in events] == [
        ("rolled back", "rollback", 2, 1), ("rolled back", "rollback", 1, 2), ("rolled back", "rollback", 2, 1),
        ("deployed", "promote", 1, 2), ("deployed", "promote", None, 1),
    ]  # fmt: skip
    assert all("@" in one.by and one.seconds > 0 for one in events)
    assert said("history", "words", "--most", "1").startswith(f"{events[0].at[:19]}  rolled back both words: 2 -> 1,")
    assert json.loads(said("history", "words", "--json"))[0]["why"] == "back from version 2"


def test_what_fails_on_a_server_leaves_alias_and_servers_as_they_were_and_is_told_at_the_version(
    two, words, versions, monkeypatch, tmp_path
):
    file = tmp_path / "tdeploy.yaml"
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=file)
    deploy, asked = Deployments.deploy, []

    def failing(self, *arguments, **more):
        asked.append(alias(words))
        if len(asked) == 2:
            raise RuntimeError("a gate that throws")
        return deploy(self, *arguments, **more)

    monkeypatch.setattr(Deployments, "deploy", failing)
    output = said("promote", "models:/words/2", "--alias", "champion", "--file", file, code=1)
    assert "taken back both words" in output
    assert "RuntimeError: a gate that throws. Everything is as it was." in output
    assert asked == [2, 2]  # first the registry: a watcher that looks now wants the same
    assert (alias(words), versions()) == (1, [1, 1])
    assert tags(words, 2)["tdeploy.both.words"].startswith("failed ")
    assert mlflow_tdeploy.history("words")[0].decision == "failed"


def test_who_is_interrupted_when_all_serve_leaves_registry_and_servers_together(two, words, versions, monkeypatch):
    """What is not kept is removed last, and takes seconds: that is when people press Ctrl-C."""
    spec, _ = two
    mlflow_tdeploy.promote("models:/words/1", alias="champion", file=spec)

    def interrupted(self, *arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Deployments, "retire", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mlflow_tdeploy.promote("models:/words/2", alias="champion", file=spec)
    assert (alias(words), versions()) == (2, [2, 2])
    assert mlflow_tdeploy.history("words")[0].decision == "deployed"


def test_an_alias_that_was_moved_meanwhile_is_left_alone(two, words, monkeypatch):
    spec, _ = two

    def failing(steps, spec, **more):
        words.set_registered_model_alias("words", "champion", 1)
        raise RuntimeError("killed")

    words.delete_registered_model_alias("words", "champion")
    monkeypatch.setattr(promoting, "together", failing)
    with pytest.raises(RuntimeError):
        promoting.promote("models:/words/2", spec, alias="champion")
    assert alias(words) == 1


@pytest.mark.slow
def test_a_stage_is_a_way_to_promote_too(two, words, versions):
    spec, _ = two
    rule = spec.models[0].model_copy(update={"alias": "", "stage": "Production"})
    spec = spec.model_copy(update={"models": (rule,)})
    for version in (1, 2, 1):  # the older one too: others are archived
        mlflow_tdeploy.promote(f"models:/words/{version}", stage="Production", file=spec)
        assert versions() == [version, version]
    stages = {int(one.version): one.current_stage for one in words.search_model_versions("name='words'")}
    assert stages == {1: "Production", 2: "Archived"}
    mlflow_tdeploy.rollback("words", file=spec)
    assert versions() == [2, 2]
    assert words.get_model_version("words", "2").current_stage == "Production"


def test_wrong_calls_are_told_and_change_nothing(two, words, versions, tmp_path):
    spec, _ = two
    for uri, more, why in (
        ("models:/words/9", {"alias": "champion"}, "9"),
        (
            "models:/words/2",
            {"alias": "new"},
            "No rule serves 'words' by alias 'new'. It is served by alias 'champion'",
        ),
        ("models:/words/2", {}, "Say an alias or a stage"),
        ("models:/words/2", {"stage": "Prod"}, "no stage 'Prod'"),
        ("runs:/1/model", {"alias": "champion"}, "of no registered version"),
    ):
        with pytest.raises(MlflowException, match=why):
            mlflow_tdeploy.promote(uri, file=spec, **more)
    with pytest.raises(MlflowException, match="No rule serves 'nobody'. Served are: words"):
        mlflow_tdeploy.rollback("nobody", file=spec)
    with pytest.raises(MlflowException, match="Nothing is deployed as 'words'"):
        mlflow_tdeploy.rollback("words", file=spec)
    assert (alias(words), versions()) == (1, [None, None])
    with pytest.raises(MlflowException, match="nobody"):
        mlflow_tdeploy.history("nobody")


def test_a_version_that_is_gone_from_the_registry_is_not_gone_back_to(two, words, versions):
    spec, _ = two
    for version in (1, 2):
        mlflow_tdeploy.promote(f"models:/words/{version}", alias="champion", file=spec)
    words.delete_model_version("words", "1")
    with pytest.raises(MlflowException, match="There is no version 1 of 'words' in the registry"):
        mlflow_tdeploy.rollback("words", file=spec)
    assert (alias(words), versions()) == (2, [2, 2])


def test_the_registry_keeps_the_newest_events_of_a_version_and_no_repetitions(tracking, tmp_path):
    from mlflow_tdeploy.promotion import history

    client = mlflow.MlflowClient()
    client.create_registered_model("it's")
    client.create_model_version("it's", source=(tmp_path / "artifacts").as_uri())
    events = history.History(client)
    for number in range(30):
        events.add([history.event("watch", "t", "m", "it's", 1, "failed", why=f"reason {number // 2}")])
    found = events.of("it's")
    assert [one.why for one in found] == [f"reason {number}" for number in range(14, -1, -1)]  # each once
    for number in range(30):
        events.add([history.event("watch", "t", "m", "it's", 1, "deployed", why=str(number), variant="int8")])
    found = events.of("it's")
    assert [one.why for one in found] == [str(number) for number in range(29, 9, -1)]
    client.set_model_version_tag("it's", "1", "tdeploy.history.x", "{not json")
    assert len(events.of("it's")) == 20
    events.add([history.event("watch", "t", "m", "it's", 7, "deployed")])  # no such version: warned of
