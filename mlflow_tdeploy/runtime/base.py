"""The contract of a runtime and its sessions."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.extension import Registry
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant


class Fit(enum.Enum):
    """How well a variant fits a runtime on a host."""

    OPTIMAL = "optimal"
    USABLE = "usable"
    REBUILD = "rebuild"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Compat:
    """A fit and the reason for it.

    Attributes:
        fit: The fit.
        reason: Why, as one sentence.
        outdated: Whether only the runtime's version on this host is in the way.
    """

    fit: Fit
    reason: str
    outdated: bool = False

    @property
    def can_open(self) -> bool:
        """Whether opening may be tried."""
        return self.fit in (Fit.OPTIMAL, Fit.USABLE)


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs; every field is a ``model_config`` key of its name.

    Attributes:
        threads: Batches run at once in bulk work; 0 means one per usable core.
        intra_op_threads: Threads inside one operator; 0 means one for each batch of bulk work, and for a lone
            request one or one per core, whichever is faster at the moment.
        spinning: Whether waiting operator threads spin, where ``intra_op_threads`` is given.
        arena: Whether ONNX Runtime keeps freed memory for the next run.
        graph_level: ``disable``, ``basic``, ``extended``, ``layout`` or ``all``.
        execution_mode: ``sequential`` or ``parallel``.
        profiling: Path prefix of a profile to write; empty for none.
        token_budget: Most padded tokens in a batch; 0 means the default.
    """

    threads: int = 0
    intra_op_threads: int = 0
    spinning: bool = False
    arena: bool = True
    graph_level: str = "all"
    execution_mode: str = "sequential"
    profiling: str = ""
    token_budget: int = 0

    def __post_init__(self) -> None:
        for name in ("threads", "intra_op_threads", "token_budget"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"The session option '{name}' must not be negative, got {getattr(self, name)}.")
        _one_of("graph_level", self.graph_level, ("disable", "basic", "extended", "layout", "all"))
        _one_of("execution_mode", self.execution_mode, ("sequential", "parallel"))

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> SessionOptions:
        """Make options from configuration keys; values may be text (environment, command line).

        Raises:
            InvalidInputError: An unknown key or a value of a wrong type.
        """
        known = {field.name: type(getattr(cls(), field.name)) for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in (config or {}).items():
            if key not in known:
                raise InvalidInputError(f"Unknown session option '{key}'. Known: {', '.join(known)}.")
            if value is not None:
                values[key] = parse_value(key, value, known[key])
        return cls(**values)


def parse_value(key: str, value: Any, kind: type) -> Any:
    """Return a configuration value as ``kind`` (bool, int or str), reading text as people write it.

    Raises:
        InvalidInputError: The value cannot be read as that type.
    """
    if (
        kind is bool
        and isinstance(value, str)
        and value.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off", "")
    ):
        return value.lower() in ("true", "1", "yes", "on")
    if kind is int and isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise InvalidInputError(f"The option '{key}' must be of type {kind.__name__}, got {shown(value)}.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInputError(f"The session option '{name}' must be one of {', '.join(allowed)}, got {shown(value)}.")


class Session(ABC):
    """An opened variant. ``infer`` may be called from many threads at once."""

    @abstractmethod
    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph: input arrays of the signature's dtypes to output arrays of the signature's dtypes.

        Raises:
            SessionError: The runtime failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what the session holds; closing twice is fine."""

    @property
    def device(self) -> str:
        """The device really used, as the runtime reports it."""
        return "cpu"


class Runtime(ABC):
    """Opens variants of some formats. Instances hold nothing."""

    name: ClassVar[str]
    #: Variant formats it can open.
    formats: ClassVar[frozenset[str]]
    #: Kind of device: 0 for a GPU, 1 for the CPU, 9 for the reference that serves only when nothing else can.
    tier: ClassVar[int]
    #: Tried in this order within a tier where no latency was measured; lower first.
    preference: ClassVar[int]
    #: Whether ``intra_op_threads`` = 0 opens sessions of one thread, so that batches run side by side.
    one_thread_sessions: ClassVar[bool] = False
    #: How to get it where it is missing.
    install: ClassVar[str]
    #: Distributions that each provide its library; two of them installed overwrite each other's files.
    distributions: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def missing(self) -> str | None:
        """Return why this runtime cannot work here at all (a package not installed), or None. Imports nothing heavy."""

    @abstractmethod
    def version(self) -> str:
        """Return the runtime's version; empty where it is missing."""

    @abstractmethod
    def probe(self, host: Fingerprint, variant: Variant) -> Compat:
        """Say how well a variant fits this runtime on a host, without opening it."""

    @abstractmethod
    def open(self, root: Path, variant: Variant, signature: Signature, options: SessionOptions) -> Session:
        """Open a variant whose files lie below ``root`` (a bundle's ``tdeploy`` folder).

        Raises:
            SessionError: It cannot be opened.
        """

    @abstractmethod
    def self_test(self) -> str:
        """Exercise the runtime in this process and say what it used. Called in a child process: it may crash.

        Raises:
            Exception: Whatever goes wrong.
        """


RUNTIMES: Registry[type[Runtime]] = Registry("runtime", discover="mlflow_tdeploy.runtime.backends")
