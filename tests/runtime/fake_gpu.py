"""A FAKE of TensorRT's inference API and of CUDA's runtime API, on the host's memory: no evidence of anything on a GPU.

It is strict where the real ones would crash or answer wrongly: memory that was freed or is too small, tensors without
an address, shapes outside the active profile, allocation while a graph is recorded, one context in two calls at once,
a context that was changed after a graph was recorded with it, two contexts at work in one scratch memory.
"""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import numpy as np

ITEM = {"FLOAT": 4, "HALF": 2, "INT64": 8}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class FakeCuda:
    """Stands for ``cuda.bindings.runtime``; every function returns (error, values …)."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, memory: int = 1 << 20) -> None:
        self.memory = memory
        self.blocks: dict[int, ctypes.Array] = {}
        self.host: dict[int, ctypes.Array] = {}
        self.streams: set[int] = set()
        self.recording: dict[int, list] = {}
        self.graphs: dict[int, list] = {}
        self.launched = self.instantiated = 0
        self.waits: list[tuple[int, int]] = []
        self.events: dict[int, int | None] = {}
        self.failing: set[str] = set()
        self.thread = threading.local()
        self._count = 0
        self.last = 0
        self.used_devices: set[int] = set()
        self.occupied: set[int] = set()
        self.queued: dict[int, list] = {}

    def _ok(self, *values):
        return (SimpleNamespace(value=0), *values)

    def _error(self, code, *values):
        self.last = code
        return (SimpleNamespace(value=code), *values)

    def _next(self) -> int:
        self._count += 1
        return self._count

    @property
    def used(self) -> int:
        return sum(len(block) for block in self.blocks.values())

    def held(self, address: int) -> memoryview:
        assert address in self.blocks, "memory that is not, or no longer, allocated"
        return memoryview(self.blocks[address]).cast("B")

    def cudaGetDevice(self):
        return self._ok(getattr(self.thread, "device", 0))

    def cuDevicePrimaryCtxGetState(self, device):
        return self._ok(0, device in self.used_devices)

    def cudaGetLastError(self):
        self.last = 0
        return self._ok()

    def cudaSetDevice(self, device):
        if device in self.occupied:
            return self._error(46)
        self.thread.device = device
        self.used_devices.add(device)
        return self._ok() if device in (0, 1) else self._error(101)

    def _chosen(self):
        assert getattr(self.thread, "device", None) == 0, "this thread has chosen no device: it would be the first one"

    def cudaRuntimeGetVersion(self):
        return self._ok(12090)

    def cudaMemGetInfo(self):
        return self._ok((self.memory - self.used), self.memory)

    def cudaMalloc(self, size):
        self._chosen()
        assert not self.recording, "memory is not to be allocated while a graph is recorded"
        if self.used + size > self.memory:
            return self._error(2, None)
        block = (ctypes.c_uint8 * size)()
        self.blocks[ctypes.addressof(block)] = block
        return self._ok(ctypes.addressof(block))

    def _idle(self):
        assert not self.queued, "work is under way that may use it"

    def cudaFree(self, address):
        self._idle()
        del self.blocks[address]
        return self._ok()

    def cudaHostAlloc(self, size, flags):
        block = (ctypes.c_uint8 * size)()
        self.host[ctypes.addressof(block)] = block
        return self._ok(ctypes.addressof(block))

    def cudaFreeHost(self, address):
        self._idle()
        del self.host[address]
        return self._ok()

    def cudaStreamCreateWithFlags(self, flags):
        self._chosen()
        self.streams.add(stream := self._next())
        return self._ok(stream)

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return self._ok()

    def cudaStreamSynchronize(self, stream):
        assert stream in self.streams
        for work in self.queued.pop(stream, []):
            work()
        return self._error(700) if "cudaStreamSynchronize" in self.failing else self._ok()

    def later(self, stream, work) -> None:
        """Let work be done when somebody waits for the stream, and not before."""
        self.queued.setdefault(stream, []).append(work)

    def adopt(self, address: int, size: int) -> None:
        """Let memory of somebody else count as the device's."""
        self.blocks[address] = (ctypes.c_uint8 * size).from_address(address)

    def cudaEventCreateWithFlags(self, flags):
        self.events[event := self._next()] = None
        return self._ok(event)

    def cudaEventRecord(self, event, stream):
        self.events[event] = stream
        return self._ok()

    def cudaStreamWaitEvent(self, stream, event, flags):
        assert stream in self.streams
        self.waits.append((stream, self.events[event]))
        return self._ok()

    def cudaEventDestroy(self, event):
        del self.events[event]
        return self._ok()

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert stream in self.streams
        device, host = (target, source) if kind == 1 else (source, target)
        assert size <= len(self.held(device)), "more bytes than the device's block has"
        assert size <= len(self.host[host]), "more bytes than the host's block has"
        self.later(stream, lambda: ctypes.memmove(target, source, size))
        return self._ok()

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording[stream] = []
        return self._ok()

    def cudaStreamEndCapture(self, stream):
        graph = self._next()
        self.graphs[graph] = self.recording.pop(stream)
        return self._ok(graph)

    def cudaGraphInstantiate(self, graph, flags):
        if "cudaGraphInstantiate" in self.failing:
            return self._error(2, None)
        self.instantiated += 1
        ready = self._next()
        self.graphs[ready] = self.graphs[graph]
        return self._ok(ready)

    def cudaGraphLaunch(self, graph, stream):
        self.launched += 1
        for work in self.graphs[graph]:
            self.later(stream, work)
        return self._ok()

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return self._ok()

    def cudaGraphExecDestroy(self, graph):
        del self.graphs[graph]
        return self._ok()

    def cudaGetErrorString(self, error):
        return self._ok(b"an illegal memory access was encountered" if error.value == 700 else b"failed")


class Allocator:
    """Stands for ``IOutputAllocator``."""


TRT = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"), TensorLocation=SimpleNamespace(DEVICE="device"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
    LayerInformationFormat=SimpleNamespace(JSON="json"),
    IOutputAllocator=Allocator, __name__="tensorrt", __version__="10.16.1.11",
)  # fmt: skip
#: What NVIDIA's inspector said of a small engine, shortened.
LISTING = """{"Layers": [{"Name": "/MatMul", "LayerType": "gemm", "Inputs": [], "Outputs": [
    {"Name": "y", "Location": "Device", "Dimensions": [8, 2], "Format/Datatype": "Row major linear FP16 format"}],
    "TacticName": "sm80_gemm", "TacticValue": "0x1"}, {"Name": "cast", "LayerType": "Reformat"}], "Bindings": []}"""
SCRATCH = 64


class FakeEngine:
    """y = x @ weights, with float profiles of x; with ``keeps``, only the rows whose first value is not negative."""

    device_memory_size_v2 = SCRATCH
    location, format = "device", "LINEAR"

    def __init__(self, cuda: FakeCuda, weights, profiles, dtype: str = "FLOAT", *, keeps: bool = False) -> None:
        self.cuda, self.weights, self.profiles, self.dtype, self.keeps = cuda, weights, profiles, dtype, keeps
        self.num_io_tensors, self.num_optimization_profiles = 2, len(profiles)
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index):
        return ("x", "y")[index]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.dtype)

    def get_tensor_location(self, name):
        return self.location

    def get_tensor_format(self, name):
        return SimpleNamespace(name=self.format)

    def is_shape_inference_io(self, name):
        return self.location == "host"

    def get_tensor_mode(self, name):
        return "in" if name == "x" else "out"

    def get_tensor_profile_shape(self, name, profile):
        return self.profiles[profile]

    def create_execution_context(self, strategy):
        assert strategy == "user"
        self.contexts.append(context := FakeContext(self))
        return context

    def create_engine_inspector(self):
        return SimpleNamespace(get_engine_information=lambda form: LISTING if form == "json" else "")


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self.shape = None
        self.scratch = 0
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Allocator] = {}
        self.busy = threading.Lock()
        self.used_profiles: list[int] = []
        self.fails = False
        self.recorded = self.ran = self.switching = False

    def _change(self):
        assert not self.switching, "the profile is still being changed: wait for the stream"
        assert not self.recorded, "a context is not to be changed after a graph was recorded with it"

    def set_device_memory(self, address, size):
        assert size >= SCRATCH
        self.engine.cuda.held(address)
        self.scratch = address

    def set_optimization_profile_async(self, profile, stream):
        self._change()
        assert stream in self.engine.cuda.streams
        self.active_optimization_profile, self.shape, self.switching = profile, None, True
        self.engine.cuda.later(stream, self._switched)
        return profile < len(self.engine.profiles)

    def _switched(self):
        self.switching = False

    def set_input_shape(self, name, shape):
        self._change()
        low, _, high = self.engine.profiles[self.active_optimization_profile]
        self.shape = tuple(shape)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def infer_shapes(self):
        return [] if self.shape is not None else ["x"]

    def get_tensor_shape(self, name):
        return self.shape if name == "x" else (-1 if self.engine.keeps else self.shape[0], self.engine.weights.shape[1])

    def set_tensor_address(self, name, address):
        self._change()
        self.engine.cuda.held(address)
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name, allocator):
        assert self.engine.keeps
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream):
        assert self.busy.acquire(blocking=False), "one context for two calls at once"
        try:
            if self.fails:
                return False
            assert set(self.addresses) | set(self.allocators) == {"x", "y"}
            self.engine.cuda.held(self.scratch)
            shape, addresses = self.shape, dict(self.addresses)
            self.used_profiles.append(self.active_optimization_profile)

            def work():
                kind = NUMPY[self.engine.dtype]
                size = int(np.prod(shape)) * ITEM[self.engine.dtype]
                self.engine.cuda.held(self.scratch)
                x = np.frombuffer(self.engine.cuda.held(addresses["x"])[:size], kind).reshape(shape)
                y = (x @ self.engine.weights.astype(kind)).astype(kind)
                target = addresses.get("y")
                if self.engine.keeps:
                    y, allocator = y[x[:, 0] >= 0], self.allocators["y"]
                    target = allocator.reallocate_output_async("y", 0, max(1, y.nbytes), 256, stream)
                    allocator.notify_shape("y", y.shape)
                self.engine.cuda.held(target)[: y.nbytes] = y.tobytes()

            recording = self.engine.cuda.recording.get(stream)
            if recording is None:
                self.ran = True
                self.engine.cuda.later(stream, work)
            else:
                assert self.ran, "what TensorRT puts off to the first run must not happen while recording"
                self.recorded = True
                recording.append(work)
            return True
        finally:
            self.busy.release()
