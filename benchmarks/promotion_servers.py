"""A real MLflow server that sends webhooks, and ``tdeploy watch`` as a process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

SECRET = "benchmark"


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def registry(work: Path) -> Iterator[str]:
    """Run ``mlflow server`` with SQLite; MLflow's functions use it."""
    import mlflow
    from cryptography.fernet import Fernet

    work.mkdir(parents=True, exist_ok=True)
    url, log = f"http://127.0.0.1:{free_port()}", work / "log"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]),
        *("--workers", "2", "--backend-store-uri", f"sqlite:///{work / 'mlflow.db'}"),
        *("--artifacts-destination", str(work / "artifacts")),
    ]
    more = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true", "MLFLOW_WEBHOOK_CACHE_TTL": "1",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | more, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: _answers(f"{url}/health"), 120)
        mlflow.set_tracking_uri(url)
        mlflow.set_registry_uri(url)
        mlflow.set_experiment("bench")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@contextlib.contextmanager
def watcher(spec: Path, registry: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``tdeploy watch``; yields once it listens."""
    command = [sys.executable, "-m", "mlflow_tdeploy.cli", "watch", "--file", str(spec), *more]
    env = os.environ | {
        "MLFLOW_TRACKING_URI": registry, "MLFLOW_REGISTRY_URI": registry, "TDEPLOY_WEBHOOK_SECRET": SECRET,
    }  # fmt: skip
    log = spec.with_suffix(".log")
    with log.open("ab") as out, subprocess.Popen(command, env=env, stdout=out, stderr=out) as process:
        begun = log.stat().st_size
        try:
            wait_until(lambda: b"watching" in log.read_bytes()[begun:], 60)
            if "--install-webhook" in more:
                wait_until(lambda: b"/webhook: works" in log.read_bytes()[begun:], 60)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:  # else the end of the block waits for ever
                process.kill()
                raise


def write_spec(path: Path, servers: dict[str, str], model: str, alias: str = "champion", **serve: object) -> Path:
    """Write a ``tdeploy.yaml`` of one target: the servers with their repositories."""
    port = free_port()
    told = ", ".join(f"{{url: '{url}', repository: '{repository}'}}" for url, repository in servers.items())
    options = ", ".join(f"{key}: {value}" for key, value in {"device": "cpu", "grace": 0, **serve}.items())
    path.write_text(
        f"targets: {{all: {{servers: [{told}]}}}}\n"
        f"models: [{{name: '{model}', alias: {alias}, to: all, serve: {{{options}}}}}]\n"
        f"watch: {{interval: 3600, listen: '127.0.0.1:{port}', url: 'http://127.0.0.1:{port}/webhook',\n"
        "        secret: '${TDEPLOY_WEBHOOK_SECRET}'}\n"
    )
    os.environ["TDEPLOY_WEBHOOK_SECRET"] = SECRET
    return path


def wait_until(done: Callable[[], bool], seconds: float, pause: float = 0.01) -> float:
    """Wait for something; return when that was, on the clock of ``time.perf_counter``."""
    end = time.perf_counter() + seconds
    while not done():
        if time.perf_counter() > end:
            raise TimeoutError(f"nothing came in {seconds:.0f} s")
        time.sleep(pause)
    return time.perf_counter()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
        return True
    return False
