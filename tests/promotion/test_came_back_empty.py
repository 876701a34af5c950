"""Servers that came back empty: what is deployed answers again, whatever becomes of the version that should."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.errors import UnreachableError
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.promotion import records
from mlflow_tdeploy.promotion.actual import Observed
from mlflow_tdeploy.promotion.look import make_plan
from mlflow_tdeploy.promotion.registry import Desired
from mlflow_tdeploy.promotion.rollback import _before, _Place
from mlflow_tdeploy.promotion.spec import Rule, Spec
from mlflow_tdeploy.promotion.status import status_of
from mlflow_tdeploy.promotion.watch import Watch
from mlflow_tdeploy.registry_io import locate
from mlflow_tdeploy.triton.client import TritonClient
from tests.flavor.text_bundles import make_text_bundle
from tests.promotion.one_server import answers, there
from tests.promotion.test_strategy import QUICK, asking, tried

# each ends and starts real servers, a quarter of a minute apiece; the usual ways are in test_apply and test_watch
pytestmark = pytest.mark.slow


@pytest.fixture
def serving(spec_of, words):
    """What is served: version 1."""
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    return spec


def empty(spec):
    """Unload everything, as a server has it that was started again."""
    client = there(spec).client
    for model in client.models():
        client.unload(model.name)
    end = time.monotonic() + 30
    while any(model.state in ("READY", "UNLOADING") for model in client.models()) and time.monotonic() < end:
        time.sleep(0.1)
    assert there(spec).answering("words") is None


def looked(spec):
    """Look once, as a watcher does; return how the name stood."""
    watch = Watch(lambda: spec, interval=1.0)
    watch.look()
    watch.finish()
    (standing,) = watch.view.standings
    return standing


def another_signature(spec_of, words, folder):
    mlflow_tdeploy.log_model(
        make_text_bundle(folder / "other", task="text-classification"), "words", registered_model_name="words"
    )
    words.set_registered_model_alias("words", "champion", 3)


def other_options(spec_of, words, folder):
    return spec_of(", max_queue_delay_microseconds: 500")


def no_alias(spec_of, words, folder):
    words.delete_registered_model_alias("words", "champion")


def damaged(spec_of, words, folder):
    file = Path(locate("models:/words/2").local) / "tdeploy/files/onnx-fp32/model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # it may be a link to what others have
    file.write_bytes(content)
    words.set_registered_model_alias("words", "champion", 2)


def artifacts_away(spec_of, words, folder):
    (folder / "artifacts").rename(folder / "away")
    records._known.clear()


@pytest.mark.parametrize("whatever", [another_signature, other_options, no_alias, damaged, artifacts_away])
def test_what_is_deployed_answers_again_whatever_the_registry_wants(spec_of, serving, words, tmp_path, whatever):
    empty(serving)
    spec = whatever(spec_of, words, tmp_path) or serving
    (before,) = status_of(make_plan(spec))
    assert before.serves is None
    assert not before.right
    assert "version 1 is deployed there" in before.why
    after = looked(spec)
    assert answers(spec) == after.serves == 1
    assert "does not answer" not in after.why


def test_it_answers_again_while_the_registry_is_away(serving, monkeypatch):
    watch = Watch(lambda: serving, interval=1.0)
    empty(serving)

    def away(*arguments, **more):
        raise MlflowException("nobody is there")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow_tdeploy.promotion.look.desired", away)
        watch.look()
    assert "nobody is there" in watch.view.error
    assert answers(serving) == 1


def test_what_cannot_be_had_back_is_not_tried_all_the_time(spec_of, serving, words, tmp_path, monkeypatch):
    no_alias(spec_of, words, tmp_path)
    empty(serving)
    (there(serving).files.root / "words.v1" / "1" / "model.onnx").unlink()
    asked, real = [], Deployments.revive
    monkeypatch.setattr(Deployments, "revive", lambda self, name: asked.append(name) or real(self, name))
    watch = Watch(lambda: serving, interval=1.0)
    for _ in range(3):
        watch.look()
    assert asked == ["words"]
    assert [one.decision for one in watch.view.actions] == ["failed"]
    assert watch.view.standings[0].state == "drift"


def test_apply_and_promote_have_it_back_too(spec_of, serving, words, tmp_path):
    empty(serving)
    no_alias(spec_of, words, tmp_path)
    said = CliRunner().invoke(main, ["apply", "--file", str(tmp_path / "tdeploy.yaml")], input="n\n")
    assert "1 deployed and silent: brought back first" in said.output
    assert there(serving).answering("words") is None
    (done,) = mlflow_tdeploy.apply(file=serving)
    assert (done.state, done.step.after) == ("done", 1)
    assert answers(serving) == 1
    empty(serving)
    another_signature(spec_of, words, tmp_path)
    with pytest.raises(MlflowException, match="may not serve"):
        mlflow_tdeploy.promote("models:/words/3", alias="champion", file=serving)
    assert answers(serving) == 1


def test_what_is_to_be_tried_out_is_held_against_what_answers_again(spec_of, serving, words):
    spec = tried(serving, canary=QUICK)
    empty(spec)
    words.set_registered_model_alias("words", "champion", 2)
    watch = Watch(lambda: spec, interval=1.0)
    watch.look()
    with asking(spec) as seen:
        watch.finish()
    count, failed = seen
    assert count > 5
    assert not failed
    assert answers(spec) == 2
    assert [(one.decision, one.version) for one in watch.view.actions] == [("deployed", 2), ("deployed", 1)]
    assert watch.view.actions[0].why.count("canary: ") == 1


@pytest.mark.parametrize("gone", ["graph", "files"])
def test_where_it_cannot_be_had_back_another_version_comes_at_once(spec_of, serving, words, gone):
    """Nothing is tried out beside a version that does not answer: there is nothing to hold it against."""
    spec = tried(serving, canary=QUICK)
    if gone == "files":
        empty(spec)
    else:
        there(spec).client.unload("words.v1")  # the front is there still, and cannot answer
    (there(spec).files.root / "words.v1" / "1" / "model.onnx").unlink()
    words.set_registered_model_alias("words", "champion", 2)
    looked(spec)
    assert answers(spec) == 2


def test_a_rollback_that_was_killed_is_completed_and_goes_no_further(spec_of, serving, words, tmp_path):
    """Between writing a route and loading it; the version before is kept, and one more."""
    spec = spec_of(", keep: 2")
    mlflow_tdeploy.log_model(make_text_bundle(tmp_path / "third"), "words", registered_model_name="words")
    for version in (1, 2, 3):
        mlflow_tdeploy.promote(f"models:/words/{version}", alias="champion", file=spec)
    words.set_registered_model_alias("words", "champion", 2)
    found = there(spec)
    with found._changing("words"):
        found._write_route("words", found.route("words").moved(2, "2026-01-01T00:00:00Z", "who is killed"))
    assert answers(spec) == 3
    (done,) = mlflow_tdeploy.rollback("words", file=spec)
    assert (done.state, done.step.after) == ("done", 2)
    assert answers(spec) == int(words.get_model_version_by_alias("words", "champion").version) == 2


@pytest.mark.parametrize(
    ("deployed", "wants", "back"),
    [
        ([(2, 2, (1,), (3,)), (2, 3, (1,), (3,))], 2, 2),  # one repository, killed between the servers
        ([(2, 2, (1,), (3,)), (3, 3, (2, 1), ())], 2, 2),  # one each, the same
        ([(3, 3, (2,), ()), (2, 2, (1,), ())], 3, 2),  # a version that came to the first server only
        ([(3, 2, (2,), ()), (2, 2, (1,), ())], 3, 2),  # killed between writing a route and loading it
        ([(3, 3, (2,), ()), (3, 3, (2,), ())], 3, 2),  # nothing was interrupted
        ([(3, None, (2,), ()), (3, None, (2,), ())], 3, 2),  # nor was it where nothing answers
        ([(2, 2, (1,), ()), (2, 2, (1,), ())], None, 1),  # the alias is gone
    ],
)
def test_servers_agree_on_what_was_interrupted(deployed, wants, back):
    seen = [
        _Place(
            Desired("words", wants, "words", "both", Rule(name="words", alias="champion", to=("both",))),
            Observed(
                str(place), "words", described={"version": now, "answers": loaded, "previous": before, "ahead": ahead}
            ),
        )
        for place, (now, loaded, before, ahead) in enumerate(deployed)
    ]
    assert _before("words", seen) == back


def test_what_has_not_come_is_gone_back_from(serving, words, tmp_path):
    """As after a promotion that was killed while the graph was loaded: the alias is all that has changed."""
    mlflow_tdeploy.promote("models:/words/2", alias="champion", file=serving)
    words.create_model_version("words", words.get_model_version("words", "1").source)
    words.set_registered_model_alias("words", "champion", 3)
    said = CliRunner().invoke(main, ["rollback", "words", "--file", str(tmp_path / "tdeploy.yaml")])
    assert "version 2 answers already: version 3 had not come; once more goes further back" in said.output
    assert answers(serving) == int(words.get_model_version_by_alias("words", "champion").version) == 2
    mlflow_tdeploy.rollback("words", file=serving)
    assert answers(serving) == int(words.get_model_version_by_alias("words", "champion").version) == 1


def test_a_version_whose_load_ends_the_server_rests_and_others_come_back(
    spec_of, serving, words, tmp_path, monkeypatch
):
    """Of two names the first one cannot be loaded: the server is gone for a moment, as after running out of memory."""
    text = (tmp_path / "tdeploy.yaml").read_text()
    rule = text.splitlines()[1].removeprefix("models: [").removesuffix("]")
    more = rule.replace("to: both", "to: both, deploy_as: words-too")
    (tmp_path / "tdeploy.yaml").write_text(text.replace(rule, f"{rule}, {more}"))
    spec = Spec.read(tmp_path / "tdeploy.yaml")
    mlflow_tdeploy.apply(file=spec)
    empty(spec)
    asked, real = [], TritonClient.bring_up

    def ends(self, model, version):
        asked.append(model)
        if model == "words.v1":
            raise UnreachableError("the connection was closed")
        return real(self, model, version)

    monkeypatch.setattr(TritonClient, "bring_up", ends)
    watch = Watch(lambda: spec, interval=1.0)
    for _ in range(2):
        watch.look()
    assert asked.count("words.v1") <= 2  # once to have it back, once to deploy it again; then it rests
    assert there(spec).answering("words-too") == 1
