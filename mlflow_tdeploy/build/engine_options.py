"""What the caller of an engine's build decides."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.engine import HEADER_SIZE, EngineRecord, PlanHeader, version_numbers
from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, MissingDependencyError, NotFoundError, shown
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.precision import PRECISIONS
from mlflow_tdeploy.core.variant import check_variant_id

#: Flags that change what an engine can do later; how it is quantized is in the graph.
FLAGS = ("REFIT", "STRIP_PLAN", "WEIGHT_STREAMING", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "TF32")
LEVELS = ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")
MODULES = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class EngineOptions:
    """Which engine to build, and how.

    Attributes:
        precision: Of the portable graph to build from: ``fp32`` for ``onnx-fp32`` and so on. The engine computes what
            the graph says.
        module: ``tensorrt`` or ``tensorrt_rtx``; None for ``tensorrt`` where it and a GPU are there, else the other.
        id: Id of the variant; made of module, precision and GPU when None.
        profiles: Ranges by dimension, one mapping per optimization profile; dimensions that one does not name have the
            signature's range. None: one profile with all of the signature's.
        flags: Names out of :data:`FLAGS`.
        hardware_compatibility: ``NONE``, ``AMPERE_PLUS`` or ``SAME_COMPUTE_CAPABILITY``.
        targets: Compute capabilities to build for, for example ``8.6``; TensorRT-RTX only.
        optimization_level: 0 (quick to build) to 5; None for the library's default.
        workspace: Most bytes of scratch memory; None for all of the device's.
        timing_cache: File with measurements of earlier builds, read and written; None for one of this host's own.
        plugins: Libraries with plugins that the graph needs.

    Raises:
        InvalidInputError: A value that no TensorRT knows.
    """

    precision: str = "fp16"
    module: str | None = None
    id: str | None = None
    profiles: Sequence[Mapping[str, tuple[int, int, int]]] | None = None
    flags: tuple[str, ...] = ()
    hardware_compatibility: str = "NONE"
    targets: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    plugins: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.module is not None and self.module not in MODULES:
            raise InvalidInputError(f"Unknown TensorRT module {shown(self.module)}. Known: {', '.join(MODULES)}.")
        if self.id is not None:
            check_variant_id(self.id)
        _check_flags(self.flags, self.hardware_compatibility)
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise InvalidInputError(f"optimization_level must be 0 to 5, got {shown(self.optimization_level)}.")
        if self.workspace is not None and self.workspace <= 0:
            raise InvalidInputError(f"workspace must be a positive number of bytes, got {shown(self.workspace)}.")
        for target in self.targets:
            version_numbers(target)

    @property
    def parent(self) -> str:
        """Id of the graph that the engine is built from."""
        return f"onnx-{self.precision}"

    def settled(self, host: Fingerprint) -> tuple[str, str]:
        """Return the module and the id that such an engine has if it is built on a host.

        Raises:
            MissingDependencyError: No TensorRT is installed.
            BuildError: It needs a GPU and there is none.
        """
        module = self.module or _usual_module(host)
        if module == "tensorrt" and host.gpu is None:  # its builder may end the process where there is no device
            raise BuildError(
                "TensorRT builds an engine on the GPU that will run it, and this host has none. Build it on such a "
                "host, or with module='tensorrt_rtx', which needs none."
            )
        return module, self.id or engine_id(module, self.precision, host)


@dataclass(frozen=True)
class EnginePlan:
    """An engine that was built elsewhere, to be taken as it is. What its file does not say is what the caller knows.

    Attributes:
        path: The plan, as ``trtexec --saveEngine`` or a builder wrote it.
        id: Id of the variant.
        precision: What it computes with: ``fp16``, ``int8`` …
        os: Where it runs, for example ``linux-x86_64``; like all that follows, empty where it is not known.
        gpu: Name of the GPU it was built on.
        compute_capability: Of that GPU, for example ``9.0``.
        driver: Version of NVIDIA's driver there.
        cuda: CUDA version of the library.
        flags: Builder flags by name, out of :data:`FLAGS`.
        hardware_compatibility: ``NONE``, ``AMPERE_PLUS`` or ``SAME_COMPUTE_CAPABILITY``.
        targets: Compute capabilities that a TensorRT-RTX engine was built for.
        onnx_sha256: Digest of the graph it was built from.

    Raises:
        InvalidInputError: A value that no TensorRT knows.
    """

    path: str | Path
    id: str
    precision: str
    os: str = ""
    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""
    cuda: str = ""
    flags: tuple[str, ...] = ()
    hardware_compatibility: str = "NONE"
    targets: tuple[str, ...] = ()
    onnx_sha256: str = ""

    def __post_init__(self) -> None:
        check_variant_id(self.id)
        if self.precision not in PRECISIONS:
            raise InvalidInputError(f"Unknown precision {shown(self.precision)}. Known: {', '.join(PRECISIONS)}.")
        _check_flags(self.flags, self.hardware_compatibility)

    def record(self) -> EngineRecord:
        """Return what is known of it: the library and its version from the file, the rest from the caller.

        Raises:
            NotFoundError: There is no such file.
            IntegrityError: It is no plan, or not whole.
        """
        try:
            with Path(self.path).open("rb") as file:
                header = PlanHeader.read(file.read(HEADER_SIZE), Path(self.path).name)
        except OSError as error:
            raise NotFoundError(f"Cannot read the engine '{self.path}': {error.strerror or error}.") from error
        known = {name: getattr(self, name) for name in _KNOWN}
        return EngineRecord(header.module, header.version, **known)

    def settled(self, host: Fingerprint) -> tuple[str, str]:
        """Return the module that opens it, and its id; the same on every host."""
        del host
        return self.record().module, self.id


#: What a caller may know of a plan.
_KNOWN = {one.name for one in fields(EnginePlan)} & {one.name for one in fields(EngineRecord)}
#: What ``engines=`` takes.
Engine = EngineOptions | EnginePlan


def _check_flags(flags: Iterable[str], level: str) -> None:
    if unknown := sorted(set(flags) - set(FLAGS)):
        raise InvalidInputError(f"Unknown engine flag {shown(unknown[0])}. Known: {', '.join(FLAGS)}.")
    if level not in LEVELS:
        raise InvalidInputError(f"hardware_compatibility must be one of {', '.join(LEVELS)}, got {shown(level)}.")


def engines_of(wanted: Iterable[str | Engine] | None) -> tuple[Engine, ...]:
    """Return what is meant by ``engines=``: precisions, options in full, or plans.

    Raises:
        InvalidInputError: Something else was given.
    """
    if wanted is None:
        return ()
    engines = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    if isinstance(wanted, str) or not all(isinstance(one, (str, EngineOptions, EnginePlan)) for one in engines):
        raise InvalidInputError(
            f"engines is a list of precisions, EngineOptions and EnginePlans, like ['fp16'], got {shown(wanted)}."
        )
    return tuple(EngineOptions(precision=one) if isinstance(one, str) else one for one in engines)


def check_engines(engines: Sequence[Engine], host: Fingerprint) -> None:
    """Make sure that engines can be built on a host, as far as that shows before there is a graph.

    Raises:
        InvalidInputError: Two of them would have one id.
        MissingDependencyError: TensorRT is not installed.
        BuildError: One needs a GPU and there is none.
    """
    ids = []
    for engine in engines:
        module, new_id = engine.settled(host)
        if isinstance(engine, EngineOptions):
            tensorrt_module(module)
        ids.append(new_id)
    if twice := next((one for one in ids if ids.count(one) > 1), None):
        raise InvalidInputError(f"Two engines would both be the variant '{twice}': give one of them an id of its own.")


def engine_id(module: str, precision: str, host: Fingerprint) -> str:
    """Return the id of an engine that is built on a host: ``trt-fp16-sm90``, ``trt-rtx-fp16``."""
    if module == "tensorrt_rtx":
        return f"trt-rtx-{precision}"
    capability = host.gpu.compute_capability.replace(".", "") if host.gpu else "unknown"
    return f"trt-{precision}-sm{capability}"


def _usual_module(host: Fingerprint) -> str:
    installed = [name for name in MODULES if importlib.util.find_spec(name) is not None]
    if host.gpu is None:
        installed.reverse()  # only TensorRT-RTX builds without a GPU
    if not installed:
        tensorrt_module("tensorrt" if host.gpu else "tensorrt_rtx")  # raises, with the install line
    return installed[0]


def tensorrt_module(name: str) -> Any:
    """Import a TensorRT.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise MissingDependencyError(
            package, "building TensorRT engines", f"pip install 'mlflow-tdeploy[{package}]'"
        ) from error
