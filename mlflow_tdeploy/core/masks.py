"""Masks in a model's outputs: values that stand for "no answer here", told from answers.

Many models put a very low number where attention or a choice is forbidden. Beside it a cosine sees nothing of
logits around 1, and half precision makes another number of it.
"""

from __future__ import annotations

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
#: From here on a negative power of ten does, as people write them (-1e9), beside other values.
_CONSTANT = -1e8
#: How far its logarithm may be off: a score was added.
_OFF = 4e-4
#: A mask that was added to a score: so low, and so many times the size of everything else in its row.
_ADDED, _OUTWEIGHS = -1e3, 100.0


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
        power = np.log10(np.where(low, -np.maximum(values, -np.finfo(np.float64).max), 1.0))
        found |= low & (np.abs(power - np.round(power)) < _OFF)
    return found


def split_masks(ref: Array) -> Array | None:
    """Tell which values of rows are masks with a score added (-9998); None where there are none.

    Such a value is not ignored: how low it is must stay about the same. It is only compared apart from its row.
    """
    low = ref <= _ADDED
    if ref.shape[1] == 1 or not low.any():
        return None
    others = np.abs(np.where(low, 0.0, ref)).max(axis=1, keepdims=True)
    masks: Array = low & (np.abs(ref) > _OUTWEIGHS * others) & ~low.all(axis=1, keepdims=True)  # of what, else?
    return masks if masks.any() else None
