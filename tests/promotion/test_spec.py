"""``tdeploy.yaml``: what it may say, and what is told of a mistake in it."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError
from mlflow_tdeploy.promotion.document import parse
from mlflow_tdeploy.promotion.spec import Spec

GOOD = """\
targets:
  production:
    servers: [http://triton-1:8000, grpc://triton-2:8001]
    repository: s3://models/triton
    token: ${TRITON_TOKEN}
  edge:
    server: {url: http://edge:8000, repository: /models}
models:
  - name: intent
    alias: champion
    to: production
    serve: {device: cpu, keep: 2, max_queue_delay_microseconds: 500}
  - name: sentiment-*
    stage: Production
    to: [production, edge]
    gates:
      signature: any
    variants: auto
"""
ENVIRONMENT = {"TRITON_TOKEN": "s3cret"}


def spec(text: str, **environ: str) -> Spec:
    return Spec.of(parse(text, "tdeploy.yaml", {**ENVIRONMENT, **environ}))


def test_a_file_says_what_is_served_where():
    found = spec(GOOD)
    production, edge = found.targets["production"], found.targets["edge"]
    assert [one.url for one in production.servers] == ["http://triton-1:8000", "grpc://triton-2:8001"]
    assert production.repository_of(production.servers[1]) == "s3://models/triton"
    assert edge.repository_of(edge.servers[0]) == "/models"
    assert production.token.get_secret_value() == "s3cret"
    intent, sentiment = found.models
    assert (intent.to, intent.alias, intent.variants, intent.gates.signature) == (
        ("production",), "champion", "pinned", "compatible",
    )  # fmt: skip
    assert dict(intent.serve) == {"device": "cpu", "keep": 2, "max_queue_delay_microseconds": 500}
    assert intent.matches("intent")
    assert not intent.matches("intent-2")
    assert sentiment.matches("sentiment-de")
    assert not sentiment.matches("Sentiment-de")


def test_no_secret_is_shown():
    assert "s3cret" not in repr(spec(GOOD))
    assert "s3cret" not in spec(GOOD).model_dump_json()


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("models:", "model:", 8, "'model': this key is unknown. Known here: targets, models"),
        ("alias: champion", "alais: champion", 10, r"'models\[0\].alais': this key is unknown. Known here: name, "),
        ("      signature: any", "      signatur: any", 17, r"'models\[1\].gates.signatur': .*Known here: signature"),
        ("signature: any", "signature: maybe", 17, "input should be 'compatible', 'same' or 'any'"),
        ("repository: s3://", "bucket: s3://", 4, "'targets.production.bucket': this key is unknown. Known here: "),
        ("    alias: champion\n", "", 9, r"'models\[0\]': say which version by alias: or by stage:"),
        ("stage: Production", "stage: production", 14, "there is no stage 'production'. There are: Staging, "),
        ("to: production", "to: prodution", 11, "there is no target 'prodution'. There are: production, edge"),
        ("device: cpu", "device: tpu", 12, r"'models\[0\].serve.device': 'device' must be cpu or cuda"),
        ("keep: 2", "keeep: 2", 12, r"'models\[0\].serve.keeep': Unknown key 'keeep'. Known: "),
        ("keep: 2", "version: 2", 12, "said of one call"),
        ("http://edge:8000", "edge:8000", 7, "'targets.edge.server.url': this is no address of a server"),
        ("http://edge:8000", "http://me:s3cret@edge:8000", 7, "this is no address of a server"),
        (", repository: /models", "", 6, "'targets.edge': nobody says where the model repository of http://edge"),
        ("name: sentiment-*", "name: sentiment-*\n    deploy_as: mood", 13, "deploy_as is one name"),
        ("${TRITON_TOKEN}", "${TRITON_TOKN}", 5, "'targets.production.token': the environment has no variable TRI"),
        ("keep: 2", "keep: -2", 12, "'keep' must not be negative"),
        ("  edge:", "  production:", 6, "'targets.production': it is there twice"),
        ("variants: auto", "variants: [auto", 19, "this is no YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_line_and_key(old, new, line, says):
    assert old in GOOD
    with pytest.raises(InvalidInputError, match=f"^tdeploy.yaml, line {line}(, .*|: ){says}") as told:
        spec(GOOD.replace(old, new, 1))
    assert "s3cret" not in str(told.value)


def test_what_is_no_mapping_or_not_there_is_told(tmp_path):
    for text in ("", "[]", "3"):
        with pytest.raises(InvalidInputError, match="line 1, the whole file: a mapping with 'targets' and 'models'"):
            spec(text)
    with pytest.raises(NotFoundError, match="There is no file"):
        Spec.read(tmp_path / "tdeploy.yaml")
    (tmp_path / "tdeploy.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match=r"cannot be read|no YAML"):
        Spec.read(tmp_path / "tdeploy.yaml")


def test_an_anchor_may_be_used_and_may_not_hold_itself():
    shared = GOOD.replace("serve: {", "serve: &usual {").replace("    gates:\n", "    serve: *usual\n    gates:\n")
    assert spec(shared).models[1].serve == spec(shared).models[0].serve
    with pytest.raises(InvalidInputError, match="line 1: this holds itself"):
        spec("targets: &a {b: *a}")


@settings(deadline=None)
@given(st.text(alphabet=string.printable, max_size=80))
def test_whatever_is_written_there_is_an_error_of_ours(text):
    with pytest.raises(InvalidInputError, match=r"^tdeploy\.yaml"):
        spec(text)
