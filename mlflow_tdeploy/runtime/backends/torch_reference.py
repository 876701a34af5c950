"""The original model on torch: the truth that variants are compared with, and the last resort of a host."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.core.errors import SessionError, first_line
from mlflow_tdeploy.core.hardware import Fingerprint, installed_version
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES, Compat, Fit, Runtime, Session
from mlflow_tdeploy.runtime.options import SessionOptions


@RUNTIMES.register("torch")
class TorchReference(Runtime):
    """Opens the Hugging Face model that was logged, in fp32 on the CPU."""

    name: ClassVar[str] = "torch"
    formats: ClassVar[frozenset[str]] = frozenset({"hf"})
    tier: ClassVar[int] = 9
    preference: ClassVar[int] = 90
    #: Its threads are inside the operators, and wait for each other at the end of each.
    token_budget: ClassVar[int] = 4096
    threads: ClassVar[int] = 0
    install: ClassVar[str] = "pip install 'mlflow-tdeploy[build]'"
    modules: ClassVar[Mapping[str, str]] = {name: name for name in ("torch", "transformers", "safetensors")}
    distributions: ClassVar[tuple[str, ...]] = ("torch",)

    def probe(self, host: Fingerprint, variant: Variant) -> Compat:
        """Every host with torch can run the original."""
        del host
        if variant.format not in self.formats:
            return Compat(Fit.UNSUPPORTED, f"opens the format hf, not {variant.format}")
        if variant.device not in ("any", "cpu"):
            return Compat(Fit.UNSUPPORTED, f"made for {variant.device}")
        if lacking := [name for name in variant.requires if installed_version(name) is None]:
            why = f"{lacking[0]} is not installed (pip install 'mlflow-tdeploy[{lacking[0]}]')"
            return Compat(Fit.UNSUPPORTED, why, otherwise=Fit.USABLE)
        return Compat(Fit.USABLE, "the original model, unoptimized")

    def open(self, root: Path, variant: Variant, signature: Signature, options: SessionOptions) -> Session:
        """Load the folder: safetensors only, never code that came with the model."""
        del options  # torch's threads belong to the whole process: the caller's to set
        from mlflow_tdeploy.runtime.backends import _torch_modules

        try:
            module = _torch_modules.load_module(root / variant.entry, signature, str(variant.session.get("task")))
        except Exception as error:  # transformers raises whatever it meets
            raise SessionError(f"torch cannot open variant '{variant.id}': {first_line(error)}") from error
        return TorchSession(module, variant, signature)

    @classmethod
    def after_fork(cls) -> None:
        """Compute on one thread from now on: those of torch's pool are not here, and waiting for them is a crash."""
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(1)

    def self_test(self) -> str:
        """Multiply two matrices."""
        import torch

        result = (torch.eye(2) @ torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        if result != [[1.0, 2.0], [3.0, 4.0]]:
            raise SessionError(f"torch computed {result} for a product with the identity.")
        return f"torch {torch.__version__}: cpu"


class TorchSession(Session):
    """A module in evaluation mode; its forward may run in several threads."""

    def __init__(self, module: Any, variant: Variant, signature: Signature) -> None:
        self._module = module
        self._variant = variant
        self._outputs = [spec.name for spec in signature.outputs]

    def infer(self, feeds: Arrays) -> Arrays:
        """Run the model."""
        from mlflow_tdeploy.runtime.backends._torch_modules import run_module

        module = self._module
        if module is None:
            raise SessionError(f"The session of variant '{self._variant.id}' is closed.")
        try:
            return run_module(module, feeds, self._outputs)
        except Exception as error:
            raise SessionError(f"torch failed in variant '{self._variant.id}': {first_line(error)}") from error

    def close(self) -> None:
        """Drop the module; a run in progress ends first."""
        self._module = None
