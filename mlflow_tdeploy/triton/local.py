"""A Triton server on this host, for as long as somebody wants it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.store.staging import workspace
from mlflow_tdeploy.triton.home import Server, backends, environment, find_server, preflight

#: Ends the server with the thread that started it (prctl PR_SET_PDEATHSIG), whatever becomes of that.
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
_ATTEMPTS = 3
_STOP_S = 10.0


@dataclass(frozen=True)
class LocalTriton:
    """A server that runs.

    Attributes:
        process: Its process.
        http: Port for HTTP on 127.0.0.1.
        grpc: Port for gRPC.
        metrics: Port for metrics.
        log: What it writes.
    """

    process: subprocess.Popen[bytes]
    http: int
    grpc: int
    metrics: int
    log: Path

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.http}"

    def ask(self, path: str, body: Any = None, timeout: float = 60.0) -> Any:
        """Send a request of the HTTP protocol (``v2/…``) and return its JSON answer.

        Args:
            path: What comes after the address.
            body: What to send, as JSON; None for a GET.
            timeout: Seconds.

        Raises:
            SessionError: The server refuses; the message holds its own words, and its log where that says more.
        """
        try:
            status, text = self._exchange(path, None if body is None else json.dumps(body), timeout)
        except OSError as error:
            raise SessionError(f"Triton does not answer '{path}': {error}. {self.last_error()}".strip()) from error
        if status >= HTTPStatus.BAD_REQUEST:
            raise SessionError(self._refusal(path, text.decode(errors="replace")))
        return json.loads(text) if text else None

    def _exchange(self, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.http, timeout=timeout)
        try:
            connection.request("GET" if body is None else "POST", f"/{path}", body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @property
    def ready(self) -> bool:
        """Whether it answers and every model that it was asked to load is there."""
        try:
            return self._exchange("v2/health/ready", None, 1.0)[0] == HTTPStatus.OK
        except (OSError, HTTPException):  # nobody, or another program
            return False

    def load(self, model: str) -> None:
        """Load a model, or load it anew.

        Raises:
            SessionError: It cannot be loaded.
        """
        self.ask(f"v2/repository/models/{model}/load", {})

    def _refusal(self, path: str, said: str) -> str:
        with contextlib.suppress(ValueError):
            said = json.loads(said).get("error", said)
        more = self.last_error()
        return f"Triton refuses '{path}': {said}" + (f" (its log: {more})" if more and more not in said else "")

    def last_error(self) -> str:
        """Return the last error in its log, without time and place; empty for none."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        last = next((line for line in reversed(lines) if line.startswith(("E", "error: "))), "")
        return (last.partition("] ")[2] if last.startswith("E") else last.removeprefix("error: ")).strip().strip('"')

    def stop(self) -> None:
        """End it, and what it left in shared memory; ending it twice is fine."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def local_triton(
    repository: Path | str, *, models: Iterable[str] = (), server: Server | None = None, seconds: float = 60.0
) -> Iterator[LocalTriton]:
    """Run a server on free ports of 127.0.0.1 for the length of a block.

    Models are loaded when they are asked for (``--model-control-mode explicit``), and their configurations are taken as
    they are written.

    Args:
        repository: Folder of models, or the address of one in an object store as Triton writes it.
        models: Those to load at the start.
        server: Which server; the one of this host when None.
        seconds: How long it may take to be ready.

    Raises:
        MissingDependencyError: There is no server on this host.
        SessionError: It cannot start.
    """
    server = server or find_server()
    preflight(server)
    region = f"tdeploy-{os.getpid()}-{secrets.token_hex(4)}-"
    with workspace() as folder:
        running = _started(server, str(repository), models, folder / "log", region, seconds)
        try:
            yield running
        finally:
            running.stop()
            for path in Path("/dev/shm").glob(f"{region}*"):  # noqa: S108 - where Triton puts it
                path.unlink(missing_ok=True)


def _started(
    server: Server, repository: str, models: Iterable[str], log: Path, region: str, seconds: float
) -> LocalTriton:
    wanted = list(models)
    for attempt in range(_ATTEMPTS):
        http, grpc, metrics = ports = _free_ports(3)
        command = _command(server, repository, wanted, ports, region)
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(server))
        running = LocalTriton(process, http, grpc, metrics, log)
        try:
            _wait(running, seconds)
            return running
        except BaseException as error:
            running.stop()
            if not isinstance(error, SessionError):  # somebody has interrupted
                raise
            taken = "Address already in use" in log.read_text(errors="replace")
            if not taken or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _command(server: Server, repository: str, models: list[str], ports: list[int], region: str) -> list[str]:
    http, grpc, metrics = map(str, ports)
    options = {
        "model-repository": repository, "model-control-mode": "explicit", "http-address": "127.0.0.1",
        "http-port": http, "grpc-address": "127.0.0.1", "grpc-port": grpc, "metrics-address": "127.0.0.1",
        "metrics-port": metrics, "backend-config": f"python,shm-region-prefix-name={region}",
    }  # fmt: skip
    if (folder := backends(server)) is not None:
        options["backend-directory"] = str(folder)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += [f"--load-model={name}" for name in models]
    return [sys.executable, "-c", _LAUNCH, str(server.binary), *arguments, "--disable-auto-complete-config"]


def _wait(running: LocalTriton, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if running.process.poll() is not None:
            raise SessionError(
                f"Triton ended with {running.process.returncode} while it started: "
                f"{running.last_error() or running.log.read_text(errors='replace')[-400:]}"
            )
        if running.ready:
            return
        time.sleep(0.02)
    raise SessionError(f"Triton is not ready after {seconds:.0f} s. {running.last_error()}".strip())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
