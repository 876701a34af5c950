"""A Triton server that listens on this host: its address, its own words, the end of its log."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import SessionError


@dataclass(frozen=True)
class Listening:
    """Where a server of this host listens.

    Attributes:
        http: Port for HTTP on 127.0.0.1.
        grpc: Port for gRPC.
        metrics: Port for metrics.
        log: What it writes.
    """

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
    def listens(self) -> bool:
        """Whether it says in its log that the port is its own."""
        return f'"Started HTTPService at 127.0.0.1:{self.http}"' in self.written()

    def written(self) -> str:
        """Return its log; nothing where it is gone."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_text(errors="replace")
        return ""

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
        return next(iter(self.last_errors(1)), "")

    def last_errors(self, most: int) -> list[str]:
        """Return the last errors in its log, each once, the last one last."""
        lines = (line for line in self.written().splitlines() if line.startswith(("E", "error: ")))
        told = (line.partition("] ")[2] if line.startswith("E") else line.removeprefix("error: ") for line in lines)
        return [*dict.fromkeys(filter(None, (line.strip().strip('"') for line in told)))][-most:]
