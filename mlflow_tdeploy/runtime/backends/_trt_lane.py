"""One call at a time on a TensorRT engine: a lane with its stream, the memory of every tensor, and its CUDA graphs.

https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.tensors import Array, Arrays
from mlflow_tdeploy.runtime.backends._trt_engine import EngineTensor, Shape, TrtEngine

#: Shapes of all inputs, in the order of the engine.
Key = tuple[Shape, ...]
#: Returns the address of a tensor's memory.
Place = Callable[[EngineTensor, Shape], int]
#: Graphs that a lane keeps; each has a context of its own.
_MOST_GRAPHS = 16
#: Shapes that are counted, of which those with graphs come.
_MOST_SHAPES = 4096
#: Memory grows to the next power of two up to here, then by as much: new memory makes all graphs useless.
_LARGE = 64 * 2**20


@dataclass
class _Buffer:
    """Memory of one tensor, on the device and page-locked on the host; it grows and never shrinks."""

    size: int = 0
    device: int = 0
    host: int = 0
    view: Array = field(default_factory=lambda: np.empty(0, np.uint8))


@dataclass
class _Bound:
    """A context that knows the shapes and the memory of a call.

    Attributes:
        context: The execution context.
        outputs: Shape of each output; None where it depends on values.
        graph: The recorded call, if there is one.
    """

    context: Any
    outputs: dict[str, Shape | None]
    graph: Any = None


class TrtLane:
    """Runs one call at a time, with its own stream and its own memory for every tensor.

    A recorded graph holds on to the state of the context that it was recorded with, so each graph has a context of its
    own, and all of a lane's contexts work in the same memory: NVIDIA's advice,
    https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/optimization.html (CUDA graphs).
    """

    def __init__(self, engine: TrtEngine) -> None:
        self._engine = engine
        self._cuda = engine.cuda
        self._buffers: dict[str, _Buffer] = {}
        self._allocators: dict[str, Any] = {}
        self._recorded: dict[Key, _Bound] = {}
        self._calls: Counter[Key] = Counter()
        self._key: Key | None = None
        self._plain: _Bound | None = None
        self._scratch = 0
        with engine.cuda.chosen():  # a lane is made in whichever thread first needs it
            self._stream = engine.cuda.stream()
            try:
                if engine.scratch and not engine.records_itself:
                    self._scratch = engine.cuda.allocate(engine.scratch)
                self._plain = _Bound(engine.create_context(self._scratch), {})
            except BaseException:
                self.close()
                raise

    def run(self, feeds: Arrays, profile: int) -> Arrays:
        """Run one call on arrays of the host.

        Args:
            feeds: Arrays of the engine's dtypes.
            profile: The profile that covers their shapes.
        """
        with self._cuda.chosen():
            return self._run(feeds, profile)

    def _run(self, feeds: Arrays, profile: int) -> Arrays:
        key = tuple(feeds[tensor.name].shape for tensor in self._engine.inputs)
        bound = self._recorded.get(key)
        if bound is None or bound.graph is None:
            bound = self._bound_plain(key, profile)
        for tensor in self._engine.inputs:
            self._send(tensor, feeds[tensor.name])
        if bound.graph is not None:
            self._cuda.launch(bound.graph, self._stream)
        else:
            self._execute(bound)
        answers = self._fetch(bound)
        self._consider(key, profile, bound)
        return answers

    def run_tensors(self, feeds: Mapping[str, Any], profile: int, place: Place, producer: int) -> None:
        """Run one call on tensors that are on the device already; returns when it is done.

        Args:
            feeds: Shape and dtype as the engine wants them; read where ``place`` says.
            profile: The profile that covers their shapes.
            place: Returns where an input lies, and gives memory to an output.
            producer: The stream on which the inputs are computed.

        Raises:
            SessionError: The shape of an output depends on values.
        """
        with self._cuda.chosen():
            self._run_tensors(feeds, profile, place, producer)

    def _run_tensors(self, feeds: Mapping[str, Any], profile: int, place: Place, producer: int) -> None:
        assert self._plain is not None
        key = tuple(tuple(feeds[tensor.name].shape) for tensor in self._engine.inputs)
        self._key = None  # the next call on arrays finds other addresses
        bound = self._bind(self._plain.context, key, profile, place)
        if unknown := [name for name, shape in bound.outputs.items() if shape is None]:
            raise SessionError(f"the shape of '{unknown[0]}' depends on values: pass numpy arrays, not tensors.")
        self._cuda.follow(self._stream, producer)
        self._execute(bound)
        self._cuda.wait(self._stream)  # then the context is free for another call

    def _bound_plain(self, key: Key, profile: int) -> _Bound:
        """Return the context of calls that come as they come, ready for these shapes."""
        assert self._plain is not None
        if key != self._key:
            self._key = None
            self._plain = self._bind(self._plain.context, key, profile, self._room)
            self._key = key
        return self._plain

    def _bind(self, context: Any, key: Key, profile: int, place: Place) -> _Bound:
        """Tell a context the shapes of a call and where every tensor's memory is."""
        if context.active_optimization_profile != profile:
            self._need(context.set_optimization_profile_async(profile, self._stream), f"chose no profile {profile}")
            self._cuda.wait(self._stream)
        for tensor, shape in zip(self._engine.inputs, key, strict=True):
            self._need(context.set_input_shape(tensor.name, shape), f"refused the shape {shape} of '{tensor.name}'")
            self._address(context, tensor, place(tensor, shape))
        if unknown := context.infer_shapes():
            raise SessionError(
                f"TensorRT cannot tell the shape of '{unknown[0]}' before it runs, which is not supported."
            )
        outputs: dict[str, Shape | None] = {}
        for tensor in self._engine.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if any(size < 0 for size in shape):
                allocator = self._allocators.setdefault(tensor.name, self._engine.output_allocator())
                self._need(context.set_output_allocator(tensor.name, allocator), f"refused memory for '{tensor.name}'")
                outputs[tensor.name] = None
            else:
                self._address(context, tensor, place(tensor, shape))
                outputs[tensor.name] = shape
        return _Bound(context, outputs)

    def _address(self, context: Any, tensor: EngineTensor, address: int) -> None:
        self._need(context.set_tensor_address(tensor.name, address), f"refused memory for '{tensor.name}'")

    def _room(self, tensor: EngineTensor, shape: Shape) -> int:
        """Return a tensor's own memory on the device, at an address that stays while it is large enough."""
        return self._buffer(tensor.name, math.prod(shape) * tensor.dtype.itemsize).device

    def _buffer(self, name: str, size: int) -> _Buffer:
        buffer = self._buffers.setdefault(name, _Buffer())
        if buffer.size < size or not buffer.size:
            self._drop_graphs()  # they hold the old address
            self._release(buffer)
            room = _room_for(size)
            buffer.device = self._cuda.allocate(room)
            try:
                buffer.view, buffer.host = self._cuda.pinned(room)
            except BaseException:
                self._cuda.free(buffer.device)
                raise
            buffer.size = room
        return buffer

    def _send(self, tensor: EngineTensor, array: Array) -> None:
        buffer = self._buffers[tensor.name]
        size = array.nbytes
        np.copyto(buffer.view[:size].view(tensor.dtype).reshape(array.shape), array)
        self._cuda.to_device(buffer.device, buffer.host, size, self._stream)

    def _execute(self, bound: _Bound) -> None:
        self._need(bool(bound.context.execute_async_v3(self._stream)), "could not run the engine")

    def _fetch(self, bound: _Bound) -> Arrays:
        """Return the outputs of the call that is under way."""
        shapes = dict(bound.outputs)
        if None in shapes.values():  # what the call allocates is known when it has ended
            self._cuda.wait(self._stream)
        found: list[tuple[EngineTensor, _Buffer, Shape]] = []
        for tensor in self._engine.outputs:
            shape = shapes[tensor.name]
            if shape is None:
                allocator = self._allocators[tensor.name]
                shape, source = allocator.shape, allocator.address
                buffer = self._buffer(tensor.name, math.prod(shape) * tensor.dtype.itemsize)
            else:
                buffer = self._buffers[tensor.name]
                source = buffer.device
            size = math.prod(shape) * tensor.dtype.itemsize
            if size:
                self._cuda.to_host(buffer.host, source, size, self._stream)
            found.append((tensor, buffer, shape))
        self._cuda.wait(self._stream)
        return {
            tensor.name: buffer.view[: math.prod(shape) * tensor.dtype.itemsize]
            .view(tensor.dtype).reshape(shape).copy()
            for tensor, buffer, shape in found
        }  # fmt: skip

    def _consider(self, key: Key, profile: int, bound: _Bound) -> None:
        """Record the call as a graph if its shapes came before, for the next time."""
        if not self._engine.options.cuda_graphs or self._engine.records_itself or None in bound.outputs.values():
            return
        self._calls[key] += 1
        if len(self._calls) > _MOST_SHAPES:
            self._calls = Counter(dict(self._calls.most_common(_MOST_SHAPES // 2)))
        if self._calls[key] < 2 or key in self._recorded or not self._graph_room(key):
            return
        try:
            self._recorded[key] = self._record(key, profile)
        except Exception:  # such as no memory for one more context: the call itself went well
            self._recorded[key] = _Bound(None, {})  # not tried again

    def _record(self, key: Key, profile: int) -> _Bound:
        bound = self._bind(self._engine.create_context(self._scratch), key, profile, self._room)
        self._execute(bound)  # so that what TensorRT puts off is done before, which must not happen while recording
        self._cuda.wait(self._stream)
        bound.graph = self._cuda.capture(self._stream, lambda: bool(bound.context.execute_async_v3(self._stream)))
        if bound.graph is None:
            bound.context = None  # not tried again, and its memory is free
        return bound

    def _graph_room(self, key: Key) -> bool:
        """Give up the rarest shape's graph for one that comes twice as often: shapes in turn must not record anew."""
        if len(self._recorded) < _MOST_GRAPHS:
            return True
        rarest = min(self._recorded, key=self._calls.__getitem__)
        if self._calls[key] < 2 * self._calls[rarest]:
            return False
        self._free_graph(self._recorded.pop(rarest))
        return True

    def _drop_graphs(self) -> None:
        while self._recorded:
            self._free_graph(self._recorded.popitem()[1])
        self._calls.clear()

    def _free_graph(self, bound: _Bound) -> None:
        if bound.graph is not None:
            self._cuda.free_graph(bound.graph)
        bound.context = None

    def _release(self, buffer: _Buffer) -> None:
        size, buffer.size = buffer.size, 0
        if size:
            self._cuda.free(buffer.device)
            self._cuda.free_pinned(buffer.host)

    def _need(self, done: bool, what: str) -> None:
        if not done:
            raise SessionError(f"TensorRT {what}: {self._engine.said() or 'it did not say why'}.")

    def close(self) -> None:
        """Give everything back; what a broken device refuses to take is left, so that the rest is tried."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(SessionError):
                stack.enter_context(self._cuda.chosen())
            self._close()

    def _close(self) -> None:
        steps: list[Callable[[], None]] = [lambda: self._cuda.wait(self._stream)]  # a failed call may have work left
        steps += [self._drop_graphs]
        steps += [allocator.release for allocator in self._allocators.values()]
        steps += [lambda buffer=buffer: self._release(buffer) for buffer in self._buffers.values()]  # type: ignore[misc]
        for step in steps:
            with contextlib.suppress(SessionError):
                step()
        self._plain = None
        scratch, self._scratch = self._scratch, 0
        with contextlib.suppress(SessionError):
            if scratch:
                self._cuda.free(scratch)
        with contextlib.suppress(SessionError):
            self._cuda.free_stream(self._stream)


def _room_for(size: int) -> int:
    """Return how much memory to take for a tensor of so many bytes, so that the next larger one finds room."""
    return 1 << max(0, size - 1).bit_length() if size <= _LARGE else -(-size // _LARGE) * _LARGE
