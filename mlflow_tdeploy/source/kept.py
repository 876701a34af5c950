"""The original that a bundle keeps, as a source: other variants are made of it where the model is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.runtime.backends._torch_modules import load_module, run_module, serving_copy, set_attention
from mlflow_tdeploy.source.base import Source


class KeptSource(Source):
    """What was written beside the variants, opened when it is first asked for.

    Args:
        folder: The files of the variant ``hf``.
        record: Where the model came from.
        signature: Of the bundle.
        task: Its task.
        task_config: The task's settings.
    """

    def __init__(
        self, folder: Path, record: SourceRecord, signature: Signature, task: str, task_config: Mapping[str, Any]
    ) -> None:
        self.record, self.signature, self.task, self.task_config = record, signature, task, task_config
        self._folder = folder
        self._modules: dict[str, torch.nn.Module] = {}

    def reference(self, feeds: Arrays) -> Arrays:
        """Run it on the CPU, in fp32."""
        return run_module(self.module, feeds, [spec.name for spec in self.signature.outputs])

    @property
    def module(self) -> torch.nn.Module:
        """The wrapper that returns a tuple."""
        if "sdpa" not in self._modules:
            self._modules["sdpa"] = load_module(self._folder, self.signature, self.task)
        return self._modules["sdpa"]

    def module_for(self, attn_implementation: str) -> torch.nn.Module:
        """Return the wrapper with another attention, on the same weights."""
        if attn_implementation not in self._modules:
            module, _ = serving_copy(self.module)
            set_attention(module, attn_implementation)
            self._modules[attn_implementation] = module
        return self._modules[attn_implementation]
