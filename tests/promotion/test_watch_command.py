"""``tdeploy watch`` as it runs in production: real servers of MLflow and Triton, webhooks between them, a browser."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet
from prometheus_client.parser import text_string_to_metric_families

from mlflow_tdeploy.cli import main
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.files import FolderFiles
from mlflow_tdeploy.triton.client import Connection, TritonClient
from tests.conftest import leave_store
from tests.processes import program
from tests.promotion.conftest import log_words
from tests.promotion.test_webhook import BODY, signed
from tests.slow_link import slow_link

SECRET = "correct horse"
#: What ends the server at an address.
_SERVERS: dict[str, contextlib.ExitStack] = {}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(tmp_path, port):
    """Run an MLflow server that may send webhooks to this host."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    more = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true", "MLFLOW_WEBHOOK_CACHE_TTL": "1",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }  # fmt: skip
    with (tmp_path / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(command, env=os.environ | more, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until(lambda: _answers(f"http://127.0.0.1:{port}/health"))
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture
def registry(tmp_path, _database):
    """The address of such a server; another one may take its place while the stack is closed."""
    shutil.copyfile(_database, tmp_path / "mlflow.db")
    port, before = free_port(), mlflow.get_tracking_uri()
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(mlflow_server(tmp_path, port))
        try:
            mlflow.set_tracking_uri(url)
            mlflow.set_registry_uri(url)
            mlflow.set_experiment("tests")
            _SERVERS[url] = stack
            yield url
        finally:
            leave_store(before)


@pytest.fixture
def client(registry, tmp_path):
    return log_words(tmp_path)


@pytest.fixture
def file(running, tmp_path, monkeypatch):
    triton, folder = running
    port = free_port()
    monkeypatch.setenv("TDEPLOY_WEBHOOK_SECRET", SECRET)
    text = (
        f"targets: {{here: {{server: '{triton.url}', repository: '{folder}'}}}}\n"
        "models: [{name: words, alias: champion, to: here, serve: {device: cpu, variant: onnx-fp32, grace: 0}}]\n"
        f"watch: {{interval: 3600, listen: '127.0.0.1:{port}', url: 'http://127.0.0.1:{port}/webhook',\n"
        "        secret: '${TDEPLOY_WEBHOOK_SECRET}'}\n"
    )
    path = tmp_path / "tdeploy.yaml"
    path.write_text(text)
    yield path, f"http://127.0.0.1:{port}"
    Deployments(TritonClient(Connection(triton.url)), FolderFiles(folder)).delete("words")


@contextlib.contextmanager
def watching(path, registry, *more):
    """Run the command; its process is told to end after the block."""
    command = [sys.executable, "-m", "mlflow_tdeploy.cli", "watch", "--file", str(path), *more]
    log = path.parent / "watch.log"
    env = os.environ | {"MLFLOW_TRACKING_URI": registry, "MLFLOW_REGISTRY_URI": registry}
    with log.open("ab") as out, program(command, env=env, stdout=out, stderr=out) as process:
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def test_a_webhook_has_a_version_answer_at_once(client, registry, running, file, monkeypatch):
    path, url = file
    with watching(path, registry, "--install-webhook") as (process, log):
        _wait_until(lambda: serving(running) == 1 and "works" in log.read_text(), log=log)
        client.set_registered_model_alias("words", "champion", 2)
        _wait_until(lambda: serving(running) == 2, 20, log=log)
        assert log.read_text().count("Webhook accepted: model_version_alias.created") == 2  # when it was tried, and now

        _wait_until(lambda: standing(url) == ("in sync", 2, 2))

        for headers, code in ((signed(secret="other", at=time.time()), 401), ({}, 400), (signed(secret=SECRET), 400)):
            assert refused(f"{url}/webhook", headers, BODY.encode()) == code
        assert refused(f"{url}/webhook", {}, b"x" * 100_000) == 413
        assert json.loads(got(f"{url}/ready")) == {"ready": True, "why": ""}
        numbers = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(got(f"{url}/metrics"))
            for sample in family.samples
        }
        assert numbers["tdeploy_decisions_total", "deployed", "here", "words"] == 2
        assert numbers["tdeploy_serving_version", *sorted(("here", running[0].url, "words"))] == 2
        assert numbers["tdeploy_webhooks_total", "forged"] == 1

        monkeypatch.setenv("MLFLOW_TRACKING_URI", registry)
        told = CliRunner().invoke(main, ["doctor", "--promotion", str(path)])
        assert told.exit_code == 0, told.output
        assert "MLflow has sent one" in told.output
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    deployed = [one for one in events if one.get("event") == "deployed"]
    assert [(one["target"], one["name"], one["version"]) for one in deployed] == [
        ("here", "words", 1),
        ("here", "words", 2),
    ]
    assert SECRET not in log.read_text()

    told = CliRunner().invoke(main, ["doctor", "--promotion", str(path)])  # nobody listens any more
    assert told.exit_code == 1
    assert "Connection refused" in told.output or "Failed to test webhook" in told.output
    assert len(client.list_webhooks()) == 1


@pytest.mark.slow
def test_polling_alone_follows_and_once_is_enough_for_cron(client, registry, running, file):
    path, _ = file
    with watching(path, registry, "--interval", "0.5", "--log-format", "text") as (_, log):
        _wait_until(lambda: serving(running) == 1, log=log)
        client.set_registered_model_alias("words", "champion", 2)
        _wait_until(lambda: serving(running) == 2, log=log)
        assert " INFO " in log.read_text()
        assert "Downloading" not in log.read_text()
    client.set_registered_model_alias("words", "champion", 1)
    with watching(path, registry, "--once") as (process, log):
        assert process.wait(60) == 0, log.read_text()
    assert serving(running) == 1


@pytest.mark.slow
def test_a_registry_that_is_restarted_is_followed_again(client, registry, running, file, tmp_path):
    path, url = file
    with watching(path, registry, "--interval", "0.5") as (_, log):
        _wait_until(lambda: serving(running) == 1, log=log)
        _SERVERS[registry].close()
        _wait_until(lambda: json.loads(got(f"{url}/status.json"))["error"], log=log)
        assert serving(running) == 1
        with mlflow_server(tmp_path, int(registry.rpartition(":")[2])):
            client.set_registered_model_alias("words", "champion", 2)
            _wait_until(lambda: serving(running) == 2, log=log)
            _wait_until(lambda: standing(url) == ("in sync", 2, 2), log=log)
            assert not json.loads(got(f"{url}/status.json"))["error"]


@pytest.mark.slow
def test_a_registry_that_is_slow_is_followed_and_one_that_hangs_stops_nothing(
    client, registry, running, file, tmp_path, monkeypatch
):
    path, url = file
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with slow_link(registry) as link, watching(path, link.url, "--interval", "0.5") as (process, log):
        _wait_until(lambda: serving(running) == 1, log=log)
        link.delay = 0.2
        client.set_registered_model_alias("words", "champion", 2)
        _wait_until(lambda: serving(running) == 2, log=log)
        link.delay, link.silent = 0.0, True
        client.set_registered_model_alias("words", "champion", 1)
        _wait_until(lambda: json.loads(got(f"{url}/status.json"))["error"], log=log)
        assert serving(running) == 2
        assert got(f"{url}/health")
        link.silent = False
        _wait_until(lambda: serving(running) == 1, log=log)
        _wait_until(lambda: standing(url) == ("in sync", 1, 1), log=log)
        link.silent = True
        process.terminate()
        assert process.wait(30) == 0  # it waits for no more than the requests that are under way


@pytest.mark.slow
def test_a_watcher_that_is_killed_at_any_moment_goes_on_where_it_was(client, registry, running, file):
    path, _ = file
    triton, folder = running
    wanted = 1
    for place, moment in enumerate((0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3)):
        with watching(path, registry, "--interval", "0.3") as (process, log):
            _wait_until(lambda before=wanted: serving(running) == before, log=log)
            wanted = 1 + (place + 1) % 2
            client.set_registered_model_alias("words", "champion", wanted)
            time.sleep(moment)
            process.kill()
    with watching(path, registry, "--interval", "0.3") as (_, log):
        _wait_until(lambda: serving(running) == wanted, log=log)
        found = Deployments(TritonClient(Connection(triton.url)), FolderFiles(folder))
        kept = {"words", *(f"words.v{version}" for version in (1, 2))}
        _wait_until(lambda: set(found.files.models()) <= kept and set(found.loaded("words")) <= kept, log=log)


@pytest.mark.slow
def test_a_webhook_that_cannot_be_installed_is_told(client, registry, running, file, tmp_path):
    path, url = file
    with watching(path, f"sqlite:///{tmp_path / 'mlflow.db'}", "--install-webhook") as (process, log):
        assert process.wait(60) == 1
        assert "is no MLflow server, and only a server sends webhooks" in log.read_text()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        taken.listen()
        with watching(path, registry) as (process, log):
            assert process.wait(60) == 1
            assert "is the port taken" in log.read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium")
def test_the_page_in_a_browser(client, registry, running, file, tmp_path):
    path, url = file
    with watching(path, registry) as (_, log):
        _wait_until(lambda: serving(running) == 1, log=log)
        _wait_until(lambda: json.loads(got(f"{url}/status.json"))["standings"], log=log)
        shown = browsed(url, tmp_path / "profile")
        assert "all as the registry says" in shown
        assert "<td>words</td>" in shown.replace(' class=""', "")
        assert "deployed" in shown


def browsed(url, profile):
    """Return the page as a browser has it after a few seconds, when its script has brought it once more."""
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--virtual-time-budget=5000", "--dump-dom", url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def serving(running):
    triton, folder = running
    found = Deployments(TritonClient(Connection(triton.url)), FolderFiles(folder))
    route = found.serving("words")
    if route is None:
        return None
    answer = found.client.infer("words", {"text": np.array([[b"the cat"]], object)})
    assert answer["sentence_embedding"].shape[0] == 1
    return route.active


def standing(url):
    found = json.loads(got(f"{url}/status.json"))["standings"]
    return (found[0]["state"], found[0]["wants"], found[0]["serves"]) if found else None


def got(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def refused(url, headers, body):
    try:
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10)
    except urllib.error.HTTPError as error:
        return error.code
    raise AssertionError("it was accepted")


def _answers(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
        return True
    return False


def _wait_until(done, seconds=90.0, log: Path | None = None):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, log.read_text()[-3000:] if log else ""
        time.sleep(0.05)
