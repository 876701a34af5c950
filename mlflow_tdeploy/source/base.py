"""A model that can be built from, whatever it was given as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tensors import Arrays, Signature

if TYPE_CHECKING:
    import torch


class Source(ABC):
    """What every kind of source offers to the build.

    Attributes:
        record: Where the model came from.
        task: Name of the task.
        task_config: The task's settings, JSON values only.
        signature: Tensors and ranges of the graph to be made.
        reference_id: For ready-made graphs, id of the one that :meth:`reference` runs.
        notes: What a reader should know about how the source was read, such as an upcast to fp32.
        examples: For ``tensors``: requests that came with the model.
        unnoticed_writes: Weights and buffers that a forward writes to through ``.data``: ``torch.export`` does not
            know of it, and ends the process.
        packages: Distributions that opening the written source takes beside torch, transformers and safetensors.
    """

    record: SourceRecord
    task: str
    task_config: Mapping[str, Any]
    signature: Signature
    reference_id: str | None = None
    notes: tuple[str, ...] = ()
    examples: tuple[Arrays, ...] = ()
    packages: tuple[str, ...] = ()
    unnoticed_writes: tuple[str, ...] = ()

    @abstractmethod
    def reference(self, feeds: Arrays) -> Arrays:
        """Run the original model in its own precision: the truth that variants are compared with."""

    def shaken(self, feeds: Arrays, seed: int) -> Arrays | None:
        """Answer with roundings other than the original's own, which tells what only rounding makes.

        None where the original cannot be asked so.

        Args:
            feeds: A request.
            seed: Of what the roundings are.
        """
        del feeds, seed
        return None

    @property
    def module(self) -> torch.nn.Module | None:
        """The module to export: signature inputs as keywords in, outputs in order out. None for graphs."""
        return None

    def module_for(self, attn_implementation: str) -> torch.nn.Module | None:
        """Return the module with another attention implementation, on the same weights.

        The TorchScript exporter and older fusion patterns need ``"eager"``; modules without such a choice
        are returned as they are.
        """
        del attn_implementation
        return self.module

    @property
    def graphs(self) -> Mapping[str, Path]:
        """Ready-made ONNX graphs by variant id; empty for modules."""
        return {}

    @property
    def repositories(self) -> Mapping[str, Path]:
        """Triton repositories by variant id, to be kept as they are."""
        return {}

    def write_assets(self, folder: Path) -> None:  # noqa: B027 - nothing to write is a valid answer
        """Write what the task needs at serving time (tokenizer.json, …) into ``folder``."""

    def write_source(self, folder: Path) -> bool:
        """Write the original as safetensors into ``folder`` and return True, or False where this kind is never kept.

        Raises:
            BuildError: Others of its kind are kept, and this one cannot be; says why.
        """
        del folder
        return False

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Remove temporary files."""
