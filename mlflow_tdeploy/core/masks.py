"""Masks in a model's outputs: values that stand for "no answer here", told from answers.

Many models put a very low number where attention or a choice is forbidden. Beside it a cosine sees nothing of
logits around 1, and half precision makes another number of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mlflow_tdeploy.core.tensors import Array

#: What half-precision graphs put where others have infinity: fp16 ends at 65504, masks are often -1e4, and a score may
#: have been added to them.
AS_GOOD_AS_INFINITE = 5e3
#: Where half precision ends, and a mask that is lower becomes infinite.
END_OF_HALF = -65000.0
#: From here on a value stands for infinity, whatever its sign: many models put the lowest number of their type there.
_ENDLESS = 1e30
#: From here on a negative power of ten does, as people write them (-1e9), beside other values; two that were added do
#: from ten times that on.
_CONSTANT = -1e8
#: What people write is one of these times a power of ten, or the end of half precision; and how far off it may be, as a
#: share, with a score added.
_WRITTEN, _POWER, _OFF = (1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 10.0), (1.0, 10.0), 1e-3
_ENDS_OF_HALF = (65504.0, 131008.0)
#: A mask that was added to a score: so low, so many times the size of everything else in its row, and not further from
#: what people write than so many times that size.
_ADDED, _OUTWEIGHS, _SCORES = -1e3, 100.0, 4.0


def stands_for_infinity(values: Array, dtype: np.dtype[Any]) -> Array:
    """Tell which values of rows mean that there is no answer.

    Args:
        values: (rows, features).
        dtype: The type that the model has them in: its ends are no answers.

    Returns:
        Truth values, (rows, features).
    """
    end = min(_ENDLESS, float(np.finfo(dtype).max)) if np.issubdtype(dtype, np.floating) else _ENDLESS
    found: Array = np.abs(values) >= end
    if values.shape[1] > 1 and (low := values <= _CONSTANT).any():
        found |= low & (_from_written(values, low, _POWER) <= _OFF)
        found |= (values <= 10 * _CONSTANT) & (_from_written(values, low, (2.0,)) <= _OFF)
    return found


def _from_written(values: Array, low: Array, factors: Iterable[float]) -> Array:
    """Return how far low numbers are from what people write as a mask, as a share of that."""
    sizes = -np.maximum(values[low], -_ENDLESS)
    scale = 10.0 ** np.floor(np.log10(sizes))
    nearest = np.full(sizes.shape, np.inf)
    for written in (*(factor * scale for factor in factors), *_ENDS_OF_HALF):
        nearest = np.minimum(nearest, np.abs(sizes - written) / written)
    found = np.full(values.shape, np.inf)
    found[low] = nearest
    return found


def may_be_infinite(values: Array) -> Array:
    """Tell which masks half precision cannot hold, so that a graph in it may have any other low number there."""
    low = values <= END_OF_HALF
    return np.asarray(low & (_from_written(values, low, _POWER) <= _OFF)) if low.any() else low


def without_answer(values: Array, dtype: np.dtype[Any]) -> Array:
    """Tell which values of rows are no answers at all: not finite, as good as infinite, or masks with a score added."""
    found: Array = ~np.isfinite(values) | stands_for_infinity(values, dtype)
    masks = split_masks(np.where(found, 0.0, values))
    return found if masks is None else found | masks


def split_masks(ref: Array) -> Array | None:
    """Tell which values of rows are masks with a score added (-9998); None where there are none.

    Such a value is not ignored: how low it is must stay about the same. It is only compared apart from its row.
    """
    low = ref <= _ADDED
    if ref.shape[1] == 1 or not low.any():
        return None
    others = np.abs(np.where(low, 0.0, ref)).max(axis=1, keepdims=True)
    masks: Array = low & (np.abs(ref) > _OUTWEIGHS * others) & ~low.all(axis=1, keepdims=True)  # of what, else?
    masks &= _from_written(ref, low, _WRITTEN) <= np.maximum(_OFF, _SCORES * others / np.maximum(np.abs(ref), 1.0))
    return masks if masks.any() else None
