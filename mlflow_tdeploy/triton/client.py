"""What is asked of a Triton server, over HTTP or gRPC: load, unload, what is there, inference."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mlflow_tdeploy.core.errors import (
    InvalidInputError,
    LateError,
    MissingDependencyError,
    ServerError,
    TDeployError,
    UnreachableError,
    shown,
)
from mlflow_tdeploy.core.tensors import Arrays

T = TypeVar("T")
_SCHEMES = {"http": 8000, "https": 8000, "grpc": 8001, "grpcs": 8001}
_ANSWER = "answer for"
_INSTALL = "pip install 'mlflow-tdeploy[triton]'"
#: What proxies of gRPC say in UNAVAILABLE that have waited long enough: gRPC itself of HTTP's 504, and Envoy.
_PROXY_IS_TIRED = ("status: 504", "request timeout")
#: Seconds for what takes no time, and for a model to load.
QUICK_S, LOAD_S = 30.0, 600.0
#: Seconds until a model that was loaded has to answer, and between asking for that.
_READY_S, _PAUSE_S = 60.0, 0.02


@dataclass(frozen=True)
class Connection:
    """Where a server is and how to talk to it.

    Attributes:
        url: ``http://host:port``, or with https, grpc or grpcs.
        token: Sent as ``Authorization: Bearer …``; never shown.
        ca: File of certificates to trust, for https and grpcs; the system's by default.
        timeout: Seconds for an answer; 0 for what suits each kind of request.
    """

    url: str
    token: str = ""
    ca: str = ""
    timeout: float = 0.0

    def __post_init__(self) -> None:
        if "@" in self.url:
            raise InvalidInputError("The server's address holds a password. Give a token by TRITON_TOKEN instead.")
        parsed = urllib.parse.urlsplit(self.url)
        try:
            _ = parsed.port
        except ValueError as error:
            raise InvalidInputError(f"The server's address {shown(self.url)} has no usable port: {error}.") from error
        if parsed.scheme not in _SCHEMES or not parsed.hostname or parsed.path not in ("", "/") or parsed.query:
            raise InvalidInputError(
                f"The server's address is {shown(self.url)}: use http://host:8000, https://…, "
                f"grpc://host:8001 or grpcs://…."
            )

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    @property
    def scheme(self) -> str:
        """How to talk to it."""
        return urllib.parse.urlsplit(self.url).scheme

    @property
    def address(self) -> str:
        """Host and port."""
        parsed = urllib.parse.urlsplit(self.url)
        host = f"[{parsed.hostname}]" if ":" in str(parsed.hostname) else parsed.hostname
        return f"{host}:{parsed.port or _SCHEMES[parsed.scheme]}"

    @property
    def secure(self) -> bool:
        """Whether it is encrypted."""
        return self.scheme.endswith("s")


@dataclass(frozen=True)
class ModelState:
    """A model's version as the server sees it.

    Attributes:
        name: The model.
        version: Which; empty where the server has not read it.
        state: ``READY``, ``UNAVAILABLE``, …; empty where it was never loaded.
        reason: Why it is not ready.
    """

    name: str
    version: str
    state: str
    reason: str

    @property
    def is_there(self) -> bool:
        """Whether the server has it, or is loading it."""
        return self.state in ("READY", "LOADING")


class TritonClient:
    """Asks one server. Every call has a timeout, and what goes wrong is a :class:`ServerError` in the server's words.

    Args:
        connection: Where it is.
        log: Returns the last error in the server's log, where that can be read: it often says more than the answer.
    """

    def __init__(self, connection: Connection, log: Callable[[], str] | None = None) -> None:
        self.connection = connection
        self._log = log or (lambda: "")
        self._grpc = connection.scheme.startswith("grpc")
        self._headers = {"authorization": f"Bearer {connection.token}"} if connection.token else {}

    def live(self) -> bool:
        """Return whether a server answers there."""
        try:
            return bool(self._call("be asked", lambda client, more: client.is_server_live(**more), QUICK_S))
        except UnreachableError:
            return False

    def require_live(self) -> None:
        """Make sure that a server answers.

        Raises:
            ServerError: None does; the message says what is there instead.
        """
        if not self._call("be asked", lambda client, more: client.is_server_live(**more), QUICK_S):
            raise ServerError(f"The server at {self.connection.url} is not live.")

    def load(self, model: str, timeout: float = LOAD_S) -> None:
        """Load a model, or load it anew.

        Raises:
            ServerError: It cannot be loaded.
        """
        before = self._log()
        try:
            self._call(f"load '{model}'", lambda client, more: client.load_model(model, **more), timeout)
        except ServerError as error:
            said = self._log()
            if said in ("", before) or said in str(error):
                raise
            raise type(error)(f"{error} (its log: {said})") from error

    def bring_up(self, model: str, version: int) -> None:
        """Load a model, and wait until a version of it answers.

        Raises:
            ServerError: It cannot be loaded, or does not answer for a minute.
        """
        self.load(model)
        end = time.monotonic() + _READY_S
        while not self.ready(model, version):
            if time.monotonic() > end:
                raise ServerError(f"'{model}' was loaded and is not ready after {_READY_S:.0f} s.")
            time.sleep(_PAUSE_S)

    def unload(self, model: str) -> None:
        """Unload a model; requests that it has are answered first. One that is not loaded is fine."""
        self._call(f"unload '{model}'", lambda client, more: client.unload_model(model, **more), QUICK_S)

    def ready(self, model: str, version: int | None = None) -> bool:
        """Return whether a model answers."""
        number = "" if version is None else str(version)
        return bool(
            self._call(f"ask for '{model}'", lambda client, more: client.is_model_ready(model, number, **more), QUICK_S)
        )

    def models(self) -> list[ModelState]:
        """Return what is in the server's repository."""
        as_json = {"as_json": True} if self._grpc else {}
        found = self._call(
            "list models", lambda client, more: client.get_model_repository_index(**as_json, **more), QUICK_S
        )
        entries = found.get("models", []) if isinstance(found, Mapping) else found
        keys = ("name", "version", "state", "reason")
        return [ModelState(*(str(entry.get(key, "")) for key in keys)) for entry in entries]

    def config(self, model: str, version: int | None = None) -> dict[str, Any] | None:
        """Return a loaded model's configuration, as JSON has it; None where it is not loaded."""
        if not self.ready(model, version):
            return None
        number, as_json = "" if version is None else str(version), {"as_json": True} if self._grpc else {}
        found = self._call(
            f"read the configuration of '{model}'",
            lambda client, more: client.get_model_config(model, number, **as_json, **more),
            QUICK_S,
        )
        config: dict[str, Any] = found.get("config", found)
        return config

    def parameters(self, model: str, version: int | None = None) -> dict[str, str] | None:
        """Return the parameters of a loaded model's configuration by name; None where it is not loaded."""
        config = self.config(model, version)
        return None if config is None else parameters_of(config)

    def infer(
        self,
        model: str,
        arrays: Arrays,
        *,
        outputs: Sequence[str] = (),
        version: int | None = None,
        params: Mapping[str, Any] | None = None,
        timeout: float = QUICK_S,
    ) -> Arrays:
        """Ask a model.

        Args:
            model: Which.
            arrays: Its inputs by name; texts as an array of bytes objects.
            outputs: Those that are wanted; all by default.
            version: Which version.
            params: Parameters of the request.
            timeout: Seconds.

        Raises:
            InvalidInputError: The server says that the request is wrong.
            ServerError: It cannot answer.
        """

        def ask(client: Any, more: dict[str, Any]) -> Arrays:
            module = self._module()
            sent = [_input(module, name, array) for name, array in arrays.items()]
            wanted = [module.InferRequestedOutput(name) for name in outputs] or None
            result = client.infer(
                model,
                sent,
                "" if version is None else str(version),
                wanted,
                parameters=_plain(params) or None,
                **more,
            )
            got = result.get_response()
            names = (
                [one["name"] for one in got["outputs"]] if isinstance(got, dict) else [one.name for one in got.outputs]
            )
            return {name: result.as_numpy(name) for name in names}

        return self._call(f"{_ANSWER} '{model}'", ask, timeout)

    def _call(self, doing: str, call: Callable[[Any, dict[str, Any]], T], timeout: float) -> T:
        """Do something with a fresh client: threads share none, and none waits for a server that has gone."""
        self._module()  # raises where it is missing
        from tritonclient.utils import InferenceServerException

        seconds = self.connection.timeout or timeout
        more: dict[str, Any] = {"headers": self._headers} if self._headers else {}
        if self._grpc:
            more["client_timeout"] = seconds
        try:
            with self._client(seconds) as client:
                return call(client, more)
        except TDeployError:
            raise
        except InferenceServerException as error:
            raise self._refusal(doing, error) from error
        except OSError as error:
            kind = LateError if isinstance(error, TimeoutError) else UnreachableError
            raise kind(
                f"The server at {self.connection.url} cannot {doing}: nobody answers there ({error}). Is it running, "
                f"and is that its port?"
            ) from error
        except Exception as error:  # an answer in another protocol: both clients fail in their own ways
            if type(error).__name__ == "HTTPConnectionClosed":
                raise UnreachableError(
                    f"The server at {self.connection.url} cannot {doing}: it closed the connection, as one does that "
                    f"ends. Does it run still, and what does its log say?"
                ) from error
            raise UnreachableError(
                f"What is at {self.connection.url} cannot {doing}: it answers as no Triton does over "
                f"{self.connection.scheme} ({type(error).__name__}: {shown(str(error), 200)})."
            ) from error

    def _refusal(self, doing: str, error: Any) -> Exception:
        said, status = str(error.message()).strip(), str(error.status() or "")
        if doing.startswith(_ANSWER) and status in ("400", "StatusCode.INVALID_ARGUMENT"):
            return InvalidInputError(f"The server at {self.connection.url} cannot {doing}: {said}")
        if status in ("502", "504"):
            return (LateError if status == "504" else UnreachableError)(
                f"The server at {self.connection.url} cannot {doing}: what is in front of it reaches none ({said})."
            )
        if status in ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED") and "poll" not in said:
            late = status.endswith("EXCEEDED") or any(words in said for words in _PROXY_IS_TIRED)
            return (LateError if late else UnreachableError)(
                f"The server at {self.connection.url} cannot {doing}: nobody answers there ({said})."
            )
        if "polling is enabled" in said or "POLL" in said:
            return ServerError(
                f"The server at {self.connection.url} looks for models by itself (--model-control-mode=poll). Start it "
                f"with --model-control-mode=explicit: then a version serves when it is ready, not when its files come."
            )
        return ServerError(f"The server at {self.connection.url} cannot {doing}: {said}")

    @contextlib.contextmanager
    def _client(self, seconds: float) -> Iterator[Any]:
        module, secure = self._module(), self.connection.secure
        if self._grpc:
            ca = {"root_certificates": self.connection.ca} if self.connection.ca else {}
            client = module.InferenceServerClient(self.connection.address, ssl=secure, **ca)
        else:
            more: dict[str, Any] = {"ssl": True, "ssl_context_factory": self._context} if secure else {}
            client = module.InferenceServerClient(
                self.connection.address, connection_timeout=min(seconds, QUICK_S), network_timeout=seconds, **more
            )
        try:
            yield client
        finally:
            client.close()

    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.connection.ca or None)

    def _module(self) -> Any:
        try:
            if self._grpc:
                import tritonclient.grpc as module
            else:
                import tritonclient.http as module
        except ImportError as error:
            raise MissingDependencyError("tritonclient", "Talking to Triton", _INSTALL) from error
        return module


def parameters_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters of a configuration by name."""
    return {name: str(value.get("string_value", "")) for name, value in config.get("parameters", {}).items()}


def _plain(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return parameters as a request can hold them: it has no lists."""
    return {
        name: json.dumps(value) if isinstance(value, (list, tuple)) else value for name, value in (params or {}).items()
    }


def _input(module: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    from tritonclient.utils import np_to_triton_dtype

    if (kind := np_to_triton_dtype(array.dtype)) is None:
        raise InvalidInputError(f"The input '{name}' is {array.dtype}, which Triton does not have. Convert it first.")
    tensor = module.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor
