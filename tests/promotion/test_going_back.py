"""Going back by the registry: a version that is kept answers again as it came, whatever would be made of it now."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import NotFoundError, UnreachableError
from mlflow_tdeploy.core.evidence import Evidence, now
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.deploy import target as deploying
from mlflow_tdeploy.promotion import apply as applying
from mlflow_tdeploy.promotion import records
from mlflow_tdeploy.promotion.actual import Observed
from mlflow_tdeploy.promotion.candidate import candidate
from mlflow_tdeploy.promotion.registry import desired
from mlflow_tdeploy.promotion.watch import Watch
from mlflow_tdeploy.registry_io import append_evidence, locate
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.triton.client import TritonClient
from tests.flavor.text_bundles import make_text_bundle
from tests.promotion.one_server import answers, there


def log_another(folder):
    mlflow_tdeploy.log_model(make_text_bundle(folder / "another"), "words", registered_model_name="words")


def threads(spec, version):
    return there(spec).files.read(f"words.v{version}/config.pbtxt").decode().count('string_value: "3"')


@pytest.mark.slow
def test_a_version_that_came_with_other_options_is_gone_back_to_and_on_from(spec_of, words, champion, tmp_path):
    spec = spec_of(", keep: 2")
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    log_another(tmp_path)
    champion(3)
    spec = spec_of(", keep: 2, intra_op_threads: 3")
    mlflow_tdeploy.apply(file=spec)
    assert (answers(spec), threads(spec, 2), threads(spec, 3)) == (3, 0, 1)
    for version in (2, 1, 2, 3):
        champion(version)
        (step,) = mlflow_tdeploy.plan(file=spec).changes
        assert (step.before, step.after, step.moves) == (answers(spec), version, 0)
        mlflow_tdeploy.apply(file=spec)
        assert answers(spec) == version
        (standing,) = mlflow_tdeploy.status(file=spec)
        assert standing.state == "in sync", standing.why
    assert threads(spec, 2) == 0, "it was made anew"
    log_another(tmp_path / "once more")  # changes the registered model, and nobody moves the alias
    assert mlflow_tdeploy.plan(file=spec).changes == mlflow_tdeploy.plan(file=spec).refused == ()


def test_a_version_of_which_another_variant_would_be_chosen_by_now_stays_what_it_is(spec_of, words, champion, tmp_path):
    spec = spec_of(variant="")
    mlflow_tdeploy.apply(file=spec)
    before = there(spec).describe("words")["variant"]
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    other = {"onnx-fp32": "ort-cpu-int8", "ort-cpu-int8": "onnx-fp32"}[before]
    for variant, seconds in ((before, 9.0), (other, 0.1)):
        bundle = mlflow_tdeploy.load_model("models:/words/1")
        host, digest = probe.host(), bundle.variants[variant].digest
        bundle.close()
        for runtime in RUNTIMES.names():
            append_evidence(locate("models:/words/1"), [latency(variant, seconds, host, digest, runtime)])
    records._known.clear()
    champion(1)
    assert candidate_of(spec, 1) == other
    (step,) = mlflow_tdeploy.plan(file=spec).changes
    assert (step.variants[1], step.decision) == (before, f"{before} (as it came)")
    mlflow_tdeploy.apply(file=spec)
    assert (answers(spec), there(spec).describe("words")["variant"]) == (1, before)
    assert dict(words.get_model_version("words", "1").tags)["tdeploy.both.words"].endswith(before)
    log_another(tmp_path)
    (standing,) = mlflow_tdeploy.status(file=spec)
    assert standing.state == "in sync", standing.why


def candidate_of(spec, version):
    """Return the variant that would be chosen of a version by now."""
    (wanted,) = desired(spec)
    return candidate(wanted.at(version), Observed("nowhere", "words"), within=0.0).variant


def latency(variant: str, ms: float, host: Fingerprint, digest: str, runtime: str) -> Evidence:
    figures = {f"{shape}{name}_ms": ms for shape in ("", "short_") for name in ("mean", "p50", "p95")}
    return Evidence(
        variant, "latency", figures, host=host, files=digest, created="2099-01-01T00:00:00+00:00",
        settings={"runtime": runtime},
    )  # fmt: skip


def test_going_back_that_was_interrupted_is_completed(spec_of, words, champion):
    """Killed between the route in the repository and the server that reads it."""
    spec = of_other_options(spec_of, champion)
    champion(1)
    found = there(spec)
    found._write_route("words", found.required("words").moved(1, now(), "who was killed then"))
    assert (there(spec).route("words").active, answers(spec)) == (1, 2)
    mlflow_tdeploy.apply(file=spec)
    assert answers(spec) == 1
    assert states_of(spec) == ["in sync"]


def of_other_options(spec_of, champion):
    """Deploy version 1, and 2 with another option, which is said from then on."""
    mlflow_tdeploy.apply(file=spec_of())
    champion(2)
    spec = spec_of(", intra_op_threads: 3")
    mlflow_tdeploy.apply(file=spec)
    return spec


def states_of(spec):
    return [one.state for one in mlflow_tdeploy.status(file=spec)]


def test_what_is_said_anew_along_with_going_back_is_remembered(spec_of, words, champion):
    mlflow_tdeploy.apply(file=spec_of())
    champion(2)
    mlflow_tdeploy.apply(file=spec_of())
    champion(1)
    for more in (
        ", intra_op_threads: 3",
        ", intra_op_threads: 3, keep: 2",
        ", intra_op_threads: 3, keep: 2, keep_loaded: false",
    ):
        spec = spec_of(more)
        mlflow_tdeploy.apply(file=spec)
        assert (answers(spec), states_of(spec)) == (1, ["in sync"]), more
    spec = spec_of(", intra_op_threads: 2")  # of the version that answers that would be something
    assert states_of(spec) == ["refused"]


@pytest.mark.slow
def test_what_served_before_is_gone_back_to_however_it_came(spec_of, words, champion, tmp_path):
    """The alias is set to a version that is kept: that is no going back, and rollback leads to what served."""
    spec = spec_of(", keep: 2")
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    for more in ("", ", intra_op_threads: 3"):
        spec = spec_of(f", keep: 2{more}")
        champion(1)
        mlflow_tdeploy.apply(file=spec)
        assert answers(spec) == 1
        mlflow_tdeploy.rollback("words", file=spec)
        assert answers(spec) == 2, more
        assert int(words.get_model_version_by_alias("words", "champion").version) == 2


@pytest.mark.slow
def test_fewer_versions_are_kept_as_soon_as_that_is_said(spec_of, words, champion, tmp_path):
    spec = spec_of(", keep: 2")
    log_another(tmp_path)
    for version in (1, 2, 3):
        champion(version)
        mlflow_tdeploy.apply(file=spec)
    spec = spec_of(", keep: 1, keep_loaded: false")
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    route = there(spec).route("words")
    assert (route.active, route.previous, route.keep_loaded) == (2, (3,), False)
    assert there(spec).graphs("words") == ["words.v2", "words.v3"]


@pytest.mark.parametrize("more", [pytest.param("", marks=pytest.mark.slow), ", intra_op_threads: 3"])
def test_nothing_is_fetched_for_going_back(spec_of, words, champion, monkeypatch, more):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    champion(1)

    def gone(*_):
        raise NotFoundError("no such artifact")

    monkeypatch.setattr(applying, "opened", lambda uri: replace(records.opened(uri), fetch=gone))
    (outcome,) = mlflow_tdeploy.apply(file=spec_of(more))
    assert (outcome.state, answers(spec)) == ("done", 1)


@pytest.mark.slow
def test_what_is_not_whole_any_more_is_sent_again_where_it_would_be_the_same(spec_of, words, champion):
    spec = spec_of(", keep_loaded: false")
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    there(spec).files.remove("words.v1/1/model.onnx")
    champion(1)
    (outcome,) = mlflow_tdeploy.apply(file=spec_of(", keep_loaded: false, intra_op_threads: 3"))
    assert outcome.state == "failed"
    assert "not all of its files are there any more" in outcome.why
    assert answers(spec) == 2
    (outcome,) = mlflow_tdeploy.apply(file=spec_of(", keep_loaded: false"))
    assert (outcome.state, answers(spec)) == ("done", 1)


@pytest.mark.slow
def test_another_model_of_that_number_is_no_version_to_go_back_to(spec_of, words, champion, tmp_path):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    words.delete_registered_model("words")
    for number in range(2):  # of other files
        made = make_text_bundle(tmp_path / f"new-{number}", times=2.0)
        mlflow_tdeploy.log_model(made, "words", registered_model_name="words")
    records._known.clear()
    champion(1)
    (step,) = mlflow_tdeploy.plan(file=spec).refused
    assert "it is another model that had this number" in step.why
    assert mlflow_tdeploy.apply(file=spec) == ()
    with pytest.raises(MlflowException, match="is another model than version 1 of 'words' in the registry"):
        mlflow_tdeploy.rollback("words", version=1, file=spec)
    assert answers(spec) == 2
    assert int(words.get_model_version_by_alias("words", "champion").version) == 1


@pytest.mark.slow
def test_the_message_of_an_update_says_how_to_go_back(spec_of, words, running, monkeypatch):
    spec = spec_of()
    triton, folder = running
    monkeypatch.setenv("TRITON_MODEL_REPO", str(folder))
    client = deploying.TDeployDeploymentClient(f"tdeploy://{triton.url.removeprefix('http://')}")
    said = {"device": "cpu", "variant": "onnx-fp32", "grace": 0}
    client.create_deployment("words", "models:/words/1", config=said)
    client.update_deployment("words", "models:/words/2", config={"intra_op_threads": 3})
    with pytest.raises(MlflowException, match=r"rollback_deployment with version=1"):
        client.update_deployment("words", "models:/words/1")
    client.rollback_deployment("words", version=1)
    assert answers(spec) == 1


@pytest.mark.slow
def test_an_alias_that_is_moved_to_and_fro_is_followed_at_once(spec_of, words, champion):
    spec = spec_of()
    watch = Watch(lambda: spec, interval=30.0)
    for version in (1, 2, 1, 2, 1):
        champion(version)
        watch.look()  # the second look, which would see that it is so, has not come yet
        watch.finish()
        assert answers(spec) == version


def test_the_next_look_comes_when_what_rests_may_be_tried_again(spec_of, words, champion, monkeypatch):
    spec = spec_of()
    watch = Watch(lambda: spec, interval=300.0)
    assert watch.look() == 300.0
    champion(2)

    def wrong(*arguments):
        raise UnreachableError("not now")

    monkeypatch.setattr(TritonClient, "bring_up", wrong)
    assert 5.0 < watch.look() <= 10.0


def test_who_stands_at_the_oldest_version_is_told_of_those_ahead(spec_of, words, champion):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    mlflow_tdeploy.apply(file=spec)
    mlflow_tdeploy.rollback("words", file=spec)
    with pytest.raises(MlflowException, match="gone back from 2: version says"):
        mlflow_tdeploy.rollback("words", file=spec)
    tags = dict(words.get_model_version("words", "1").tags)
    assert " UTC, by" in tags["tdeploy.both.words"]


@pytest.mark.parametrize("store", ["refuses", pytest.param("hangs", marks=pytest.mark.slow)])
def test_rollback_needs_no_artifact_store(spec_of, words, champion, monkeypatch, store):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    mlflow_tdeploy.apply(file=spec)

    def away(uri):
        if store == "hangs":
            time.sleep(60)
        raise OSError("could not connect")

    monkeypatch.setattr("mlflow_tdeploy.promotion.rollback.opened", away)
    started = time.monotonic()
    mlflow_tdeploy.rollback("words", file=spec)
    assert time.monotonic() - started < 30
    assert answers(spec) == 1
