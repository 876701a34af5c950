"""Inference with an opened TensorRT engine: a pool of lanes for calls side by side."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.tensors import Arrays, Signature, numpy_dtype
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.backends._trt_engine import EngineTensor, Shape, TrtEngine
from mlflow_tdeploy.runtime.backends._trt_lane import TrtLane
from mlflow_tdeploy.runtime.base import Session


class TrtSession(Session):
    """An engine behind a pool of lanes. A call waits for a free one; one that failed is not used again."""

    def __init__(self, engine: TrtEngine, variant: Variant, signature: Signature) -> None:
        self._engine = engine
        self._variant = variant
        self._dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in signature.outputs}
        known = {tensor.name for tensor in engine.outputs}
        if lacking := [spec.name for spec in signature.outputs if spec.name not in known]:
            raise SessionError(
                f"Variant '{variant.id}' has no output '{lacking[0]}'; it has {', '.join(sorted(known))}."
            )
        self._free: queue.SimpleQueue[TrtLane | None] = queue.SimpleQueue()
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
        with self._failing():
            cast = {tensor.name: feeds[tensor.name].astype(tensor.dtype, copy=False) for tensor in self._engine.inputs}
            profile = self._engine.profile_for({name: array.shape for name, array in cast.items()})
            with self._lane() as lane:
                outputs = lane.run(cast, profile)
        return {name: outputs[name].astype(dtype, copy=False) for name, dtype in self._dtypes.items()}

    def infer_tensors(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the engine on torch tensors where they are, if they are on its device; without a copy if dtypes agree."""
        torch = sys.modules["torch"]
        if any(str(tensor.device) != self.device for tensor in feeds.values()):
            return super().infer_tensors(feeds)
        device = next(iter(feeds.values())).device
        cast = {t.name: feeds[t.name].to(_torch_dtype(torch, t.dtype)).contiguous() for t in self._engine.inputs}
        outputs: dict[str, Any] = {}

        def place(tensor: EngineTensor, shape: Shape) -> int:
            if tensor.name in cast:
                return int(cast[tensor.name].data_ptr())
            outputs[tensor.name] = torch.empty(shape, dtype=_torch_dtype(torch, tensor.dtype), device=device)
            return int(outputs[tensor.name].data_ptr())

        with self._failing():
            profile = self._engine.profile_for({name: tuple(tensor.shape) for name, tensor in cast.items()})
            with self._lane() as lane:
                lane.run_tensors(cast, profile, place, int(torch.cuda.current_stream(device).cuda_stream))
        return {name: outputs[name].to(_torch_dtype(torch, dtype)) for name, dtype in self._dtypes.items()}

    def facts(self) -> Mapping[str, Any]:
        """Return what the opened engine tells about itself."""
        return self._engine.facts()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library's own errors too: the next candidate shall be tried
            told = str(error) if isinstance(error, SessionError) else f"{type(error).__name__}: {error}"
            raise SessionError(f"TensorRT failed in variant '{self._variant.id}': {told}") from error

    @contextmanager
    def _lane(self) -> Iterator[TrtLane]:
        lane = self._free.get()
        try:
            if self._closed:
                raise SessionError("the session is closed.")
            lane = lane or TrtLane(self._engine)
            yield lane
        except BaseException:
            broken, lane = lane, None
            if broken is not None:
                broken.close()
            raise
        finally:
            self._free.put(lane)

    def close(self) -> None:
        """Free lanes and engine; a run in progress ends first."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        lanes = [self._free.get() for _ in range(max(1, self._engine.options.contexts))]
        for lane in lanes:
            if lane is not None:
                lane.close()
            self._free.put(None)  # whoever waits learns that it is closed
        self._engine.close()


def _torch_dtype(torch: Any, dtype: np.dtype[Any]) -> Any:
    return getattr(torch, dtype.name)
