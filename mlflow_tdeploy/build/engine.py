"""TensorRT engines from ONNX graphs: one builder for TensorRT 10, 11 and TensorRT-RTX.

Networks are strongly typed on each of them (TensorRT 11 knows no other): precision is what the graph says. The module
is a parameter, and nothing is called that one of the three does not have.
API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_tdeploy.build.engine_options import EngineOptions
from mlflow_tdeploy.core.engine import EngineRecord, Range
from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, StorageError
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.runtime.backends._trt_engine import collecting_log
from mlflow_tdeploy.store.disk import own_folder, storage_errors, temporary

#: What a builder reports: the phase, how far it is and how many steps it has.
BuildProgress = Callable[[str, int, int], None]
_MOST_MESSAGES = 5
_log = logging.getLogger("mlflow_tdeploy")


def build_engine(
    trt: Any,
    graph: Path,
    target: Path,
    signature: Signature,
    host: Fingerprint,
    options: EngineOptions | None = None,
    progress: BuildProgress | None = None,
) -> EngineRecord:
    """Build an engine.

    Args:
        trt: The module, see :func:`~mlflow_tdeploy.build.engine_options.tensorrt_module`.
        graph: A portable ONNX graph; its external data beside it.
        target: File to write the plan to; it appears when it is whole.
        signature: The model's inputs and the ranges of their dimensions.
        host: This host.
        options: How.
        progress: Told of every step of the builder.

    Raises:
        InvalidInputError: A profile that the signature does not allow, or a flag that this TensorRT does not have.
        BuildError: The graph cannot be parsed, or no engine can be built; the message holds what TensorRT said.
    """
    options = options or EngineOptions()
    profiles = engine_profiles(signature, options.profiles)
    log = collecting_log(trt)
    builder = trt.Builder(log)
    for library in options.plugins:
        builder.get_plugin_registry().load_library(str(library))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(_parser_message(trt, parser, graph))
    config = _configured(trt, builder, options, profiles, progress)
    timings = options.timing_cache or _timings_of(trt, host)
    cache = _timing_cache(config, timings)
    plan = builder.build_serialized_network(network, config)
    if progress is not None and config.progress_monitor.failure is not None:
        raise config.progress_monitor.failure
    if plan is None:
        raise BuildError(f"{_called(trt)} built no engine of '{graph.name}': {_said(log) or 'it did not say why'}.")
    _write(target, plan)
    try:
        _write(timings, cache.serialize())
    except (StorageError, OSError) as error:  # the plan is there: only the next build is slower
        _log.warning("What this build measured is not kept: %s", error)
    return _record(trt, host, options, profiles)


def _record(
    trt: Any, host: Fingerprint, options: EngineOptions, profiles: tuple[Mapping[str, Range], ...]
) -> EngineRecord:
    gpu = host.gpu
    return EngineRecord(
        module=trt.__name__,
        version=trt.__version__,
        os=host.os,
        gpu=gpu.name if gpu else "",
        compute_capability=gpu.compute_capability if gpu else "",
        driver=gpu.driver if gpu else "",
        flags=tuple(sorted(options.flags)),
        plugins=tuple(sorted(library.name for library in options.plugins)),
        hardware_compatibility=options.hardware_compatibility,
        targets=options.targets,
        profiles=profiles,
    )


def engine_profiles(
    signature: Signature, wanted: Sequence[Mapping[str, tuple[int, int, int]]] | None = None
) -> tuple[Mapping[str, Range], ...]:
    """Return the shapes of every input in each profile.

    Args:
        signature: The model's.
        wanted: Ranges by dimension for each profile; None for one profile of the signature's own.

    Raises:
        InvalidInputError: An unknown dimension, or a range that is not in order or leaves the signature's.
    """
    found = []
    for ranges in wanted if wanted is not None else ({},):
        dims = {dim.name: dim for dim in signature.dims}
        for name, sizes in ranges.items():
            dims[name] = _narrowed(signature.dim(name), sizes)
        found.append({spec.name: _range(spec, dims) for spec in signature.inputs})
    if not found:
        raise InvalidInputError("An engine needs at least one profile: leave profiles out for the model's own ranges.")
    return tuple(found)


def _narrowed(own: Dim, sizes: tuple[int, int, int]) -> Dim:
    dim = Dim(own.name, *sizes)  # refuses what is not in order
    if dim.min < own.min or dim.max > own.max:
        raise InvalidInputError(f"The profile has {dim}, which leaves the model's range: {own}.")
    return dim


def _range(spec: TensorSpec, dims: Mapping[str, Dim]) -> Range:
    low, usual, high = (
        tuple(size if isinstance(size, int) else dims[size].at(at) for size in spec.shape)
        for at in ("min", "opt", "max")
    )
    return low, usual, high


def _monitor(trt: Any, progress: BuildProgress) -> Any:
    """Return what the builder reports its phases to. An exception in ``progress`` ends the build and is raised."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.failure is None:
                try:
                    progress(phase_name, step + 1, self.steps.get(phase_name, 0))
                except BaseException as failure:  # it must not pass through the library's own frames
                    self.failure = failure
            return self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _configured(
    trt: Any,
    builder: Any,
    options: EngineOptions,
    profiles: Sequence[Mapping[str, Range]],
    progress: BuildProgress | None,
) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and then fp32 is not what a CPU has verified
    for name in options.flags:
        config.set_flag(_member(trt, "BuilderFlag", name))
    if options.hardware_compatibility != "NONE":
        config.hardware_compatibility_level = _member(trt, "HardwareCompatibilityLevel", options.hardware_compatibility)
    if options.targets:
        _set_targets(trt, config, options.targets)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that layers can be listed
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    return config


def _set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    if not hasattr(config, "set_compute_capability"):
        raise InvalidInputError(
            f"{_called(trt)} builds for the GPU at hand only: leave targets out, or build with tensorrt_rtx."
        )
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(_member(trt, "ComputeCapability", f"SM{target.replace('.', '')}"), index)


def _member(trt: Any, enum: str, name: str) -> Any:
    """Return a member of an enumeration by its name: numbers differ between major versions."""
    members = getattr(trt, enum).__members__
    if name not in members:
        raise InvalidInputError(f"{_called(trt)} has no {enum} {name}. It has: {', '.join(members)}.")
    return members[name]


def _parser_message(trt: Any, parser: Any, graph: Path) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = []
    for error in errors[:_MOST_MESSAGES]:
        where = f"node '{error.node_name()}' ({error.node_operator()})" if error.node_name() else "the graph"
        said.append(f"{where}: {error.code().name}: {error.desc().strip()}")
    more = f" (and {len(errors) - _MOST_MESSAGES} more)" if len(errors) > _MOST_MESSAGES else ""
    why = "; ".join(said) or "It gave no reason"
    return (
        f"{_called(trt)} cannot parse '{graph.name}'{more}. {why}. Engines are built "
        f"from portable graphs of standard operators: take onnx-fp32 or onnx-fp16, or name the plugin that has it."
    )


def _said(log: Any) -> str:
    """Return TensorRT's errors as one line, each once."""
    lines = dict.fromkeys(" ".join(line.split()) for line in log.errors)
    return "; ".join(list(lines)[:_MOST_MESSAGES])


def _timings_of(trt: Any, host: Fingerprint) -> Path:
    """Return this host's file of what builds with this library measured on this GPU."""
    gpu = f"{host.gpu.name}-{host.gpu.compute_capability}" if host.gpu else "no-gpu"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{trt.__name__}-{trt.__version__}-{gpu}")
    return own_folder("timings") / f"{name}.cache"


def _timing_cache(config: Any, path: Path) -> Any:
    """Give the builder what earlier builds measured; a cache of another version or GPU is started anew."""
    held = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _write(target: Path, content: Any) -> None:
    """Write a buffer under a name that readers skip, then give it its own."""
    fresh = temporary(target.parent)
    with storage_errors(f"write '{target}'"):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(memoryview(content))
            os.replace(fresh, target)
        finally:
            with contextlib.suppress(OSError):  # what failed is told
                fresh.unlink()


def _called(trt: Any) -> str:
    return f"{'TensorRT-RTX' if trt.__name__ == 'tensorrt_rtx' else 'TensorRT'} {trt.__version__}"
