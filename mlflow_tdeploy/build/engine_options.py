"""What the caller of an engine's build decides."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.engine import version_numbers
from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, MissingDependencyError, shown
from mlflow_tdeploy.core.hardware import Fingerprint
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
        timing_cache: File with measurements of earlier builds, read and written; None for none.
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
        if unknown := sorted(set(self.flags) - set(FLAGS)):
            raise InvalidInputError(f"Unknown engine flag {shown(unknown[0])}. Known: {', '.join(FLAGS)}.")
        if self.hardware_compatibility not in LEVELS:
            raise InvalidInputError(
                f"hardware_compatibility must be one of {', '.join(LEVELS)}, got {shown(self.hardware_compatibility)}."
            )
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


def engines_of(wanted: Iterable[str | EngineOptions] | None) -> tuple[EngineOptions, ...]:
    """Return what is meant by ``engines=``: precisions, or options in full.

    Raises:
        InvalidInputError: Something else was given.
    """
    if wanted is None:
        return ()
    engines = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    if isinstance(wanted, str) or not all(isinstance(one, (str, EngineOptions)) for one in engines):
        raise InvalidInputError(
            f"engines is a list of precisions and EngineOptions, like ['fp16'], got {shown(wanted)}."
        )
    return tuple(one if isinstance(one, EngineOptions) else EngineOptions(precision=one) for one in engines)


def check_engines(engines: Sequence[EngineOptions], host: Fingerprint) -> None:
    """Make sure that engines can be built on a host, as far as that shows before there is a graph.

    Raises:
        InvalidInputError: Two of them would have one id.
        MissingDependencyError: TensorRT is not installed.
        BuildError: One needs a GPU and there is none.
    """
    ids = []
    for engine in engines:
        module, new_id = engine.settled(host)
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
