"""ONNX Runtime's CUDA and TensorRT providers.

https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html and
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.core.errors import SessionError, first_line
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tensors import Arrays, At, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.backends._ort import (
    OrtOptions,
    OrtSession,
    Provider,
    open_graph,
    self_test,
    too_old,
)
from mlflow_tdeploy.runtime.base import RUNTIMES, Compat, Fit, Runtime, Session, TritonBackend
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.store.disk import own_folder
from mlflow_tdeploy.store.prune import ENGINES, used

#: What CUDA does not compute, and what it copies for.
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class OrtGpuOptions(OrtOptions):
    """ONNX Runtime's session options on a GPU.

    Attributes:
        device_id: Number of the GPU.
    """

    device_id: int = 0


@RUNTIMES.register("ort-cuda")
class OrtCuda(Runtime):
    """Opens portable ONNX graphs on an NVIDIA GPU."""

    name: ClassVar[str] = "ort-cuda"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx", "ort"})
    tier: ClassVar[int] = 0
    preference: ClassVar[int] = 25
    settings: ClassVar[type | None] = OrtGpuOptions
    triton: ClassVar[TritonBackend | None] = TritonBackend("onnxruntime", ".onnx")
    risky: ClassVar[bool] = True
    install: ClassVar[str] = "pip install 'mlflow-tdeploy[gpu]'"
    modules: ClassVar[Mapping[str, str]] = {"onnxruntime": "onnxruntime-gpu"}
    distributions: ClassVar[tuple[str, ...]] = ("onnxruntime-gpu",)
    #: What a session must use.
    provider: ClassVar[str] = "CUDAExecutionProvider"
    #: Where its outputs are while it runs.
    memory: ClassVar[str] = "cuda"

    def missing(self) -> str | None:
        """Return what is not installed, or None; ONNX Runtime's build for the CPU has the same module."""
        return super().missing() or (None if self.version() else f"onnxruntime-gpu is not installed ({self.install})")

    def probe(self, host: Fingerprint, variant: Variant) -> Compat:
        """Portable graphs run on every GPU; graphs fused for the CPU have operators that CUDA has not."""
        if host.gpu is None:
            return Compat(Fit.UNSUPPORTED, "no NVIDIA GPU on this host")
        if variant.device not in ("any", "cuda"):
            return Compat(Fit.UNSUPPORTED, f"made for {'the CPU' if variant.device == 'cpu' else variant.device}")
        found = self._fit(variant)
        return too_old(variant, self.version_on(host), found.fit) or found

    def _fit(self, variant: Variant) -> Compat:
        if variant.device == "cuda":
            return Compat(Fit.OPTIMAL, "fused for CUDA")
        if variant.precision.name == "fp16":
            return Compat(Fit.OPTIMAL, "half precision on the GPU's matrix units")
        return Compat(Fit.USABLE, "portable graph")

    def open(self, root: Path, variant: Variant, signature: Signature, options: SessionOptions) -> Session:
        """Open the graph on the GPU."""
        device = options.settings(OrtGpuOptions).device_id
        lacking = preload_libraries()
        session = open_graph(root, variant, options, self._providers(variant, signature, device), lacking)
        return OrtGpuSession(session, variant, signature, self.memory, device)

    def self_test(self) -> str:
        """Open and run a one-node graph on the GPU."""
        return self_test([(self.provider, {}), _CPU], preload_libraries())

    def _providers(self, variant: Variant, signature: Signature, device: int) -> list[Provider]:
        del variant, signature
        return [(self.provider, _cuda_options(device)), _CPU]


@RUNTIMES.register("ort-tensorrt")
class OrtTensorRt(OrtCuda):
    """Opens portable ONNX graphs through TensorRT, which builds engines when a graph is first opened."""

    name: ClassVar[str] = "ort-tensorrt"
    triton: ClassVar[TritonBackend | None] = (
        None  # there it is an accelerator of the other backend, with settings of its own
    )
    preference: ClassVar[int] = 20
    provider: ClassVar[str] = "TensorrtExecutionProvider"
    modules: ClassVar[Mapping[str, str]] = {"onnxruntime": "onnxruntime-gpu", "tensorrt": "tensorrt"}

    def _fit(self, variant: Variant) -> Compat:
        if variant.device == "cuda":
            return Compat(Fit.UNSUPPORTED, "fused for CUDA: TensorRT does not know its operators")
        return Compat(Fit.OPTIMAL if variant.precision.name == "fp16" else Fit.USABLE, "its engines are built here")

    def _providers(self, variant: Variant, signature: Signature, device: int) -> list[Provider]:
        # One folder for each content: ONNX Runtime names an engine by its graph, whatever the weights
        # (https://github.com/microsoft/onnxruntime/issues/6455).
        folder = own_folder(ENGINES) / (variant.digest or variant.id)
        folder.mkdir(parents=True, exist_ok=True)
        used(folder)
        settings: dict[str, Any] = {
            "device_id": device,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
            **{f"trt_profile_{at}_shapes": profile_shapes(signature, at) for at in ("min", "opt", "max")},
        }
        return [(self.provider, settings), ("CUDAExecutionProvider", _cuda_options(device)), _CPU]


@functools.cache
def preload_libraries() -> tuple[str, ...]:
    """Load the CUDA and cuDNN of NVIDIA's packages, which lie where no linker looks; those of the system else.

    Returns:
        What could not be loaded, a sentence each.
    """
    import onnxruntime as ort

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(Exception):  # it prints; the session has the last word
        ort.preload_dlls()
    return tuple(f"{line}." for line in said.getvalue().splitlines() if line.startswith("Failed to load"))


def _cuda_options(device: int) -> dict[str, Any]:
    """Return options of the CUDA provider; without TF32, which would make of fp32 what no CPU has verified."""
    return {"device_id": device, "use_tf32": 0}


def profile_shapes(signature: Signature, at: At) -> str:
    """Return the shape of every input at a corner of the signature: ``input_ids:1x16,attention_mask:1x16``."""
    dims = {dim.name: dim.at(at) for dim in signature.dims}
    shapes = {
        spec.name: "x".join(str(size if isinstance(size, int) else dims[size]) for size in spec.shape)
        for spec in signature.inputs
    }
    return ",".join(f"{name}:{shape}" for name, shape in shapes.items() if shape)


class OrtGpuSession(OrtSession):
    """A session whose outputs stay on the GPU until all are there; threads may share it, as each call has a binding."""

    def __init__(self, session: Any, variant: Variant, signature: Signature, memory: str, device: int) -> None:
        super().__init__(session, variant, signature)
        self._memory = memory
        self._device_id = device

    def _run(self, session: Any, feeds: Arrays) -> list[Any]:
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, self._memory, self._device_id)
        try:
            session.run_with_iobinding(binding)
            return list(binding.copy_outputs_to_cpu())
        except Exception as error:
            if "Failed to allocate memory" in str(error):
                raise SessionError(f"The GPU has no memory left for this request: {first_line(error)}") from error
            raise
