"""Inference with an opened TensorRT engine: a pool of contexts, each with its own stream and buffers.

https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html
"""

from __future__ import annotations

import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.tensors import Array, Arrays, Signature, numpy_dtype
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.backends._cuda import Cuda
from mlflow_tdeploy.runtime.base import Session

Shape = tuple[int, ...]
#: Shapes of all inputs, in the order of the engine.
Key = tuple[Shape, ...]
#: Graphs that a context keeps; each holds some memory on the device.
_MOST_GRAPHS = 16


@dataclass(frozen=True)
class TrtOptions:
    """Session options of TensorRT engines.

    Attributes:
        contexts: Requests that run at once, each with its own memory on the device.
        cuda_graphs: Whether calls of a shape that comes again are recorded and replayed as CUDA graphs.
        device_id: Number of the GPU.
    """

    contexts: int = 2
    cuda_graphs: bool = True
    device_id: int = 0


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


@dataclass
class _Buffer:
    """Memory of one tensor, on the device and page-locked on the host; it grows and never shrinks."""

    size: int = 0
    device: int = 0
    host: int = 0
    view: Array = field(default_factory=lambda: np.empty(0, np.uint8))


class TrtContext:
    """One execution context with its stream and buffers; for one call at a time."""

    def __init__(self, engine: TrtEngine) -> None:
        self._engine = engine
        self._cuda = engine.cuda
        self._context = engine.create_context()
        self._stream = engine.cuda.stream()
        self._buffers: dict[str, _Buffer] = {}
        self._graphs: OrderedDict[Key, Any] = OrderedDict()
        self._seen: set[Key] = set()
        self._key: Key | None = None
        self._outputs: dict[str, Shape] = {}

    def run(self, feeds: Arrays, profile: int) -> Arrays:
        """Run one call.

        Args:
            feeds: Arrays of the engine's dtypes.
            profile: The profile that covers their shapes.
        """
        cuda, key = self._cuda, tuple(feeds[tensor.name].shape for tensor in self._engine.inputs)
        cuda.activate()
        self._shape(key, profile)
        for tensor in self._engine.inputs:
            self._send(tensor, feeds[tensor.name])
        self._execute(key)
        sizes = {}
        for tensor in self._engine.outputs:
            shape = self._outputs[tensor.name]
            sizes[tensor.name] = math.prod(shape) * tensor.dtype.itemsize
            buffer = self._buffers[tensor.name]
            cuda.to_host(buffer.host, buffer.device, sizes[tensor.name], self._stream)
        cuda.wait(self._stream)
        return {
            tensor.name: self._buffers[tensor.name].view[: sizes[tensor.name]].view(tensor.dtype)
            .reshape(self._outputs[tensor.name]).copy()
            for tensor in self._engine.outputs
        }  # fmt: skip

    def _shape(self, key: Key, profile: int) -> None:
        """Tell the context the shapes of a call and give every tensor its memory."""
        if key == self._key:
            return
        self._key = None
        context = self._context
        if context.active_optimization_profile != profile:
            self._need(context.set_optimization_profile_async(profile, self._stream), f"chose no profile {profile}")
            self._cuda.wait(self._stream)
        for tensor, shape in zip(self._engine.inputs, key, strict=True):
            self._need(context.set_input_shape(tensor.name, shape), f"refused the shape {shape} of '{tensor.name}'")
            self._room(tensor, shape)
        if unknown := context.infer_shapes():
            raise SessionError(
                f"TensorRT cannot tell the shape of '{unknown[0]}' before it runs, which is not supported."
            )
        for tensor in self._engine.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if any(size < 0 for size in shape):
                raise SessionError(f"The shape {shape} of the output '{tensor.name}' depends on values: not supported.")
            self._room(tensor, shape)
            self._outputs[tensor.name] = shape
        self._key = key

    def _room(self, tensor: EngineTensor, shape: Shape) -> None:
        """Have memory for a tensor, at an address that stays while it is large enough."""
        size = max(1, math.prod(shape) * tensor.dtype.itemsize)
        buffer = self._buffers.setdefault(tensor.name, _Buffer())
        if buffer.size < size:
            self._drop_graphs()  # they hold the old address
            self._release(buffer)
            buffer.device = self._cuda.allocate(size)
            buffer.view, buffer.host = self._cuda.pinned(size)
            buffer.size = size
        self._need(self._context.set_tensor_address(tensor.name, buffer.device), f"refused memory for '{tensor.name}'")

    def _send(self, tensor: EngineTensor, array: Array) -> None:
        buffer = self._buffers[tensor.name]
        size = array.nbytes
        np.copyto(buffer.view[:size].view(tensor.dtype).reshape(array.shape), array)
        self._cuda.to_device(buffer.device, buffer.host, size, self._stream)

    def _execute(self, key: Key) -> None:
        graph = self._graph(key)
        if graph is not None:
            self._cuda.launch(graph, self._stream)
        else:
            self._need(self._enqueue(), "could not run the engine")

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._stream))

    def _graph(self, key: Key) -> Any:
        """Return the recorded graph of a shape; recorded when a shape comes again.

        The first call of a shape lets TensorRT allocate what it needs, which must not happen while recording.
        """
        if not self._engine.options.cuda_graphs:
            return None
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key not in self._seen:
            self._seen.add(key)
            return None
        graph = self._cuda.capture(self._stream, self._enqueue)
        if len(self._graphs) >= _MOST_GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            self._free_graph(oldest)
        self._graphs[key] = graph  # None: cannot be recorded, and is not tried again
        return graph

    def _drop_graphs(self) -> None:
        while self._graphs:
            self._free_graph(self._graphs.popitem()[1])
        self._seen.clear()

    def _free_graph(self, graph: Any) -> None:
        if graph is not None:
            self._cuda.free_graph(graph)

    def _release(self, buffer: _Buffer) -> None:
        size, buffer.size = buffer.size, 0
        if size:
            self._cuda.free(buffer.device)
            self._cuda.free_pinned(buffer.host)

    def _need(self, done: bool, what: str) -> None:
        if not done:
            raise SessionError(f"TensorRT {what}: {self._engine.said() or 'it did not say why'}.")

    def close(self) -> None:
        """Give everything back."""
        self._cuda.activate()
        self._drop_graphs()
        for buffer in self._buffers.values():
            self._release(buffer)
        self._context = None
        self._cuda.free_stream(self._stream)


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
        self._engine = engine
        self._errors = errors
        self.cuda = cuda
        self.options = options
        self.profiles = range(engine.num_optimization_profiles)
        self.inputs: list[EngineTensor] = []
        self.outputs: list[EngineTensor] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = numpy_dtype(_DTYPES[engine.get_tensor_dtype(name).name])
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs.append(EngineTensor(name, dtype, tuple(self._ranges(name))))
            else:
                self.outputs.append(EngineTensor(name, dtype))

    def _ranges(self, name: str) -> Iterator[tuple[Shape, Shape]]:
        for profile in self.profiles:
            low, _, high = self._engine.get_tensor_profile_shape(name, profile)
            yield tuple(low), tuple(high)

    def create_context(self) -> Any:
        """Return a new execution context.

        Raises:
            SessionError: There is not enough memory for it.
        """
        context = self._engine.create_execution_context()
        if context is None:
            raise SessionError(f"TensorRT made no execution context: {self.said() or 'most likely out of GPU memory'}.")
        return context

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

    def said(self) -> str:
        """Return TensorRT's errors since the last time, as one line."""
        lines, self._errors[:] = dict.fromkeys(" ".join(line.split()) for line in self._errors), []
        return "; ".join(lines)

    def close(self) -> None:
        """Let go of the engine."""
        self._engine = None


#: TensorRT's names of dtypes in ours.
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool", "UINT8": "uint8",
}  # fmt: skip


class TrtSession(Session):
    """An engine behind a pool of contexts. A call waits for a free one; one that failed is not used again."""

    def __init__(self, engine: TrtEngine, variant: Variant, signature: Signature) -> None:
        self._engine = engine
        self._variant = variant
        self._dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in signature.outputs}
        known = {tensor.name for tensor in engine.outputs}
        if lacking := [spec.name for spec in signature.outputs if spec.name not in known]:
            raise SessionError(
                f"Variant '{variant.id}' has no output '{lacking[0]}'; it has {', '.join(sorted(known))}."
            )
        self._free: queue.SimpleQueue[TrtContext | None] = queue.SimpleQueue()
        for _ in range(max(1, engine.options.contexts)):
            self._free.put(None)  # made when it is first needed
        self._lock = threading.Lock()
        self._closed = False

    @property
    def device(self) -> str:
        """The GPU's number."""
        return f"cuda:{self._engine.options.device_id}"

    def infer(self, feeds: Arrays) -> Arrays:
        """Run the engine."""
        try:
            cast = {tensor.name: feeds[tensor.name].astype(tensor.dtype, copy=False) for tensor in self._engine.inputs}
            profile = self._engine.profile_for({name: array.shape for name, array in cast.items()})
            with self._context() as context:
                outputs = context.run(cast, profile)
        except SessionError as error:
            raise SessionError(f"TensorRT failed in variant '{self._variant.id}': {error}") from error
        return {name: outputs[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()}

    @contextmanager
    def _context(self) -> Iterator[TrtContext]:
        context = self._free.get()
        try:
            if self._closed:
                raise SessionError("the session is closed.")
            context = context or TrtContext(self._engine)
            yield context
        except BaseException:
            broken, context = context, None
            if broken is not None:
                broken.close()
            raise
        finally:
            self._free.put(context)

    def close(self) -> None:
        """Free contexts and engine; a run in progress ends first."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        contexts = [self._free.get() for _ in range(max(1, self._engine.options.contexts))]
        for context in contexts:
            if context is not None:
                context.close()
            self._free.put(None)  # whoever waits learns that it is closed
        self._engine.close()
