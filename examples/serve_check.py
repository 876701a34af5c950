"""Serves a logged model with `mlflow models serve` and checks that HTTP answers as the model does in this process."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
from mlflow.pyfunc.scoring_server import predictions_to_json

TEXTS = ["a large motorboat that has a cabin", "How do I reset my password?", "undo the bolt of"]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def post(url: str, body: dict) -> tuple[int, object]:
    """Status and JSON answer of one POST; an error's answer as it came."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_ready(server: subprocess.Popen, url: str, timeout: float) -> None:
    """Returns once /ping answers; raises when the server ends or the time is over."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"mlflow models serve ended with status {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"no answer from {url}/ping within {timeout:.0f} s")


def same(a: object, b: object) -> bool:
    """Equal structure and words, numbers equal but for the last bits: a batch of another size rounds differently."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)
    return a == b


def main() -> None:
    """Serves, asks, compares, stops; a non-zero exit status says that something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-uri", required=True, help="for example models:/minilm@champion")
    parser.add_argument("--text", action="append", help="what to ask; several times")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until the server must be ready")
    args = parser.parse_args()
    texts = args.text or TEXTS

    expected = io.StringIO()
    predictions_to_json(mlflow.pyfunc.load_model(args.model_uri).predict(texts), expected)

    # The server is started by name (uvicorn), so this interpreter's folder must come first on PATH.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    command = ["models", "serve", "-m", args.model_uri, "--env-manager", "local", "-h", "127.0.0.1", "-p", port]
    server = subprocess.Popen([sys.executable, "-m", "mlflow", *command], env=env, start_new_session=True)
    try:
        wait_ready(server, url, args.timeout)
        status, answer = post(f"{url}/invocations", {"inputs": texts})
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its own session: the command and the server it started
        server.wait(timeout=30)

    ok = status == 200 and same(answer, json.loads(expected.getvalue()))
    print(f"POST {url}/invocations with {len(texts)} texts: status {status}, equal to predict: {ok}")
    sys.exit(0 if ok else f"served: {str(answer)[:500]}\nin-process: {expected.getvalue()[:500]}")


if __name__ == "__main__":
    main()
