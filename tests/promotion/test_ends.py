"""Versions whose load ends a server: no other server gets them, whoever comes next, and the second time nobody does."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from click.testing import CliRunner

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.errors import LateError, ServerError, UnreachableError
from mlflow_tdeploy.deploy.tryout import Tryout
from mlflow_tdeploy.promotion import watch as watching
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.ends import notes
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.promotion.watch import Watch
from mlflow_tdeploy.triton.client import TritonClient
from mlflow_tdeploy.triton.local import launch
from tests.promotion.one_server import answers, there

# each ends and starts real servers, a quarter of a minute apiece; the usual ways are in test_apply and test_watch
pytestmark = pytest.mark.slow


def loses_all(client):
    """As a server that ends and is there again at once, with nothing."""
    for one in client.models():
        client.unload(one.name)
    raise UnreachableError("the connection was closed")


def late(client):
    """As one that answers, and not in time."""
    raise LateError("no answer within 30 s")


def where_loaded(monkeypatch, which, do):
    """Do something where a graph is loaded; return the servers that it was tried on."""
    tried, real = [], TritonClient.bring_up

    def bring_up(self, model, version):
        if model == which:
            tried.append(self.connection.url)
            do(self)
        return real(self, model, version)

    monkeypatch.setattr(TritonClient, "bring_up", bring_up)
    return tried


def hours_pass(watch, monkeypatch, hours=6):
    clock = time.monotonic
    for hour in range(hours):
        with monkeypatch.context() as patch:
            patch.setattr(watching.time, "monotonic", lambda hour=hour: clock() + 3600 * hour)
            watch.look()


def test_the_second_time_a_version_is_left_alone_until_something_else_is_wanted(spec_of, words, champion, monkeypatch):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    tried = where_loaded(monkeypatch, "words.v2", loses_all)
    for _ in range(2):  # one that is started anew knows as much
        watch = Watch(lambda: spec, interval=1.0)
        hours_pass(watch, monkeypatch)
        assert len(tried) == 2
    assert answers(spec) == 1
    (standing,) = watch.view.standings
    assert standing.state == "refused"
    assert "went away 2 times in a row while version 2 came" in standing.why
    assert "went away 2 times" in words.get_model_version("words", "2").tags["tdeploy.both.words"]
    assert mlflow_tdeploy.apply(file=spec) == ()
    champion(1)
    mlflow_tdeploy.apply(file=spec)  # without a watcher, too
    champion(2)  # somebody wants it once more
    mlflow_tdeploy.apply(file=spec)
    assert len(tried) == 3


@pytest.mark.parametrize("begin", ["a first version", "having it back"])
def test_a_server_that_comes_back_empty_before_the_error_is_ended_twice_and_no_more(spec_of, words, monkeypatch, begin):
    """It had nothing else, so that nothing tells who asks after the error; the next one sees that it is empty."""
    spec = spec_of()
    if begin == "having it back":
        mlflow_tdeploy.apply(file=spec)
        for one in there(spec).client.models():
            there(spec).client.unload(one.name)
    tried = where_loaded(monkeypatch, "words.v1", loses_all)
    hours_pass(Watch(lambda: spec, interval=1.0), monkeypatch, hours=4)
    assert len(tried) == 2
    (step,) = mlflow_tdeploy.plan(file=spec).steps
    assert step.ends == {1: 2}


def test_who_is_interrupted_leaves_the_note(spec_of, champion, monkeypatch):
    """A job that runs out of time while the server is gone, each time."""
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)

    def interrupted(client):
        for one in client.models():
            client.unload(one.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        tried = where_loaded(patch, "words.v2", interrupted)
        patch.setattr("mlflow_tdeploy.promotion.apply._all_taken_back", lambda *_: [])
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                mlflow_tdeploy.apply(file=spec)
        mlflow_tdeploy.apply(file=spec)
        assert len(tried) == 2
    assert answers(spec) == 1


def test_a_harmless_interruption_counts_for_nothing(spec_of, champion, monkeypatch):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)

    def interrupted(client):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        tried = where_loaded(patch, "words.v2", interrupted)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                mlflow_tdeploy.apply(file=spec)
        assert len(tried) == 3
    mlflow_tdeploy.apply(file=spec)
    assert answers(spec) == 2


def test_a_server_that_cannot_list_its_models_has_not_gone(spec_of, champion, monkeypatch):
    """Its store refuses for a while: the load fails, and so does asking what is loaded."""
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    real = TritonClient.models

    def refuses(client):
        monkeypatch.setattr(TritonClient, "models", lambda self: _raise(ServerError("the store is away")))
        raise ServerError("the store is away")

    tried = where_loaded(monkeypatch, "words.v2", refuses)
    for _ in range(3):
        mlflow_tdeploy.apply(file=spec)
        monkeypatch.setattr(TritonClient, "models", real)
        (step,) = mlflow_tdeploy.plan(file=spec).steps
        assert step.ends == {}
    assert len(tried) == 3


def _raise(error):
    raise error


def test_a_load_that_goes_on_after_its_time_and_then_ends_the_server_counts(spec_of, champion, monkeypatch):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)

    tried = where_loaded(monkeypatch, "words.v2", late)
    for _ in range(4):
        mlflow_tdeploy.apply(file=spec)
        for one in there(spec).client.models():
            there(spec).client.unload(one.name)
    assert len(tried) == 2
    mlflow_tdeploy.apply(file=spec)
    assert answers(spec) == 1


def test_a_slow_load_on_a_server_that_serves_counts_for_nothing(spec_of, champion, monkeypatch):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)

    with monkeypatch.context() as patch:
        tried = where_loaded(patch, "words.v2", late)
        for _ in range(3):
            mlflow_tdeploy.apply(file=spec)
        assert len(tried) == 3
    mlflow_tdeploy.apply(file=spec)
    assert answers(spec) == 2


def test_a_slow_load_counts_for_nothing_where_what_is_deployed_cannot_be_had_back(two_names, champion, monkeypatch):
    """The next look could not tell: it goes by what is deployed, and that is not there either way."""
    spec, _ = two_names
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    there(spec).client.unload("words.v1")
    there(spec).client.unload("words")

    def fails(client):
        raise ServerError("the file is damaged")

    where_loaded(monkeypatch, "words.v1", fails)
    tried = where_loaded(monkeypatch, "words.v2", late)
    for _ in range(3):
        mlflow_tdeploy.apply(file=spec)
    assert len(tried) == 3


def test_a_first_version_that_is_slow_counts_for_nothing(spec_of, words, monkeypatch):
    """What was begun is taken back, so that the server is as empty as one that was ended."""
    spec = spec_of()

    tried = where_loaded(monkeypatch, "words.v1", late)
    for _ in range(3):
        mlflow_tdeploy.apply(file=spec)
    assert len(tried) == 3


def test_having_a_version_back_says_nothing_about_others(two, words, champion, monkeypatch):
    """On one target it ends the server that came back empty; on the other it was kept, and is gone back to."""
    spec, _ = two
    first, second = spec.targets["both"].servers
    alone = {"eu": first, "us": second}
    targets = {name: spec.targets["both"].model_copy(update={"servers": (of,)}) for name, of in alone.items()}
    rules = {name: spec.models[0].model_copy(update={"to": (name,)}) for name in alone}
    file = spec.model_copy(update={"targets": targets, "models": tuple(rules.values())})
    at = {name: deployments_at(targets[name], of) for name, of in alone.items()}
    mlflow_tdeploy.apply(file=file)
    champion(2)
    mlflow_tdeploy.apply(file=file.model_copy(update={"models": (rules["us"],)}))
    assert [at[name].answering("words") for name in alone] == [1, 2]
    champion(1)
    for one in at["eu"].client.models():
        at["eu"].client.unload(one.name)
    url = at["eu"].client.connection.url
    where_loaded(monkeypatch, "words.v1", lambda client: loses_all(client) if client.connection.url == url else None)
    mlflow_tdeploy.apply(file=file)
    assert [at[name].answering("words") for name in alone] == [None, 1]


def test_what_is_said_otherwise_or_insisted_on_is_tried_again(spec_of, words, champion, monkeypatch):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    tried = where_loaded(monkeypatch, "words.v2", loses_all)
    for _ in range(3):
        mlflow_tdeploy.apply(file=spec)
    assert len(tried) == 2
    mlflow_tdeploy.apply(file=spec, again=True)
    mlflow_tdeploy.apply(file=spec_of(", intra_op_threads: 3"))
    assert len(tried) == 4


@pytest.fixture
def left_alone(spec_of, words, champion, monkeypatch):
    """A file whose server went away twice with version 2, which would harm nobody by now."""
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    with monkeypatch.context() as patch:
        where_loaded(patch, "words.v2", loses_all)
        for _ in range(2):
            mlflow_tdeploy.apply(file=spec)
    return spec


def test_a_plan_that_spares_a_server_is_insisted_on(left_alone, champion):
    spec = left_alone
    seen = mlflow_tdeploy.plan(file=spec)
    assert [one.action for one in seen.steps] == ["refuse"]
    champion(1)
    done = mlflow_tdeploy.apply(seen, file=spec, again=True)
    assert [one.step.after for one in done] == [1], "had back; nobody wants the other one now"
    assert answers(spec) == 1
    champion(2)
    mlflow_tdeploy.apply(seen, file=spec, again=True)
    assert answers(spec) == 2


def test_the_command_insists_too(left_alone, tmp_path):
    spec = left_alone
    command = ["apply", "--file", str(tmp_path / "tdeploy.yaml"), "--yes"]
    refused = CliRunner().invoke(main, command)
    assert (refused.exit_code, answers(spec)) == (1, 1)
    assert "tdeploy apply --again insists" in refused.output
    insisted = CliRunner().invoke(main, [*command, "--again"])
    assert insisted.exit_code == 0, insisted.output
    assert answers(spec) == 2


def test_what_is_deployed_is_had_back_twice_and_the_others_are_others(spec_of, words, monkeypatch):
    text = spec_of()
    rules = (text.models[0], text.models[0].model_copy(update={"deploy_as": "words-too"}))
    spec = text.model_copy(update={"models": rules})
    mlflow_tdeploy.apply(file=spec)
    for one in there(spec).client.models():  # it came back empty
        there(spec).client.unload(one.name)
    tried = where_loaded(monkeypatch, "words.v1", loses_all)
    watch = Watch(lambda: spec, interval=1.0)
    hours_pass(watch, monkeypatch, 3)
    seen = len(tried)
    hours_pass(watch, monkeypatch)
    assert len(tried) == seen <= 4, "nobody can tell that an empty server went away and came back at once"
    assert there(spec).answering("words-too") == 1
    standings = {one.name: one for one in watch.view.standings}
    assert standings["words-too"].state == "in sync"
    assert standings["words"].serves is None
    assert "went away 2 times in a row while version 1 came" in standings["words"].why


def test_a_server_that_is_late_is_asked_again_and_again(spec_of, words, champion, monkeypatch):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)

    def late(client):
        raise UnreachableError("no answer within 20 s")

    tried = where_loaded(monkeypatch, "words.v2", late)
    hours_pass(Watch(lambda: spec, interval=1.0), monkeypatch)
    assert len(tried) == 6
    assert answers(spec) == 1


def test_who_was_killed_meanwhile_has_left_a_note(spec_of, words, champion, monkeypatch):
    """The note of a load that nobody saw the end of counts where the server has nothing any more."""
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    champion(2)

    for _ in range(2):
        killed_where_loaded(spec, "words.v2", monkeypatch)
    (step,) = mlflow_tdeploy.plan(file=spec).steps
    assert (step.ends[2], step.action, step.silent) == (2, "refuse", True), "the first one was seen to by the second"
    mlflow_tdeploy.apply(file=spec, again=True)  # has back what is deployed, and then brings the other
    assert answers(spec) == 2
    assert mlflow_tdeploy.plan(file=spec).steps[0].ends == {}


def killed_where_loaded(spec, which, monkeypatch):
    """Apply, where a load ends the server and who applies with it, as in one container."""

    class Killed(BaseException):
        pass

    def killed(client):
        for one in client.models():
            client.unload(one.name)
        raise Killed

    with monkeypatch.context() as patch:
        where_loaded(patch, which, killed)
        # nothing is done by who is killed
        patch.setattr("mlflow_tdeploy.deploy.ends.Notes.end", lambda *_, **__: 0)
        patch.setattr("mlflow_tdeploy.promotion.apply._all_taken_back", lambda *_: [])
        with pytest.raises(Killed):
            mlflow_tdeploy.apply(file=spec)


def test_who_was_killed_while_a_first_version_came_has_left_a_note(spec_of, words, monkeypatch):
    """Nothing is deployed under the name, so that nothing says that the server came back empty."""
    spec = spec_of()
    for _ in range(2):
        killed_where_loaded(spec, "words.v1", monkeypatch)
    (step,) = mlflow_tdeploy.plan(file=spec).steps
    assert (step.ends, step.action) == ({1: 2}, "refuse")
    assert mlflow_tdeploy.apply(file=spec) == ()


def test_what_is_had_back_first_does_not_hide_that_a_server_went_away(spec_of, words, monkeypatch):
    text = spec_of()
    first = text.models[0].model_copy(update={"deploy_as": "words-too"})
    mlflow_tdeploy.apply(file=text.model_copy(update={"models": (first,)}))
    spec = text.model_copy(update={"models": (first, text.models[0])})
    for _ in range(2):
        killed_where_loaded(spec, "words.v1", monkeypatch)
    mlflow_tdeploy.apply(file=spec)
    steps = {one.name: one for one in mlflow_tdeploy.plan(file=spec).steps}
    assert there(spec).answering("words-too") == 1
    assert (steps["words"].ends, steps["words"].action) == ({1: 2}, "refuse")


@pytest.fixture
def two_names(spec_of, words):
    """A file about two names of one model, the second of which is at the alias that moves; and one about the first."""
    text = spec_of()
    words.set_registered_model_alias("words", "steady", 1)
    other = text.models[0].model_copy(update={"deploy_as": "words-too", "alias": "steady"})
    return text.model_copy(update={"models": (other, text.models[0])}), text.model_copy(update={"models": (other,)})


@pytest.mark.parametrize("first", ["itself", "a dead lease", "another file"])
def test_who_was_killed_has_left_a_note_whatever_is_had_back_first(
    two_names, words, champion, monkeypatch, running, first
):
    spec, only_other = two_names
    mlflow_tdeploy.apply(file=spec)
    champion(2)
    lease = running[1] / ".lease-~promotion.words"
    for _ in range(2):
        killed_where_loaded(spec, "words.v2", monkeypatch)
        if first == "a dead lease":  # of a pod that nobody here can look at
            lease.write_text(json.dumps({"host": "old-pod", "pid": 1, "born": 1, "boot": "x", "world": "y"}))
            Watch(lambda: spec, interval=1.0).look()
            os.utime(lease, (time.time() - 300,) * 2)
        elif first == "another file":
            Watch(lambda: only_other, interval=1.0).look()
    Watch(lambda: spec, interval=1.0).look()
    steps = {one.name: one for one in mlflow_tdeploy.plan(file=spec).steps}
    assert (steps["words"].ends, steps["words"].action) == ({2: 2}, "refuse")
    assert (answers(spec), there(spec).answering("words-too")) == (1, 1)


def test_a_watcher_counts_the_first_load_of_who_was_killed(two_names, words, monkeypatch):
    spec, only_other = two_names
    mlflow_tdeploy.apply(file=only_other)
    for _ in range(2):
        killed_where_loaded(spec, "words.v1", monkeypatch)
    Watch(lambda: spec, interval=1.0).look()
    steps = {one.name: one for one in mlflow_tdeploy.plan(file=spec).steps}
    assert (steps["words"].ends, steps["words"].action) == ({1: 2}, "refuse")
    assert there(spec).answering("words-too") == 1


@pytest.mark.parametrize("first", ["itself", "another file"])
def test_what_is_deployed_and_ends_the_server_and_who_loads_it_is_left_alone(two_names, words, monkeypatch, first):
    spec, only_other = two_names
    mlflow_tdeploy.apply(file=spec)
    for one in there(spec).client.models():  # it came back empty
        there(spec).client.unload(one.name)
    for _ in range(2):
        killed_where_loaded(spec, "words.v1", monkeypatch)
        if first == "another file":
            Watch(lambda: only_other, interval=1.0).look()
    tried = where_loaded(monkeypatch, "words.v1", loses_all)
    for _ in range(2):
        Watch(lambda: spec, interval=1.0).look()
    assert tried == []
    assert there(spec).answering("words-too") == 1
    (step,) = (one for one in mlflow_tdeploy.plan(file=spec).steps if one.name == "words")
    assert (step.ends, step.silent) == ({1: 2}, True)


@pytest.fixture
def killing(start, server, tmp_path, words, monkeypatch):
    """Two targets of a server each, of which a load of version 2 ends the process as long as that is so."""
    folders = [tmp_path / "eu", tmp_path / "us"]
    for folder in folders:
        folder.mkdir()
    running = {one.url: (one, folder) for one, folder in zip(map(start, folders), folders, strict=True)}
    targets = ", ".join(
        f"{folder.name}: {{servers: [{{url: '{url}', repository: '{folder}'}}]}}"
        for url, (_, folder) in running.items()
    )
    (tmp_path / "tdeploy.yaml").write_text(
        f"targets: {{{targets}}}\n"
        "models: [{name: words, alias: champion, to: [eu, us], serve: {device: cpu, variant: onnx-fp32, grace: 0}}]\n"
    )
    state = {"kills": True}

    def kill(client):
        if state["kills"]:
            found, _ = running[client.connection.url]
            os.kill(found.process.pid, signal.SIGKILL)
            found.process.wait()

    def again():
        """Start what has ended, empty."""
        for url, (one, folder) in tuple(running.items()):
            if one.process.poll() is not None:
                one.stop()
                log = tmp_path / f"{folder.name}-{time.monotonic_ns()}.log"
                running[url] = (launch(folder, log, server=server, ports=(one.http, one.grpc, one.metrics)), folder)

    state |= {"tried": where_loaded(monkeypatch, "words.v2", kill), "again": again}
    yield Spec.read(tmp_path / "tdeploy.yaml"), state, running
    for one, _ in running.values():
        one.stop()


def test_what_ends_one_server_ends_no_other_whoever_comes_next(killing, words, monkeypatch):
    spec, state, running = killing
    eu, us = running
    mlflow_tdeploy.apply(file=spec)
    words.set_registered_model_alias("words", "champion", 2)
    for _ in range(2):
        watch = Watch(lambda: spec, interval=1.0)
        hours_pass(watch, monkeypatch, 3)
        assert state["tried"] == [eu]
    standings = {one.server: one for one in watch.view.standings}
    assert (standings[us].serves, standings[us].state) == (1, "refused")
    assert f"{eu} went away while version 2 came: it gets it first" in standings[us].why
    state["again"]()
    hours_pass(Watch(lambda: spec, interval=1.0), monkeypatch, 3)
    assert state["tried"] == [eu, eu], "once more, after what was deployed has come back"
    state["again"]()
    watch = Watch(lambda: spec, interval=1.0)
    hours_pass(watch, monkeypatch, 3)
    assert state["tried"] == [eu, eu]
    assert [(one.serves, one.state) for one in watch.view.standings] == [(1, "refused")] * 2
    state["kills"] = False  # somebody has mended it
    mlflow_tdeploy.apply(file=spec, again=True)
    assert [one.serves for one in mlflow_tdeploy.status(file=spec)] == [2, 2]


def test_a_plan_that_is_older_than_the_end_of_a_server_is_not_done(killing, words):
    spec, state, running = killing
    eu, _ = running
    mlflow_tdeploy.apply(file=spec)
    words.set_registered_model_alias("words", "champion", 2)
    old = mlflow_tdeploy.plan(file=spec)
    Watch(lambda: spec, interval=1.0).look()
    assert state["tried"] == [eu]
    states = {one.step.server: (one.state, one.why) for one in mlflow_tdeploy.apply(old, file=spec)}
    assert state["tried"] == [eu]
    assert all(name == "failed" or "gets it first" in why for name, why in states.values())


@pytest.mark.parametrize("gone", [True, False])
def test_a_server_that_goes_away_while_a_version_is_tried_out_gets_it_once_more(
    spec_of, words, champion, monkeypatch, gone
):
    """People may have restarted it; requests that end it would do so each time."""
    spec = spec_of(", keep: 1")
    trying = {"canary": {"minutes": 1, "requests": 1}}
    rule = spec.models[0]
    spec = spec.model_copy(
        update={"models": (rule.model_copy(update={"strategy": type(rule.strategy).model_validate(trying)}),)}
    )
    mlflow_tdeploy.apply(file=spec)
    champion(2)

    tried = []

    def ended(tryout, _):
        tried.append(tryout)
        if gone:
            loses_all(there(spec).client)
        raise UnreachableError("no answer")

    monkeypatch.setattr(Tryout, "watched", ended)  # what is loaded to end it comes after
    (outcome,) = mlflow_tdeploy.apply(file=spec)
    assert (outcome.state, outcome.ended) == ("failed", int(gone))
    assert mlflow_tdeploy.plan(file=spec).steps[0].ends == ({2: 1} if gone else {})
    for _ in range(3):
        mlflow_tdeploy.apply(file=spec)
    assert len(tried) == (2 if gone else 4)
    assert mlflow_tdeploy.plan(file=spec).steps[0].action == ("refuse" if gone else "update")


def test_a_load_that_came_to_its_end_after_who_asked_for_it_was_killed_is_not_blamed(spec_of, words):
    spec = spec_of()
    mlflow_tdeploy.apply(file=spec)
    (place,) = mlflow_tdeploy.plan(file=spec).steps
    known = notes(there(spec).files, place.server, "words", spec.models[0])
    known.end(1, 0, server_gone=True)  # it went away under it once, for whatever reason
    there(spec).client.unload("words")  # the graph is there, and nobody has brought its front
    known.begin(1, gone=False)
    (step,) = mlflow_tdeploy.plan(file=spec).steps
    assert (step.silent, step.ends) == (True, {1: 1})
    Watch(lambda: spec, interval=1.0).look()
    assert answers(spec) == 1
    assert mlflow_tdeploy.plan(file=spec).steps[0].ends == {}
