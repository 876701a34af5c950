"""Which inputs of whole numbers are positions within a dimension of the others, such as lengths or a graph's edges."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mlflow_tdeploy.core.made_up import is_mask, risen, within
from mlflow_tdeploy.core.tensors import Array, Arrays, Signature, TensorSpec

#: What is smaller than the dimension is found here: a dimension of 1 spreads to whatever size is beside it.
_SPREADS = 2


def integer_positions(
    signature: Signature,
    example: Mapping[str, Array],
    infer: Callable[[Arrays], object],
    known: Collection[str] = (),
) -> dict[str, Any]:
    """Return the dimension that bounds the values of each input that a model takes only within it.

    Found by trying: with the dimension at its smallest the model fails on the example's values, and takes them once
    they are within it.

    Args:
        signature: The model's.
        example: A request.
        infer: Runs the model; raises what it likes where it fails.
        known: Inputs of which other things are known.

    Returns:
        ``positions`` (from 0 on) and ``lengths`` (up to the size), each from input to dimension, and ``ordered``: what
        an input of numbers that may not fall begins with; ``repeated``: those that rise in the example and that the
        model takes no further; without what is empty.
    """
    found: dict[str, Any] = {}
    for spec in signature.inputs:
        array = example[spec.name]
        if array.dtype.kind not in "iu" or spec.name in known or is_mask(spec.name) or array.size == 0:
            continue
        if _never_falls(array) and not runs(infer, {**example, spec.name: array[::-1].copy()}):
            found.setdefault("ordered", {})[spec.name] = int(array[0])
        for dim in signature.sizes(example):
            if kind := _bounds(signature, example, infer, spec.name, dim):
                found.setdefault(kind, {})[spec.name] = dim
                break
    told = {name for one in found.values() for name in one} | set(known)
    more = {name: array for name, array in risen(signature, example).items() if name not in told}
    if repeated := [name for name, array in more.items() if not runs(infer, {**example, name: array})]:
        found["repeated"] = repeated
    return found


def _bounds(
    signature: Signature, example: Mapping[str, Array], infer: Callable[[Arrays], object], name: str, dim: str
) -> str:
    """Return how a dimension bounds an input; empty where it does not."""
    size, least = signature.sizes(example)[dim], signature.dim(dim).min
    if size > _SPREADS + 1:
        least = max(least, _SPREADS)
    cut = resized(example, signature.inputs, dim, least)
    if int(cut[name].max(initial=0)) < least or int(example[name].max()) > size:
        return ""
    if runs(infer, cut):
        return ""
    own, kinds = {name: dim}, ("positions",) if example[name].min() < 1 else ("lengths", "positions")
    for kind in kinds:
        if runs(infer, within(cut, signature, *((own, {}) if kind == "positions" else ({}, own)))):
            return kind
    return ""


def _never_falls(array: Array) -> bool:
    """Tell whether numbers are a row of some that never fall, such as offsets."""
    return array.ndim == 1 and bool((array[1:] >= array[:-1]).all()) and array.size > 1 and bool(array[0] != array[-1])


def resized(example: Mapping[str, Array], inputs: Sequence[TensorSpec], dim: str, size: int) -> Arrays:
    """Return the example, repeated or cut along a dimension."""
    found = dict(example)
    for spec in inputs:
        for axis, name in enumerate(spec.shape):
            if name == dim:
                array = found[spec.name]
                places = np.arange(size) % array.shape[axis]
                if array.dtype.kind in "iu" and _never_falls(array):
                    places = np.sort(places)  # they may be offsets
                found[spec.name] = np.take(array, places, axis=axis)
    return found


def runs(infer: Callable[[Arrays], object], feeds: Arrays) -> bool:
    """Tell whether a model takes a request."""
    try:
        infer(feeds)
    except Exception:  # a model raises what it likes
        return False
    return True


def missing_values(example: Mapping[str, Array]) -> dict[str, list[str]]:
    """Return the task's setting for inputs that may be NaN: those that are, somewhere in the example."""
    found = [name for name, array in example.items() if array.dtype.kind == "f" and np.isnan(array).any()]
    return {"missing": found} if found else {}
