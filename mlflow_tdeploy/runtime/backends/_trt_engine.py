"""A TensorRT engine that was opened: its tensors and profiles, its contexts, what it says of itself.

https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Engine.html
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.engine import HEADER_SIZE, EngineRecord, PlanHeader
from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.tensors import numpy_dtype
from mlflow_tdeploy.runtime.backends._cuda import Cuda

Shape = tuple[int, ...]
#: Paths of libraries with plugins that engines of this host may use: a model names them, and never brings its own.
PLUGINS = "TDEPLOY_TRT_PLUGINS"
#: Whether this host runs program code that version-compatible plans bring along (``1``).
HOST_CODE = "TDEPLOY_TRT_HOST_CODE"
#: TensorRT's names of dtypes in ours.
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool", "UINT8": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class TrtOptions:
    """Session options of TensorRT engines.

    Attributes:
        contexts: Requests that run at once, each with its own memory on the device.
        cuda_graphs: Whether calls of a shape that comes again are recorded and replayed as CUDA graphs.
        device_id: Number of the GPU.
        weight_streaming_budget: Bytes of weights that stay on the device, of an engine built to stream them; -1 for
            as many as TensorRT finds room for.
    """

    contexts: int = 2
    cuda_graphs: bool = True
    device_id: int = 0
    weight_streaming_budget: int = -1


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        name: Its name.
        dtype: Its dtype in the engine.
        ranges: For inputs: smallest and largest shape, per profile.
    """

    name: str
    dtype: np.dtype[Any]
    ranges: tuple[tuple[Shape, Shape], ...] = ()

    def covered(self, profile: int, shape: Shape) -> bool:
        """Tell whether a profile allows a shape."""
        low, high = self.ranges[profile]
        return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


class TrtEngine:
    """A deserialized engine and what is known of its tensors.

    Args:
        trt: The TensorRT module.
        engine: Its ``ICudaEngine``.
        cuda: The device.
        options: Session options.
        errors: What TensorRT's logger collects.
    """

    def __init__(self, trt: Any, engine: Any, cuda: Cuda, options: TrtOptions, errors: list[str]) -> None:
        self._trt = trt
        self._engine = engine
        self._errors = errors
        self.cuda = cuda
        self.options = options
        self.profiles = range(engine.num_optimization_profiles)
        self.inputs: list[EngineTensor] = []
        self.outputs: list[EngineTensor] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = self._dtype(name)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs.append(EngineTensor(name, dtype, tuple(self._ranges(name))))
            else:
                self.outputs.append(EngineTensor(name, dtype))

    def _dtype(self, name: str) -> np.dtype[Any]:
        """Return the dtype of a tensor that lies on the device as numpy would lay it out.

        Raises:
            SessionError: It is of another kind.
        """
        engine, dtype = self._engine, self._engine.get_tensor_dtype(name).name
        if engine.is_shape_inference_io(name) or engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise SessionError(f"its tensor '{name}' holds shapes and lies on the host, which is not supported.")
        if (form := engine.get_tensor_format(name).name) != "LINEAR":
            raise SessionError(f"its tensor '{name}' has the format {form}: build it with LINEAR inputs and outputs.")
        if dtype not in _DTYPES:
            raise SessionError(
                f"its tensor '{name}' is of type {dtype}, which no caller can pass: build it of a graph whose inputs "
                f"and outputs are {', '.join(_DTYPES)}."
            )
        return numpy_dtype(_DTYPES[dtype])

    def _ranges(self, name: str) -> Iterator[tuple[Shape, Shape]]:
        for profile in self.profiles:
            low, _, high = self._engine.get_tensor_profile_shape(name, profile)
            yield tuple(low), tuple(high)

    @property
    def records_itself(self) -> bool:
        """Whether the library records CUDA graphs by itself, as TensorRT-RTX does."""
        return hasattr(self._trt, "CudaGraphStrategy")

    @property
    def scratch(self) -> int:
        """Bytes of device memory that a context works in; contexts of which one runs at a time may share it."""
        return int(self._engine.device_memory_size_v2)

    def create_context(self, scratch: int) -> Any:
        """Return a new execution context.

        Args:
            scratch: Address of :attr:`scratch` bytes for it. TensorRT-RTX, which needs one context only, takes its own.

        Raises:
            SessionError: There is not enough memory for it.
        """
        if self.records_itself:
            settings = self._engine.create_runtime_config()
            if self.options.cuda_graphs:
                settings.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(settings)
        else:
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise SessionError(f"TensorRT made no execution context: {self.said() or 'most likely out of GPU memory'}.")
        if not self.records_itself and self.scratch:
            context.set_device_memory(scratch, self.scratch)
        return context

    def output_allocator(self) -> Any:
        """Return what gives memory to an output whose shape TensorRT only knows once it has computed it.

        Its ``address`` and ``shape`` are those of the last call; it is freed with ``release()``.
        """
        trt: Any = self._trt
        cuda = self.cuda

        class Allocator(trt.IOutputAllocator):
            def __init__(self) -> None:
                trt.IOutputAllocator.__init__(self)
                self.address, self.size, self.shape = 0, 0, ()

            def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
                del tensor_name, memory, alignment  # CUDA aligns to 256 bytes, more than any tensor needs
                if size > self.size or not self.size:  # TensorRT wants an address of nothing, too
                    self.release()
                    self.address, self.size = cuda.allocate(max(1, size)), max(1, size)
                return self.address

            def reallocate_output_async(
                self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
            ) -> int:
                del stream
                return self.reallocate_output(tensor_name, memory, size, alignment)

            def notify_shape(self, tensor_name: str, shape: Any) -> None:
                del tensor_name
                self.shape = tuple(shape)

            def release(self) -> None:
                size, self.size = self.size, 0
                if size:
                    cuda.free(self.address)

        return Allocator()

    def profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """Return the narrowest profile that covers these shapes.

        Raises:
            SessionError: None does; names the tensor and what the engine takes.
        """
        fitting = [
            profile
            for profile in self.profiles
            if all(tensor.covered(profile, shapes[tensor.name]) for tensor in self.inputs)
        ]
        if fitting:
            return min(fitting, key=lambda profile: sum(math.prod(t.ranges[profile][1]) for t in self.inputs))
        for tensor in self.inputs:
            shape = shapes[tensor.name]
            if not any(tensor.covered(profile, shape) for profile in self.profiles):
                taken = " or ".join(f"{low} to {high}" for low, high in tensor.ranges)
                raise SessionError(
                    f"no profile of the engine covers '{tensor.name}' of shape {shape}; it takes {taken}"
                )
        raise SessionError(f"no profile of the engine covers these shapes together: {dict(shapes)}")

    def facts(self) -> dict[str, Any]:
        """Return what only an opened engine tells: its tensors, profiles, memory and layers, as plain values."""
        said = self._engine.create_engine_inspector().get_engine_information(self._trt.LayerInformationFormat.JSON)
        return {
            "tensors": {tensor.name: str(tensor.dtype) for tensor in (*self.inputs, *self.outputs)},
            "profiles": [
                {tensor.name: [list(shape) for shape in tensor.ranges[profile]] for tensor in self.inputs}
                for profile in self.profiles
            ],
            "device_memory": self.scratch,
            "layers": layers_of(said),
        }

    def said(self) -> str:
        """Return TensorRT's errors since the last time, as one line."""
        lines, self._errors[:] = dict.fromkeys(" ".join(line.split()) for line in self._errors), []
        return "; ".join(lines)

    def close(self) -> None:
        """Let go of the engine."""
        self._engine = None


def layers_of(listing: str) -> list[dict[str, str]]:
    """Read the inspector's listing.

    Args:
        listing: Its JSON: layers as objects, or as bare names where the engine was built without details.

    Returns:
        Name, type, formats of the outputs and tactic of each layer; what the listing does not say is empty. Nothing
        where it cannot be read: no engine is refused for that.
    """
    try:
        layers = json.loads(listing)["Layers"]
    except (ValueError, KeyError, TypeError):
        return []
    return [_layer(layer) for layer in layers] if isinstance(layers, list) else []


def _layer(layer: Any) -> dict[str, str]:
    if not isinstance(layer, Mapping):
        return {"name": str(layer), "type": "", "outputs": "", "tactic": ""}
    outputs = [one for one in layer.get("Outputs") or [] if isinstance(one, Mapping)]
    formats = [f"{one.get('Format/Datatype', '')} {one.get('Dimensions', '')}".strip() for one in outputs]
    tactic = layer.get("TacticName") or layer.get("TacticValue") or ""
    return {
        "name": str(layer.get("Name", "")), "type": str(layer.get("LayerType", "")), "outputs": ", ".join(formats),
        "tactic": str(tactic),
    }  # fmt: skip


def open_engine(
    trt: Any, cuda: Cuda, root: Path, entry: str, record: EngineRecord | None, given: TrtOptions
) -> TrtEngine:
    """Deserialize an engine on the GPU.

    Args:
        trt: The TensorRT module.
        cuda: The device.
        root: A bundle's folder.
        entry: The plan in it.
        record: How it was built, where that is known.
        given: Session options.

    Raises:
        IntegrityError: The file is no plan.
        SessionError: It is another plan than recorded, or TensorRT does not open it.
    """
    plan = root / entry
    _check_header(plan, record)
    log = collecting_log(trt)
    runtime = trt.Runtime(log)
    if record is not None and brings_code(record):
        runtime.engine_host_code_allowed = host_code_allowed()
    for library in plugin_libraries():
        runtime.get_plugin_registry().load_library(str(library))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise SessionError(_joined(log) or "TensorRT does not say why.")
    if record is not None and record.weights:
        _refit(trt, engine, root / record.weights, log)
    if record is not None and "WEIGHT_STREAMING" in record.flags:
        budget = given.weight_streaming_budget
        engine.weight_streaming_budget_v2 = budget if budget >= 0 else engine.get_weight_streaming_automatic_budget()
    return TrtEngine(trt, engine, cuda, given, log.errors)


def _refit(trt: Any, engine: Any, graph: Path, log: Any) -> None:
    """Give an engine that was stored without its weights those of the graph it was built from."""
    refitter = trt.Refitter(engine, log)
    weights = trt.OnnxParserRefitter(refitter, log)
    if not (weights.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
        raise SessionError(
            f"its weights cannot be taken from '{graph.name}': {_joined(log) or 'TensorRT says no more'}."
        )


def brings_code(record: EngineRecord) -> bool:
    """Tell whether a plan holds a runtime of its own, that is program code.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html (version compatibility)
    """
    return "VERSION_COMPATIBLE" in record.flags and "EXCLUDE_LEAN_RUNTIME" not in record.flags


def host_code_allowed() -> bool:
    """Tell whether this host runs program code of plans."""
    return os.environ.get(HOST_CODE) == "1"


def plugin_libraries() -> list[Path]:
    """Return the libraries with plugins that this host allows."""
    return [Path(path) for path in os.environ.get(PLUGINS, "").split(os.pathsep) if path]


def _check_header(plan: Path, record: EngineRecord | None) -> None:
    with plan.open("rb") as file:
        header = PlanHeader.read(file.read(HEADER_SIZE), plan.name)
    if record is not None and (difference := record.contradicts(header)):
        raise SessionError(f"{plan.name} is another engine than recorded: {difference}.")


def collecting_log(trt: Any) -> Any:
    """Return a logger of TensorRT that keeps errors, in its list ``errors``, and prints nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _joined(log: Any) -> str:
    return "; ".join(dict.fromkeys(log.errors))
