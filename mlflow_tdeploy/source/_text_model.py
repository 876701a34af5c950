"""A Hugging Face model that reads texts: what transformers models and SentenceTransformers share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_tdeploy.core.errors import InvalidInputError, first_line
from mlflow_tdeploy.core.tasks import Head
from mlflow_tdeploy.core.tensors import Array, Arrays, Dim, Signature, TensorSpec
from mlflow_tdeploy.runtime.backends._torch_modules import run_module
from mlflow_tdeploy.source._hugging_face import HuggingFaceSource
from mlflow_tdeploy.source._tokenizer import write_tokenizer

_PROBE_TEXT = "A short text to see what the model returns."


class TextModelSource(HuggingFaceSource):
    """A source that is a torch module with a tokenizer.

    Args:
        tokenizer: The tokenizer.
        given: See :class:`HuggingFaceSource`.
    """

    def __init__(self, tokenizer: Any, *given: Any) -> None:
        super().__init__(*given)
        self._tokenizer = tokenizer

    def write_assets(self, folder: Path) -> None:
        """Write the tokenizer."""
        write_tokenizer(self._tokenizer, folder)


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
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # CANINE hashes characters: it has no table of tokens
        return
    highest = max(tokenizer.get_vocab().values(), default=0)
    size = getattr(table, "num_embeddings", None)
    if size is not None and highest >= size:
        raise InvalidInputError(
            f"The tokenizer has token ids up to {highest}, the model embeds {size}: they do not belong together. "
            f"Pass the tokenizer that the model was trained with."
        )
