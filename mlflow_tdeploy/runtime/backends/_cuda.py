"""Device memory, streams and graphs of CUDA's runtime API, with errors as exceptions.

https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/runtime.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import MissingDependencyError, SessionError
from mlflow_tdeploy.core.tensors import Array

INSTALL = "pip install 'mlflow-tdeploy[tensorrt]'"


class Cuda:
    """CUDA's runtime API on one device.

    Args:
        runtime: The module ``cuda.bindings.runtime``.
        driver: The module ``cuda.bindings.driver``.
        device: Number of the device.
    """

    def __init__(self, runtime: Any, driver: Any, device: int = 0) -> None:
        self._api = runtime
        self._driver = driver
        self._device = device
        self.activate()

    @classmethod
    def load(cls, device: int = 0) -> Cuda:
        """Use the package cuda-bindings.

        Raises:
            MissingDependencyError: It is not installed.
            SessionError: There is no usable device.
        """
        try:
            from cuda.bindings import driver, runtime
        except ImportError as error:
            raise MissingDependencyError("cuda-bindings", "Running TensorRT engines", INSTALL) from error
        return cls(runtime, driver, device)

    def activate(self) -> None:
        """Make the device this thread's own: CUDA keeps one per thread."""
        self._call(self._api.cudaSetDevice, self._device)

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Use the device in this thread for a while; the caller, who may use another one, finds his own again.

        Where nobody in this process uses that one it is only what every thread begins with, and choosing it would take
        memory there, or fail where another process has it for itself:
        https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__DEVICE.html (cudaSetDevice).
        """
        before = self._call(self._api.cudaGetDevice)
        self.activate()
        try:
            yield
        finally:
            if before != self._device and self._in_use(before):
                with suppress(SessionError):  # the answer, or the error on its way, counts for more
                    self._call(self._api.cudaSetDevice, before)

    def _in_use(self, device: int) -> bool:
        code, _, active = self._driver.cuDevicePrimaryCtxGetState(device)
        return not code.value and bool(active)

    def version(self) -> str:
        """Return the CUDA version of the library, for example ``12.9``."""
        number = self._call(self._api.cudaRuntimeGetVersion)
        return f"{number // 1000}.{number % 1000 // 10}"

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes of device memory.

        Raises:
            SessionError: There is not enough; the message says how much is free.
        """
        code, address = self._api.cudaMalloc(size)
        if code.value == 2:  # cudaErrorMemoryAllocation
            self._api.cudaGetLastError()  # else whoever asks next takes it for an error of his own
            free, total = self._call(self._api.cudaMemGetInfo)
            raise SessionError(
                f"out of GPU memory: {size / 2**20:.0f} MiB wanted, {free / 2**20:.0f} of {total / 2**20:.0f} MiB "
                f"free. Use smaller batches or fewer contexts."
            )
        self._check("cudaMalloc", code)
        return int(address)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call(self._api.cudaFree, address)

    def pinned(self, size: int) -> tuple[Array, int]:
        """Return ``size`` bytes of page-locked host memory, as an array and by address: copies from it overlap."""
        address = int(self._call(self._api.cudaHostAlloc, size, 0))
        block = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(block), address

    def free_pinned(self, address: int) -> None:
        """Give page-locked memory back."""
        self._call(self._api.cudaFreeHost, address)

    def stream(self) -> int:
        """Return a new stream that does not wait for the default one."""
        return int(self._call(self._api.cudaStreamCreateWithFlags, 1))  # cudaStreamNonBlocking

    def free_stream(self, stream: int) -> None:
        """Destroy a stream once its work is done."""
        self._call(self._api.cudaStreamDestroy, stream)

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Copy bytes to the device, in the order of the stream."""
        self._call(
            self._api.cudaMemcpyAsync, device, host, size, self._api.cudaMemcpyKind.cudaMemcpyHostToDevice, stream
        )

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Copy bytes from the device, in the order of the stream."""
        self._call(
            self._api.cudaMemcpyAsync, host, device, size, self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream
        )

    def wait(self, stream: int) -> None:
        """Wait until all work of a stream is done.

        Raises:
            SessionError: Some of it failed.
        """
        self._call(self._api.cudaStreamSynchronize, stream)

    def follow(self, stream: int, other: int) -> None:
        """Let a stream go on only when what another one has to do by now is done; the host does not wait."""
        event = self._call(self._api.cudaEventCreateWithFlags, 2)  # cudaEventDisableTiming
        try:
            self._call(self._api.cudaEventRecord, event, other)
            self._call(self._api.cudaStreamWaitEvent, stream, event, 0)
        finally:
            self._call(self._api.cudaEventDestroy, event)

    def capture(self, stream: int, work: Callable[[], bool]) -> Any:
        """Record what ``work`` puts on a stream as a graph, without running it.

        Returns:
            The graph, for :meth:`launch`; None where the work cannot be recorded.
        """
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._api.cudaStreamBeginCapture, stream, mode)
        done, graph = False, None
        try:
            done = work()
        finally:  # the stream must not stay in that mode, and nothing of a failure be left to whoever asks next
            code, graph = self._api.cudaStreamEndCapture(stream)
            if code.value:
                self._api.cudaGetLastError()
            elif not done:
                self._call(self._api.cudaGraphDestroy, graph)
        return self._ready(graph) if done and not code.value else None

    def _ready(self, graph: Any) -> Any:
        """Return a recorded graph made ready, or None; the record itself is given back."""
        try:
            code, ready = self._api.cudaGraphInstantiate(graph, 0)
            if code.value:
                self._api.cudaGetLastError()
            return None if code.value else ready
        finally:
            self._call(self._api.cudaGraphDestroy, graph)

    def launch(self, graph: Any, stream: int) -> None:
        """Run a graph."""
        self._call(self._api.cudaGraphLaunch, graph, stream)

    def free_graph(self, graph: Any) -> None:
        """Give a graph back."""
        self._call(self._api.cudaGraphExecDestroy, graph)

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        code, *values = function(*arguments)
        self._check(getattr(function, "__name__", "CUDA"), code)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, name: str, code: Any) -> None:
        if code.value:
            self._api.cudaGetLastError()
            _, text = self._api.cudaGetErrorString(code)
            said = text.decode() if isinstance(text, bytes) else str(text)
            raise SessionError(f"{name} failed with CUDA error {code.value}: {said}.")
