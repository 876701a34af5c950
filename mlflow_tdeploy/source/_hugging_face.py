"""A Hugging Face model as a source: what those that read texts and those that read images share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mlflow_tdeploy.core.errors import BuildError, first_line
from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.runtime.backends._torch_modules import OTHER_FLOATS, run_module, serving_copy, set_attention
from mlflow_tdeploy.source._options import plain_name
from mlflow_tdeploy.source._progress import no_progress_bars
from mlflow_tdeploy.source.base import Source


class HuggingFaceSource(Source):
    """A source that is a torch module.

    Args:
        record: Where it came from.
        task: The task's name.
        task_config: The task's settings.
        signature: Token ids or pixels in, the task's output out.
        module: The wrapper, as :func:`serving_module` made it.
        save: Writes the original into a folder; raises BuildError where it could not be loaded again.
        notes: What a reader should know.
    """

    def __init__(
        self,
        record: SourceRecord,
        task: str,
        task_config: Mapping[str, Any],
        signature: Signature,
        module: torch.nn.Module,
        save: Callable[[Path], None],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.record = record
        self.task = task
        self.task_config = task_config
        self.signature = signature
        self.notes = notes
        self._modules = {"sdpa": module}
        self._save = save

    def reference(self, feeds: Arrays) -> Arrays:
        """Run the original in fp32 on the CPU."""
        return run_module(self._modules["sdpa"], feeds, [spec.name for spec in self.signature.outputs])

    @property
    def module(self) -> torch.nn.Module:
        """The wrapper with torch's fused attention."""
        return self._modules["sdpa"]

    def module_for(self, attn_implementation: str) -> torch.nn.Module:
        """Return the wrapper with another attention, ``"eager"`` for example, on the same weights."""
        if attn_implementation not in self._modules:
            module, _ = serving_copy(self._modules["sdpa"])
            set_attention(module, attn_implementation)
            self._modules[attn_implementation] = module
        return self._modules[attn_implementation]

    def write_source(self, folder: Path) -> bool:
        """Write the original as safetensors.

        Raises:
            BuildError: It cannot be written as safetensors, or loading it would need its own code.
        """
        with no_progress_bars():
            try:
                self._save(folder)
            except (RuntimeError, ValueError, TypeError) as error:  # such as modules that are used twice
                raise BuildError(f"it cannot be written as safetensors: {first_line(error)}") from error
        return True


def serving_module(wrapper: torch.nn.Module) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return the wrapper ready to run, with torch's fused attention, and notes on what was converted."""
    module, note = serving_copy(wrapper, OTHER_FLOATS)
    set_attention(module, "sdpa")
    return module, (note,) if note else ()


def asked(module: torch.nn.Module) -> Callable[[Signature, Arrays], Arrays]:
    """Return the module as a function of a signature and its inputs."""

    def run(signature: Signature, feeds: Arrays) -> Arrays:
        return run_module(module, feeds, [spec.name for spec in signature.outputs])

    return run


def record_of(model: Any, kind: str) -> SourceRecord:
    """Return where a model object came from, as far as it knows."""
    architecture = type(model).__name__
    name = plain_name(getattr(model.config, "_name_or_path", ""), architecture)
    return SourceRecord(kind, name, getattr(model.config, "_commit_hash", None), architecture)


def saver(model: Any, beside: Any) -> Callable[[Path], None]:
    """Return what writes a model as safetensors; it raises BuildError where only its own code could load it again.

    Args:
        model: The model.
        beside: Its tokenizer or image processor.
    """
    import transformers

    def save(folder: Path) -> None:
        if getattr(transformers, type(model).__name__, None) is not type(model):
            raise own_code(model)
        model.save_pretrained(str(folder), safe_serialization=True)
        beside.save_pretrained(str(folder))

    return save


def own_code(model: Any) -> BuildError:
    """Return the error of a model whose class is not the library's."""
    kind = type(model)
    return BuildError(
        f"'{kind.__module__}.{kind.__qualname__}' is no class of transformers: loading it takes its own code, which is "
        f"not stored"
    )
