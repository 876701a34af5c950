"""The registry and real servers are kept equal, whatever happens in between."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import StorageError, VerificationError
from mlflow_tdeploy.deploy import apply as deploying
from mlflow_tdeploy.deploy.files import FolderFiles, open_files
from mlflow_tdeploy.deploy.s3 import S3Files
from mlflow_tdeploy.deploy.tidy import Tidy
from mlflow_tdeploy.promotion import page
from mlflow_tdeploy.promotion import watch as watching
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.lease import places_held
from mlflow_tdeploy.promotion.outcome import Outcome
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.promotion.specfile import SpecFile
from mlflow_tdeploy.promotion.watch import Watch
from mlflow_tdeploy.triton.local import local_triton
from tests.deploy.conftest import url_for_triton
from tests.flavor.text_bundles import make_text_bundle
from tests.processes import program


@pytest.fixture
def watch(two):
    spec, _ = two
    found = Watch(lambda: spec, interval=30.0)
    yield found
    found.finish()


def at(spec, place):
    target = spec.targets["both"]
    return deployments_at(target, target.servers[place])


def states(watch):
    return [one.state for one in watch.view.standings]


def test_what_changes_is_followed_and_what_drifts_is_corrected(two, words, versions, watch):
    spec, _ = two
    assert not watch.ready
    assert watch.look() == 30.0
    assert (versions(), states(watch), watch.ready) == ([1, 1], ["in sync"] * 2, True)
    words.set_registered_model_alias("words", "champion", 2)
    watch.look()
    assert versions() == [2, 2]
    assert [one.decision for one in watch.view.actions] == ["deployed", "deployed"]

    at(spec, 0).client.unload("words")  # as after a restart with nothing loaded
    at(spec, 0).client.unload("words.v2")
    watch.look()
    assert versions() == [2, 2]
    assert watch.view.actions[0].why == "version 2 is deployed there, and it does not answer"
    assert watch.view.actions[0].servers == (spec.targets["both"].servers[0].url,)

    watch.finish()
    at(spec, 1).delete("words")
    watch.look()
    assert versions() == [2, 2]

    watch.finish()
    at(spec, 0).rollback("words", 1)  # by somebody who did not tell the registry
    assert versions() == [1, 2]
    watch.look()
    assert versions() == [2, 2]

    words.delete_registered_model_alias("words", "champion")
    watch.look()
    assert (versions(), states(watch)) == ([2, 2], ["not wanted"] * 2)
    words.set_registered_model_alias("words", "champion", 1)
    words.delete_model_version("words", "2")  # while it serves
    watch.look()
    assert versions() == [1, 1]


def test_the_next_version_does_not_wait_for_the_requests_of_the_one_before(two, words, versions, tmp_path, monkeypatch):
    text = (tmp_path / "tdeploy.yaml").read_text().replace("grace: 0", "grace: 0, keep: 0")
    (tmp_path / "keep.yaml").write_text(text)
    spec, answered, real = Spec.read(tmp_path / "keep.yaml"), threading.Event(), Tidy._is_drained

    def waited_for(self, name, version=None):
        return (version is not None or answered.is_set()) and real(self, name, version)

    monkeypatch.setattr(Tidy, "_is_drained", waited_for)
    watch = Watch(lambda: spec, interval=30.0)

    def loaded():
        states = at(spec, 0).client.models()
        return {one.name for one in states if one.state == "READY" and one.name != "words"}

    mlflow_tdeploy.log_model(make_text_bundle(tmp_path / "third"), "words", registered_model_name="words")
    for version in (1, 2, 3):
        words.set_registered_model_alias("words", "champion", version)
        watch.look()
        assert versions() == [version, version]
    assert loaded() == {"words.v1", "words.v2", "words.v3"}  # those before may have requests still
    answered.set()
    watch.finish()
    assert loaded() == {"words.v3"}
    assert sorted(at(spec, 0).files.models()) == ["words", "words.v3"]
    assert versions() == [3, 3]


def test_a_server_that_was_away_gets_what_it_missed(two, words, versions, watch, server):
    from mlflow_tdeploy.triton.local import local_triton

    spec, second = two
    watch.look()
    second.stop()
    words.set_registered_model_alias("words", "champion", 2)
    watch.look()
    assert (versions(1), states(watch)) == ([2], ["in sync", "unknown"])
    where = spec.targets["both"].servers[1]
    with local_triton(where.repository, server=server) as back:  # it starts empty, at another port
        servers = (spec.targets["both"].servers[0], where.model_copy(update={"url": back.url}))
        moved = spec.targets["both"].model_copy(update={"servers": servers})
        spec = spec.model_copy(update={"targets": {"both": moved}})
        again = Watch(lambda: spec, interval=30.0)
        again.look()
        assert states(again) == ["in sync"] * 2
        assert at(spec, 1).serving("words").active == 2


def test_what_fails_rests_and_what_is_refused_is_told_once(two, words, versions, watch, monkeypatch):
    watch.look()
    words.set_registered_model_alias("words", "champion", 2)
    tried = []

    def wrong(*arguments):
        tried.append(1)
        raise VerificationError("golden request 0: another answer")

    with monkeypatch.context() as patch:
        patch.setattr(deploying, "check_graph", wrong)
        watch.look()
        assert (versions(), len(tried), states(watch)) == ([1, 1], 1, ["drift"] * 2)
        watch.look()
        assert len(tried) == 1  # it would fail again
        patch.setattr(watching.time, "monotonic", lambda clock=time.monotonic: clock() + 11)
        watch.look()
        assert len(tried) == 2
    assert "golden request 0" in dict(words.get_model_version("words", "2").tags)["tdeploy.both.words"]
    assert [one.decision for one in mlflow_tdeploy.history("words")][:2] == ["failed", "deployed"]  # told once
    words.set_registered_model_alias("words", "champion", 1)
    watch.look()
    assert states(watch) == ["in sync"] * 2

    mlflow.MlflowClient().create_model_version("words", source="file:///nowhere")
    words.set_registered_model_alias("words", "champion", 3)
    for _ in range(3):
        watch.look()
    assert (versions(), states(watch)) == ([1, 1], ["refused"] * 2)
    refused = [one for one in watch.view.actions if one.decision == "refused"]
    assert len(refused) == 1
    assert mlflow_tdeploy.history("words")[0].decision == "refused"


def test_a_repository_that_refuses_leaves_what_serves(two, words, versions, watch, monkeypatch):
    watch.look()
    words.set_registered_model_alias("words", "champion", 2)
    write, refused = FolderFiles.write, []

    def full(self, path, content):
        if path.startswith("words") and "second" in self.url:
            refused.append(path)
            raise StorageError("the storage is full")
        return write(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(FolderFiles, "write", full)
        watch.look()
    assert refused
    assert (versions(), states(watch)) == ([1, 1], ["drift"] * 2)
    assert "the storage is full" in mlflow_tdeploy.history("words")[0].why
    watch._rests.clear()
    watch.look()
    assert (versions(), states(watch)) == ([2, 2], ["in sync"] * 2)


@pytest.fixture
def stored(s3_server, s3_keys, server, tmp_path):
    """A server whose repository is in a real S3, and the file that names it."""
    files = open_files(f"s3://{s3_server}/bucket/{tmp_path.name}/models")
    files.write("keep/.keep", b"")  # a store has no empty folder
    with local_triton(url_for_triton(files.url), server=server) as triton:
        (tmp_path / "tdeploy.yaml").write_text(
            f"targets: {{here: {{server: '{triton.url}', repository: '{files.url}'}}}}\n"
            "models: [{name: words, alias: champion, to: here, serve: {device: cpu, variant: onnx-fp32, grace: 0}}]\n"
        )
        yield Spec.read(tmp_path / "tdeploy.yaml")


@pytest.mark.slow
def test_a_store_that_refuses_leaves_what_serves(stored, words, monkeypatch):
    watch = Watch(lambda: stored, interval=30.0)

    def serves():
        target = stored.targets["here"]
        return deployments_at(target, target.servers[0]).serving("words").active

    watch.look()
    assert serves() == 1
    words.set_registered_model_alias("words", "champion", 2)
    put, refused = S3Files.put, []

    def expired(self, path, source):
        """The key is good for the lease, and not any more when the version's files are sent."""
        refused.append(path)
        with monkeypatch.context() as patch:
            patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            return put(S3Files(self.url), path, source)

    with monkeypatch.context() as patch:
        patch.setattr(S3Files, "put", expired)
        watch.look()
    assert refused
    assert (serves(), states(watch)) == (1, ["drift"])
    assert "the secret key is not the one" in mlflow_tdeploy.history("words")[0].why
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")  # from the beginning
        watch._rests.clear()
        watch.look()
    assert serves() == 1
    watch._rests.clear()
    watch.look()
    watch.finish()
    assert (serves(), states(watch)) == (2, ["in sync"])


def test_a_target_that_cannot_be_held_stops_no_other(two, words, versions, watch, monkeypatch):
    spec, _ = two
    bad = spec.targets["both"].model_copy(update={"repository": ""})
    spec = spec.model_copy(update={"targets": {"aaa": bad, **spec.targets}})
    rule = spec.models[0].model_copy(update={"to": ("aaa", "both")})
    spec = spec.model_copy(update={"models": (rule,)})
    held = watching.places_held

    def refusing(spec, targets, **more):
        if "aaa" in {target for target, _ in targets}:
            raise StorageError("the repository cannot be written at http://bob:s3cret@host/x")
        return held(spec, targets, **more)

    monkeypatch.setattr(watching, "places_held", refusing)
    again = Watch(lambda: spec, interval=30.0)
    again.look()
    assert versions() == [1, 1]  # they are the servers of the other one, too
    assert not again.view.error


def test_no_password_is_shown(two, words, watch, monkeypatch, caplog):
    def away(*arguments, **more):
        raise MlflowException("API request to http://bob:s3cret@127.0.0.1:9/api failed")

    monkeypatch.setattr(watching, "make_plan", away)
    watch.look()
    assert watch.view.error == "API request to http://127.0.0.1:9/api failed"
    assert "s3cret" not in caplog.text + page.render(watch.view)
    assert "nothing can be compared" in page.render(watch.view)


def test_a_model_that_was_registered_anew_is_looked_at(two, words, versions, watch, tmp_path):
    watch.look()
    words.delete_registered_model("words")
    made = make_text_bundle(tmp_path / "anew", batch=(1, 2, 8))
    mlflow_tdeploy.log_model(made, "words", registered_model_name="words")
    words.set_registered_model_alias("words", "champion", 1)
    watch.look()
    assert states(watch) == ["refused"] * 2
    assert "with other files or options" in watch.view.standings[0].why


def test_a_registry_that_is_away_changes_nothing(two, words, versions, watch, monkeypatch):
    watch.look()

    def away(*arguments, **more):
        raise MlflowException("the registry does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(watching, "make_plan", away)
        assert watch.look() == 30.0
        assert (watch.view.error, states(watch), watch.ready) == (
            "the registry does not answer", ["in sync"] * 2, True,
        )  # fmt: skip
        patch.setattr(watching.time, "monotonic", lambda clock=time.monotonic: clock() + 100)
        assert not watch.ready
    assert versions() == [1, 1]
    watch.look()
    assert not watch.view.error


def test_two_watchers_do_not_fight(two, words, versions, watch):
    spec, _ = two
    with places_held(spec, {("both", "words")}):
        assert watch.look() < 30.0  # soon again
        assert (versions(), watch.view.actions) == ([None, None], ())
    other = Watch(lambda: spec, interval=30.0)
    other.look()
    assert watch.look() == 30.0
    assert (versions(), watch.view.actions, states(watch)) == ([1, 1], (), ["in sync"] * 2)


def test_an_alias_that_is_moved_while_a_version_loads_is_followed_in_the_end(two, words, versions, watch, monkeypatch):
    watch.look()
    words.set_registered_model_alias("words", "champion", 2)
    check = deploying.check_front

    def moving(*arguments):
        words.set_registered_model_alias("words", "champion", 1)
        return check(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(deploying, "check_front", moving)
        assert watch.look() < 30.0
    watch.look()
    assert (versions(), states(watch)) == ([1, 1], ["in sync"] * 2)


def test_run_looks_when_it_is_woken_and_ends_when_it_is_stopped(two, words, versions, watch):
    import threading

    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        _wait_until(lambda: versions() == [1, 1])
        words.set_registered_model_alias("words", "champion", 2)
        watch.wake()
        _wait_until(lambda: versions() == [2, 2])
    finally:
        watch.stop()
        thread.join(30)
    assert not thread.is_alive()


SIGNALLED = """
import signal
from mlflow_tdeploy.promotion.watch import Watch

class Looking(Watch):
    def look(self):
        return 1e-6

watch = Looking(lambda: None, interval=1.0, client=object())
signal.signal(signal.SIGUSR1, lambda *_: watch.wake())
signal.signal(signal.SIGTERM, lambda *_: watch.stop())
print("ready", flush=True)
watch.run()
"""


@pytest.mark.parametrize(("takes", "waits"), [(0.0, 8.0), (3.0, 5.0), (100.0, 2.0)])
def test_an_interval_is_from_one_look_to_the_next(monkeypatch, takes, waits):
    watch, clock, waited = Watch(list, interval=8.0), [1000.0], []

    def look():
        clock[0] += takes
        return 8.0

    class Woken(queue.SimpleQueue):
        def get(self, block=True, timeout=None):
            waited.append(timeout)
            watch.stop()

        def get_nowait(self):
            raise queue.Empty

    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(watch, "look", look)
    monkeypatch.setattr(watch, "_woken", Woken())
    watch.run()
    assert waited == [pytest.approx(waits)]


def test_a_signal_may_come_at_any_moment():
    """A handler that waits for the lock of a ``threading.Event``, which the main thread has then, waits for ever."""
    with program([sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline()
        for _ in range(10_000):
            process.send_signal(signal.SIGUSR1)
            time.sleep(1e-4)
        process.terminate()
        assert process.wait(20) == 0


def test_a_file_that_changes_is_read_again_and_one_that_becomes_wrong_is_told(two, words, tmp_path, caplog):
    file = SpecFile(tmp_path / "tdeploy.yaml")
    text = (tmp_path / "tdeploy.yaml").read_text()
    assert file.read().models[0].alias == "champion"
    (tmp_path / "tdeploy.yaml").write_text(text.replace("champion", "next"))
    assert file.read().models[0].alias == "next"
    (tmp_path / "tdeploy.yaml").write_text("targets: [")
    assert file.read().models[0].alias == "next"
    assert "What the file said before counts on" in caplog.text
    (tmp_path / "tdeploy.yaml").unlink()
    assert file.read().models[0].alias == "next"
    (tmp_path / "tdeploy.yaml").write_text(text)
    assert file.read().models[0].alias == "champion"


def test_the_page_shows_names_and_reasons_as_text(two, words, watch):
    watch.look()
    view = watch.view
    bad = view.standings[0].__class__("refused", "t", "<b>s</b>", "n", "m", 2, 1, why="<script>alert(1)</script>")
    text = page.render(view.__class__(view.at, (bad, *view.standings), "<i>", 0.1, 3, view.actions))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;i&gt;" in text
    assert "nothing can be compared" in text
    assert "1 of 2 not as the registry says" in page.render(view.__class__(view.at, (bad, view.standings[0])))
    assert "all as the registry says" in page.render(view)


def _wait_until(done, seconds=60.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_is_done_and_is_not_so_afterwards_is_not_done_all_the_time(two, words, versions, watch, monkeypatch):
    watch.look()
    words.set_registered_model_alias("words", "champion", 2)
    done = []

    def nothing(steps, spec, **more):
        done.append(steps)
        return [Outcome(one, "done") for one in steps]

    with monkeypatch.context() as patch:
        patch.setattr(watching, "together", nothing)
        for _ in range(5):
            watch.look()
    assert len(done) == 1
    watch._rests.clear()
    watch.look()
    assert versions() == [2, 2]
    assert not watch._rests


@pytest.mark.slow
def test_what_one_server_still_needs_stays_though_another_of_the_same_repository_does_not(
    start, words, tmp_path, monkeypatch
):
    """The alias moves on while the second server answers a long request of the first version."""
    (tmp_path / "shared").mkdir()
    urls = [start(tmp_path / "shared").url for _ in range(2)]
    text = f"targets: {{all: {{servers: [{', '.join(urls)}], repository: '{tmp_path / 'shared'}'}}}}\n"
    text += "models: [{name: words, alias: champion, to: all, serve: {device: cpu, variant: onnx-fp32, keep: 0}}]\n"
    (tmp_path / "shared.yaml").write_text(text)
    spec = Spec.read(tmp_path / "shared.yaml")
    mlflow_tdeploy.log_model(make_text_bundle(tmp_path / "third"), "words", registered_model_name="words")
    answered, real, slow = threading.Event(), Tidy._is_drained, spec.targets["all"].servers[1].url

    def waited_for(self, name, version=None):
        busy = version is None and self.client.connection.url == slow and not answered.is_set()
        return not busy and real(self, name, version)

    monkeypatch.setattr(Tidy, "_is_drained", waited_for)
    watch = Watch(lambda: spec, interval=30.0)
    for version in (1, 2, 3):
        words.set_registered_model_alias("words", "champion", version)
        watch.look()
    ready = [deployments_at(spec.targets["all"], one).client.ready for one in spec.targets["all"].servers]
    assert [one("words.v1") for one in ready] == [True, True]
    assert (tmp_path / "shared" / "words.v1").is_dir()
    answered.set()
    watch.finish()
    assert [[one(f"words.v{number}") for number in (1, 2, 3)] for one in ready] == [[False, False, True]] * 2
    assert sorted(path.name for path in (tmp_path / "shared").glob("words*")) == ["words", "words.v3"]


def test_a_version_that_returns_and_fails_keeps_what_its_earlier_requests_need(two, words, tmp_path, monkeypatch):
    text = (tmp_path / "tdeploy.yaml").read_text().replace("grace: 0", "grace: 0, keep: 0")
    (tmp_path / "keep.yaml").write_text(text)
    spec, answered, real, seen = Spec.read(tmp_path / "keep.yaml"), threading.Event(), Tidy._is_drained, []
    ready = deployments_at(spec.targets["both"], spec.targets["both"].servers[0]).client.ready

    def waited_for(self, name, version=None):
        return (version is not None or answered.is_set()) and real(self, name, version)

    def waits(self, name, version=None):
        if version is None and not answered.is_set():
            seen.append(ready("words.v1"))  # while its request is waited for
            answered.set()
        return True

    monkeypatch.setattr(Tidy, "_is_drained", waited_for)
    watch = Watch(lambda: spec, interval=30.0)
    for version in (1, 2):
        words.set_registered_model_alias("words", "champion", version)
        watch.look()

    def no(*given):
        monkeypatch.setattr(Tidy, "_drained", waits)
        raise VerificationError("it says something else")

    monkeypatch.setattr(deploying, "check_front", no)
    words.set_registered_model_alias("words", "champion", 1)
    watch.look()
    assert seen == [True]
    watch.finish()
