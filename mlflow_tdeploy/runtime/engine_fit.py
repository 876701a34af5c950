"""Whether a TensorRT engine runs on a host, from what was recorded when it was built. Pure: opens nothing.

Rules: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-compatibility.html and
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/engine-compatibility.html (and
``cpu-engines.html`` beside it for the compute capabilities).
"""

from __future__ import annotations

from dataclasses import dataclass

from mlflow_tdeploy.core.engine import EngineRecord, version_numbers
from mlflow_tdeploy.core.hardware import Gpu
from mlflow_tdeploy.runtime.base import Compat, Fit

#: What a TensorRT-RTX engine runs on when no target was set, beside everything from 12.0 on.
_RTX_DEFAULT = ("8.0", "8.6", "8.9")
_RTX_FROM = (12, 0)
_AMPERE = (8, 0)
#: Runtimes of a major version that open version-compatible engines of the one before; no others do.
_NEXT_MAJOR = {8: 10, 10: 11}


@dataclass(frozen=True)
class EngineHost:
    """What an engine meets on a host.

    Attributes:
        os: Operating system and machine, for example ``linux-x86_64``.
        gpu: The GPU, if there is one.
        module: The TensorRT that is installed: ``tensorrt`` or ``tensorrt_rtx``.
        version: Its version, which may leave out the last number; empty where it is not known.
    """

    os: str
    gpu: Gpu | None
    module: str
    version: str


def engine_fit(engine: EngineRecord, host: EngineHost) -> Compat:
    """Say how well an engine fits a host.

    Returns:
        ``REBUILD`` where only another engine of the same graph would do, ``UNSUPPORTED`` where none would.
    """
    if engine.module != host.module:
        return Compat(Fit.UNSUPPORTED, f"built by {engine.module}, which {host.module} does not open")
    if host.gpu is None:
        return Compat(Fit.UNSUPPORTED, "no NVIDIA GPU on this host")
    for refusal in (_platform(engine, host), _version(engine, host), _driver(engine, host.gpu)):
        if refusal is not None:
            return refusal
    return _rtx_gpu(engine, host.gpu) if engine.module == "tensorrt_rtx" else _gpu(engine, host.gpu)


def _platform(engine: EngineRecord, host: EngineHost) -> Compat | None:
    """Plans of TensorRT belong to an operating system and machine; those of TensorRT-RTX to a machine."""
    own, there = engine.os, host.os
    if engine.module == "tensorrt_rtx":
        own, there = own.rpartition("-")[2], there.rpartition("-")[2]
    if own and own != there:
        return Compat(Fit.REBUILD, f"built for {own}, this host is {there}")
    return None


def _version(engine: EngineRecord, host: EngineHost) -> Compat | None:
    if not host.version:
        said = f"built with {engine.module} {engine.version}, and this host's is not known"
        return Compat(Fit.UNSUPPORTED, f"{said} (of a server, tensorrt=… says it)")
    if engine.version == host.version or engine.version.startswith(f"{host.version}."):
        return None
    made, here = version_numbers(engine.version), version_numbers(host.version)
    said = f"built with {engine.module} {engine.version}, this host has {host.version}"
    if engine.module == "tensorrt_rtx" or "VERSION_COMPATIBLE" not in engine.flags:
        return Compat(Fit.REBUILD, said, otherwise=Fit.OPTIMAL)
    if here > made and here[0] in (made[0], _NEXT_MAJOR.get(made[0])):
        return None
    return Compat(Fit.REBUILD, f"{said}, which its version compatibility does not reach", otherwise=Fit.OPTIMAL)


def _driver(engine: EngineRecord, gpu: Gpu) -> Compat | None:
    """A library of one CUDA major version runs on every driver of that version and later ones."""
    if engine.cuda and gpu.cuda and version_numbers(gpu.cuda)[0] < version_numbers(engine.cuda)[0]:
        return Compat(Fit.UNSUPPORTED, f"needs a driver for CUDA {engine.cuda}, this one supports {gpu.cuda}")
    return None


def _gpu(engine: EngineRecord, gpu: Gpu) -> Compat:
    here = gpu.compute_capability
    if not engine.compute_capability:
        return Compat(Fit.USABLE, "not known which GPU it was built on")
    if engine.gpu == gpu.name and engine.compute_capability == here:
        return Compat(Fit.OPTIMAL, f"built on this kind of GPU, {gpu.name}")
    if engine.hardware_compatibility == "AMPERE_PLUS" and version_numbers(here) >= _AMPERE:
        return Compat(Fit.USABLE, f"built on {_of(engine)} to run on any GPU from compute capability 8.0 on")
    if engine.compute_capability != here:
        return Compat(Fit.REBUILD, f"built on {_of(engine)}, this GPU has compute capability {here}")
    if engine.hardware_compatibility == "SAME_COMPUTE_CAPABILITY":
        return Compat(Fit.OPTIMAL, f"built for every GPU of compute capability {here}")
    return Compat(Fit.USABLE, f"built on {_of(engine)}, which is another GPU of the same compute capability")


def _rtx_gpu(engine: EngineRecord, gpu: Gpu) -> Compat:
    here = gpu.compute_capability
    if here in (engine.targets or _RTX_DEFAULT) or (not engine.targets and version_numbers(here) >= _RTX_FROM):
        return Compat(Fit.OPTIMAL, "portable, compiled for this GPU when it is opened")
    if engine.targets or version_numbers(here) < _AMPERE:
        made = ", ".join(engine.targets) or "8.0 and later"
        return Compat(Fit.REBUILD, f"built for compute capability {made}, this GPU has {here}")
    return Compat(Fit.USABLE, f"NVIDIA does not list compute capability {here} for such engines; it may be opened")


def _of(engine: EngineRecord) -> str:
    return f"{engine.gpu or 'a GPU'} (compute capability {engine.compute_capability})"
