"""TensorRT and TensorRT-RTX: one runtime each, which differ in the module and in which engines fit."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mlflow_tdeploy.core.errors import SessionError, TDeployError
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.backends._cuda import Cuda
from mlflow_tdeploy.runtime.backends._trt_engine import (
    HOST_CODE,
    PLUGINS,
    TrtOptions,
    brings_code,
    host_code_allowed,
    open_engine,
    plugin_libraries,
)
from mlflow_tdeploy.runtime.backends._trt_session import TrtSession
from mlflow_tdeploy.runtime.base import RUNTIMES, Compat, Fit, Runtime, Session, TritonBackend
from mlflow_tdeploy.runtime.engine_fit import EngineHost, engine_fit
from mlflow_tdeploy.runtime.options import SessionOptions


@RUNTIMES.register("tensorrt")
class TensorRt(Runtime):
    """Opens engines of TensorRT 10 and 11."""

    name: ClassVar[str] = "tensorrt"
    formats: ClassVar[frozenset[str]] = frozenset({"trt"})
    tier: ClassVar[int] = 0
    preference: ClassVar[int] = 10
    settings: ClassVar[type | None] = TrtOptions
    triton: ClassVar[TritonBackend | None] = TritonBackend("tensorrt", ".plan")
    risky: ClassVar[bool] = True
    install: ClassVar[str] = "pip install 'mlflow-tdeploy[tensorrt]'"
    #: The Python module.
    module: ClassVar[str] = "tensorrt"
    modules: ClassVar[Mapping[str, str]] = {"tensorrt": "tensorrt", "cuda": "cuda-bindings"}
    distributions: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-lean")

    def probe(self, host: Fingerprint, variant: Variant) -> Compat:
        """Decide from the record of how the engine was built; neither the plan nor the GPU is touched."""
        if variant.format not in self.formats:
            return Compat(Fit.UNSUPPORTED, f"opens the format trt, not {variant.format}")
        if variant.engine is None:
            return Compat(Fit.UNSUPPORTED, "nothing is recorded of how the engine was built")
        if lacking := set(variant.engine.plugins) - {path.name for path in plugin_libraries()}:
            return Compat(Fit.UNSUPPORTED, f"needs the plugins of {min(lacking)}: set {PLUGINS} to its path")
        if brings_code(variant.engine) and not host_code_allowed():
            return Compat(
                Fit.UNSUPPORTED,
                f"the plan brings program code (VERSION_COMPATIBLE): set {HOST_CODE}=1 where it is trusted, or build "
                f"it with EXCLUDE_LEAN_RUNTIME",
            )
        return engine_fit(variant.engine, EngineHost(host.os, host.gpu, self.module, self.version_on(host)))

    def open(self, root: Path, variant: Variant, signature: Signature, options: SessionOptions) -> Session:
        """Deserialize the engine on the GPU. A process without a device must not come here: TensorRT may crash."""
        given = options.settings(TrtOptions)
        try:
            cuda = Cuda.load(given.device_id)
            trt = importlib.import_module(self.module)
            engine = open_engine(trt, cuda, root, variant.entry, variant.engine, given)
            return TrtSession(engine, variant, signature)
        except (TDeployError, ImportError, OSError, MemoryError) as error:
            raise SessionError(f"{self.name} cannot open variant '{variant.id}': {error}") from error

    def workers(self, options: SessionOptions, cores: int) -> int:
        """As many as there are contexts: one batch is copied while another one runs."""
        del cores
        return max(1, options.settings(TrtOptions).contexts)

    def self_test(self) -> str:
        """Use the GPU and make a runtime."""
        cuda = Cuda.load()
        trt = importlib.import_module(self.module)
        if trt.Runtime(trt.Logger(trt.Logger.ERROR)) is None:
            raise SessionError(f"{self.module} {trt.__version__} makes no runtime here.")
        return f"{self.module} {trt.__version__}: CUDA {cuda.version()}"


@RUNTIMES.register("tensorrt-rtx")
class TensorRtRtx(TensorRt):
    """Opens engines of TensorRT-RTX, which run on every GPU from Ampere on and are compiled when they are opened."""

    name: ClassVar[str] = "tensorrt-rtx"
    preference: ClassVar[int] = 12
    install: ClassVar[str] = "pip install 'mlflow-tdeploy[tensorrt-rtx]'"
    module: ClassVar[str] = "tensorrt_rtx"
    triton: ClassVar[TritonBackend | None] = None  # Triton has no backend for it
    modules: ClassVar[Mapping[str, str]] = {"tensorrt_rtx": "tensorrt-rtx", "cuda": "cuda-bindings"}
    distributions: ClassVar[tuple[str, ...]] = ("tensorrt-rtx",)
