"""A Hugging Face model that reads texts: what transformers models and SentenceTransformers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, first_line
from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tasks import Head
from mlflow_tdeploy.core.tensors import Array, Arrays, Dim, Signature, TensorSpec
from mlflow_tdeploy.runtime.backends._torch_modules import OTHER_FLOATS, run_module, serving_copy, set_attention
from mlflow_tdeploy.source._progress import no_progress_bars
from mlflow_tdeploy.source._tokenizer import write_tokenizer
from mlflow_tdeploy.source.base import Source

_PROBE_TEXT = "A short text to see what the model returns."


class TextModelSource(Source):
    """A source that is a torch module with a tokenizer.

    Args:
        record: Where it came from.
        task: The task's name.
        task_config: The task's settings.
        signature: Token ids in, the task's output out.
        module: The wrapper, as :func:`serving_module` made it.
        tokenizer: The fast tokenizer.
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
        tokenizer: Any,
        save: Callable[[Path], None],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.record = record
        self.task = task
        self.task_config = task_config
        self.signature = signature
        self.notes = notes
        self._modules = {"sdpa": module}
        self._tokenizer = tokenizer
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

    def write_assets(self, folder: Path) -> None:
        """Write ``tokenizer.json``."""
        write_tokenizer(self._tokenizer, folder)

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


def probe_signature(
    module: torch.nn.Module, tokenizer: Any, inputs: Sequence[TensorSpec], dims: tuple[Dim, ...], head: Head
) -> Signature:
    """Run the model on a text and return its signature with the output's real width.

    Raises:
        InvalidInputError: The model cannot be run on token ids, or returns something of another form.
    """
    longest = next(dim.max for dim in dims if dim.name == "sequence")
    encoded = tokenizer(_PROBE_TEXT, truncation=True, max_length=longest)
    feeds = {spec.name: np.array([encoded[spec.name]] * 2, np.int64) for spec in inputs if spec.name in encoded}
    feeds.setdefault("attention_mask", np.ones_like(feeds["input_ids"]))
    feeds = {spec.name: feeds[spec.name] for spec in inputs}
    try:
        arrays = run_module(module, feeds, head.outputs)
    except InvalidInputError:
        raise
    except Exception as error:  # whatever a model's own code meets
        raise InvalidInputError(
            f"The model cannot be run on {', '.join(feeds)} of two texts: {type(error).__name__}: {first_line(error)}. "
            f"Check that model and tokenizer belong together and that a padding token is set."
        ) from error
    return Signature(dims, tuple(inputs), tuple(_output(head, name, arrays[name], feeds) for name in head.outputs))


def _output(head: Head, name: str, array: Array, feeds: Arrays) -> TensorSpec:
    """Return what one of a model's outputs is."""
    axes, asked = head.axes, feeds["input_ids"].shape
    if array.ndim != len(axes) + head.wide or array.shape[: len(axes)] != asked[: len(axes)]:
        wanted = ", ".join((*axes, *(["width"] if head.wide else [])))
        raise InvalidInputError(
            f"The output '{name}' has shape {array.shape} for token ids of shape {asked}: the task needs [{wanted}]."
        )
    return TensorSpec(name, str(array.dtype), (*axes, *map(int, array.shape[len(axes) :])))


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Make sure that the model has an embedding for every token.

    Raises:
        InvalidInputError: It has fewer.
    """
    table = model.get_input_embeddings()
    highest = max(tokenizer.get_vocab().values(), default=0)
    size = getattr(table, "num_embeddings", None)
    if size is not None and highest >= size:
        raise InvalidInputError(
            f"The tokenizer has token ids up to {highest}, the model embeds {size}: they do not belong together. "
            f"Pass the tokenizer that the model was trained with."
        )
