"""The contract of a runtime and its sessions."""

from __future__ import annotations

import enum
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.core.extension import Registry
from mlflow_tdeploy.core.hardware import Fingerprint, installed_version
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.torch_tensors import through_host


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
        otherwise: What the fit would be if this host had the software for it; None where more is in the way.
    """

    fit: Fit
    reason: str
    otherwise: Fit | None = None

    @property
    def can_open(self) -> bool:
        """Whether opening may be tried."""
        return self.fit in (Fit.OPTIMAL, Fit.USABLE)


@dataclass(frozen=True)
class Bulk:
    """How a request of many items runs: its batches, as they are served and as they are measured.

    Attributes:
        workers: Batches at once.
        token_budget: Most padded tokens in one.
        threads: Threads inside one operator.
    """

    workers: int
    token_budget: int
    threads: int

    @property
    def method(self) -> dict[str, int]:
        """The same as plain values, for the record of a measurement."""
        return {"intra_op_threads": self.threads, "workers": self.workers, "token_budget": self.token_budget}


@dataclass(frozen=True)
class TritonBackend:
    """What opens the same variants in a Triton server.

    Attributes:
        name: Triton's name of the backend.
        suffix: How the file ends that it opens.
    """

    name: str
    suffix: str


class Session(ABC):
    """An opened variant. ``infer`` may be called from many threads at once."""

    @abstractmethod
    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph: input arrays of the signature's dtypes to output arrays of the signature's dtypes.

        Raises:
            SessionError: The runtime failed.
        """

    def infer_tensors(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the graph on torch tensors; here through the host's memory, in a session that can where they are.

        Args:
            feeds: Name → tensor, all on one device.

        Returns:
            Name → tensor on that device, of the signature's dtypes.

        Raises:
            SessionError: The runtime failed.
        """
        return through_host(self.infer, feeds)

    def facts(self) -> Mapping[str, Any]:
        """Return what only an opened variant tells, as plain values for its evidence; nothing by default."""
        return {}

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
    #: Padded tokens in a batch where nobody says otherwise. The default is meant for a whole device, and a guess.
    token_budget: ClassVar[int] = 16384
    #: Threads inside one operator where nobody says otherwise; 0 for one on every processor.
    threads: ClassVar[int] = 1
    #: Whether opening a variant may end the process, as a GPU's driver can: it is tried in another one first.
    risky: ClassVar[bool] = False
    #: How to get it where it is missing.
    install: ClassVar[str]
    #: The modules it imports, and the distribution to name where one is missing.
    modules: ClassVar[Mapping[str, str]]
    #: Distributions that provide its library, the usual one first; the first one installed has its version.
    distributions: ClassVar[tuple[str, ...]]
    #: Whether two of them installed overwrite each other's files.
    exclusive: ClassVar[bool] = False
    #: Session options that this runtime adds: a frozen dataclass of bool, int and str fields with defaults.
    settings: ClassVar[type | None] = None
    #: What opens the same variants in a Triton server; None where nothing does.
    triton: ClassVar[TritonBackend | None] = None

    def missing(self) -> str | None:
        """Return why this runtime cannot work here at all (a package not installed), or None. Imports nothing heavy."""
        for module, distribution in self.modules.items():
            if importlib.util.find_spec(module) is None:
                return f"{distribution} is not installed ({self.install})"
        return None

    def version(self) -> str:
        """Return the runtime's version; empty where it is missing. Imports nothing."""
        return installed_version(*self.distributions) or ""

    def version_on(self, host: Fingerprint) -> str:
        """Return the runtime's version on a host that says what it has, else the one that is installed here."""
        if not host.software:
            return self.version()
        return next((host.software[name] for name in self.distributions if name in host.software), "")

    @abstractmethod
    def probe(self, host: Fingerprint, variant: Variant) -> Compat:
        """Say how well a variant fits this runtime on a host, without opening it."""

    @abstractmethod
    def open(self, root: Path, variant: Variant, signature: Signature, options: SessionOptions) -> Session:
        """Open a variant whose files lie below ``root`` (a bundle's ``tdeploy`` folder).

        Raises:
            SessionError: It cannot be opened.
        """

    def workers(self, options: SessionOptions, cores: int) -> int:
        """Return how many batches run at once where nobody says so; by default one has the whole device.

        Args:
            options: Session options.
            cores: Processors of this host.
        """
        del options, cores
        return 1

    def bulk(self, variant: Variant, options: SessionOptions, cores: int) -> Bulk:
        """Return how a variant's bulk work runs: as the user says, else its record, else as suits the runtime."""
        workers = options.threads or self.workers(options, cores)
        budget = options.token_budget or variant.token_budget or self.token_budget
        return Bulk(workers, budget, options.intra_op_threads or self.threads or cores)

    def lone_options(self, options: SessionOptions, cores: int) -> SessionOptions | None:
        """Return how to open a second session, to be tried for requests that are a single batch.

        Args:
            options: Those of the first session.
            cores: Processors of this host.

        Returns:
            Options that may be faster for such a request, or None where the first session is the best one anyway.
        """
        del options, cores
        return None

    @classmethod
    def after_fork(cls) -> None:
        """Make the runtime usable in a forked process; its sessions are opened anew there."""
        del cls  # most runtimes have nothing to do

    @abstractmethod
    def self_test(self) -> str:
        """Exercise the runtime in this process and say what it used. Called in a child process: it may crash.

        Raises:
            Exception: Whatever goes wrong.
        """


RUNTIMES: Registry[type[Runtime]] = Registry("runtime", discover="mlflow_tdeploy.runtime.backends")


def runtime_settings() -> list[type]:
    """Return what the runtimes add to the session options."""
    return [runtime.settings for runtime in RUNTIMES if runtime.settings is not None]
