"""How to pad so that a text's answer does not depend on its neighbours', found by asking the model.

A model that heeds no mask (FNet) mixes padding into every answer: its batches hold texts of one length only. A model
with absolute positions (GPT-2) counts them from a row's first column, so padding on the left shifts every token unless
it is given ``position_ids``. Models with relative or rotary positions, and those that count positions by the mask, do
not care. No config says which kind a model is, so a short text is asked alone and padded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tasks._text import TextTask
from mlflow_tdeploy.core.tensors import Array, Arrays, Signature, TensorSpec

_log = logging.getLogger("mlflow_tdeploy")
_POSITIONS = "position_ids"
_TEXT = "A short text to see what padding changes."
#: Furthest that a row may be from that of the unpadded text, relative to its length, and in numbers near zero.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4
#: Further than this a model heeds no mask. What is between is noise, such as the ranges of a dynamically quantized
#: graph, which depend on the neighbours whatever the padding.
_UNHEEDED = 0.05

Run = Callable[[Signature, Arrays], Arrays]


def settle_padding(
    run: Run, task: str, config: Mapping[str, Any], signature: Signature, tokenizer: Any, accepted: set[str]
) -> tuple[Signature, dict[str, Any]]:
    """Return signature and settings with which padding changes no answer; those given where it changes none.

    Args:
        run: Asks the model for the outputs of a signature.
        task: The task's name.
        config: Its settings.
        signature: The graph's signature.
        tokenizer: The tokenizer.
        accepted: Names of the inputs that the model can take.

    Raises:
        InvalidInputError: Padding changes answers, and the signature pads every text.
    """
    given = dict(config)
    longest = _longest(signature)
    if longest is None:
        return signature, given
    text = tokenizer(_TEXT, truncation=True, max_length=max(longest // 2, tokenizer.num_special_tokens_to_add() + 1))
    size = len(text["input_ids"])
    if size >= longest:
        return signature, given
    for inputs, settings in _ways(given, signature, accepted):
        candidate = dataclasses.replace(signature, inputs=inputs)
        if _same(run, task, settings, candidate, text, min(2 * size, longest)):
            if settings["padding_side"] != given["padding_side"]:
                _log.warning("Texts are padded on the right: with padding on the left this model's answers change.")
            return candidate, settings
    if _same(run, task, given, signature, text, min(2 * size, longest), _UNHEEDED):
        return signature, given
    shortest = tokenizer.num_special_tokens_to_add() + 1
    least = next(dim.min for dim in signature.dims if dim.name == signature.inputs[0].shape[1])
    if least > shortest:
        raise InvalidInputError(
            f"Padding changes this model's answers (it heeds no attention_mask), and shapes pads every text to {least} "
            f"tokens or more. Let the sequence begin at {shortest}."
        )
    _log.warning(
        "Padding changes this model's answers (it heeds no attention_mask): only texts of one length share a batch."
    )
    return signature, {**given, "pads": False}


def _longest(signature: Signature) -> int | None:
    """Return the most tokens of a text; None where every text has the same width, so padding is always there."""
    size = signature.inputs[0].shape[1]
    if isinstance(size, int):
        return None
    dim = signature.dim(size)
    return dim.max if dim.min < dim.max else None


def _ways(
    config: Mapping[str, Any], signature: Signature, accepted: set[str]
) -> Iterator[tuple[tuple[TensorSpec, ...], dict[str, Any]]]:
    """Yield inputs and settings: as they are, with positions, padded on the right."""
    yield signature.inputs, dict(config)
    if config["padding_side"] == "right":
        return
    if _POSITIONS in accepted - {spec.name for spec in signature.inputs}:
        positions = dataclasses.replace(signature.inputs[0], name=_POSITIONS)
        yield (*signature.inputs, positions), dict(config)
    yield signature.inputs, {**config, "padding_side": "right"}


def _same(
    run: Run,
    task: str,
    config: Mapping[str, Any],
    signature: Signature,
    text: Mapping[str, Any],
    width: int,
    relative: float = _RELATIVE,
) -> bool:
    """Tell whether a text alone and the same text padded to ``width`` have one answer."""
    ids = list(text["input_ids"])
    rows = [(ids, list(text.get("token_type_ids", [0] * len(ids))))]
    padded = cast(TextTask, TASKS.get(task)(config, signature, Path())).pad(rows, width)
    alone = _cut(padded, padded, len(ids), config)
    expected, got = run(signature, alone), run(signature, padded)
    of_tokens = {spec.name for spec in signature.outputs if "sequence" in spec.shape}
    for name, reference in expected.items():
        answer = _cut({name: got[name]}, padded, len(ids), config)[name] if name in of_tokens else got[name]
        difference = np.linalg.norm(answer - reference, axis=-1)
        if not (difference <= relative * np.linalg.norm(reference, axis=-1) + _ABSOLUTE).all():  # NaN is not the same
            return False
    return True


def _cut(arrays: Arrays, padded: Arrays, size: int, config: Mapping[str, Any]) -> Arrays:
    """Return the columns of the text's own tokens."""
    width = next(iter(padded.values())).shape[1]
    own = slice(width - size, width) if config["padding_side"] == "left" else slice(0, size)
    return {name: _columns(array, own) for name, array in arrays.items()}


def _columns(array: Array, own: slice) -> Array:
    cut: Array = array[:, own]
    return cut
