"""What a real registry (SQLite) says should be served."""

from __future__ import annotations

import mlflow
import pytest

from mlflow_tdeploy.promotion.document import parse
from mlflow_tdeploy.promotion.registry import desired
from mlflow_tdeploy.promotion.spec import Spec

TARGETS = "targets: {a: {server: http://a:8000, repository: /a}, b: {server: http://b:8000, repository: /b}}\n"


def spec(*rules):
    return Spec.of(parse(f"{TARGETS}models: [{', '.join(rules)}]", "tdeploy.yaml"))


@pytest.fixture
def client(tracking, tmp_path):
    found = mlflow.MlflowClient()
    for name in ("intent", "sentiment-de", "sentiment-fr", "my model"):
        found.create_registered_model(name)
        for _ in range(3):
            found.create_model_version(name, source=(tmp_path / "artifacts").as_uri())
    return found


def told(found):
    return [(one.target, one.name, one.model, one.version) for one in found]


def test_an_alias_and_a_stage_stand_for_a_version(client):
    client.set_registered_model_alias("intent", "champion", 2)
    client.transition_model_version_stage("sentiment-de", 1, "Production")
    client.transition_model_version_stage("sentiment-de", 3, "Production")
    rules = ("{name: intent, alias: champion, to: [a, b]}", "{name: sentiment-*, stage: Production, to: b}")
    found = desired(spec(*rules), client)
    assert told(found) == [
        ("a", "intent", "intent", 2), ("b", "intent", "intent", 2),
        ("b", "sentiment-de", "sentiment-de", 3), ("b", "sentiment-fr", "sentiment-fr", None),
    ]  # fmt: skip
    assert found[0].uri == "models:/intent/2"
    client.set_registered_model_alias("intent", "champion", 1)
    assert desired(spec(*rules), client)[0].version == 1
    client.delete_registered_model_alias("intent", "champion")
    assert desired(spec(*rules), client)[0].version is None


def test_the_first_rule_about_a_model_counts(client):
    for alias, version in (("champion", 1), ("new", 2)):
        client.set_registered_model_alias("sentiment-de", alias, version)
    rules = ("{name: sentiment-de, alias: new, to: a}", "{name: 'sentiment-*', alias: champion, to: a}")
    assert told(desired(spec(*rules), client))[0] == ("a", "sentiment-de", "sentiment-de", 2)


def test_names_on_the_servers(client):
    client.set_registered_model_alias("my model", "champion", 1)
    assert desired(spec("{name: my model, alias: champion, to: a}"), client)[0].name == "my-model"
    assert desired(spec("{name: my model, alias: champion, to: a, deploy_as: m}"), client)[0].name == "m"
    rules = ("{name: my model, alias: champion, to: a, deploy_as: intent}", "{name: intent, alias: champion, to: a}")
    assert told(desired(spec(*rules), client)) == [("a", "intent", "my model", 1)]  # the other one has no version
    client.set_registered_model_alias("intent", "champion", 1)
    (both,) = desired(spec(*rules), client)
    assert both.conflict.startswith("'my model' and 'intent' would both be 'intent' on target 'a'")


def test_a_model_that_is_not_there_is_told_and_a_pattern_may_mean_none(client):
    (nobody,) = desired(spec("{name: nobody, alias: champion, to: a}"), client)
    assert (nobody.version, nobody.registered) == (None, False)
    assert desired(spec("{name: nobody-*, alias: champion, to: a}"), client) == ()


def test_many_models_are_read_at_once(client, monkeypatch):
    calls = []
    search = client.search_registered_models
    monkeypatch.setattr(client, "search_registered_models", lambda **more: calls.append(more) or search(**more))
    monkeypatch.setattr(client, "get_registered_model", lambda name: pytest.fail(f"{name} was asked for by itself"))
    found = desired(spec("{name: '*', alias: champion, to: a}", "{name: intent, alias: champion, to: b}"), client)
    assert len(found) == 5
    assert len(calls) == 1
