"""Requests that nobody gave: of any shape, like those that somebody gave, or random where nobody gave any.

What was given is taken at its word: its rows are drawn as they are, nothing leaves the range of values that it has, but
for times and positions, which rise on where more of them are asked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlflow_tdeploy.core.tensors import Array, Arrays, Signature, TensorSpec, numpy_dtype

#: Of fewer rows than these, numbers with a fraction vary by up to this share, within the range of all of the input.
_FEW, _VARIED = 8, 0.25
#: Rows are drawn from so many items.
_MOST_ITEMS = 256

#: Whole numbers from here on that rise are times, such as seconds since 1970, and none are rows of a table.
_TIMES = 1_000_000

#: What a padding is made of.
_BINARY = [0, 1]

_MASK = re.compile(r"masks?(?![a-z])")

Shape = tuple[int, ...]


def make_up(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, Shape],
    items: Sequence[Mapping[str, Array]],
    tables: Mapping[str, int],
    *,
    ragged: bool,
    random: np.random.Generator,
    repeated: Sequence[str] = (),
) -> Arrays:
    """Return a request.

    Args:
        specs: The inputs.
        shapes: The wanted shape of each.
        items: Requests that somebody gave; random values where there are none.
        tables: Of inputs of whole numbers, how many rows the table has that they are looked up in.
        ragged: Whether masks let rows differ in length.
        random: The source of what is random.
        repeated: Inputs of whole numbers that do not rise on: the model takes no others.
    """
    known = _joined(items, random) if items else {}
    if not _says_something(known):  # zeros or ones throughout are there to be traced
        known = {name: array for name, array in known.items() if array.dtype.kind in "iu" and array.any()}
    inner = _inner(specs)
    rising = {name: axis for name, axis in _rising(specs, known, inner).items() if name not in repeated}
    draw = _Draw(random, inner, _extended(specs, shapes, known, rising))
    feeds: Arrays = {}
    for spec in specs:
        shape, own = shapes[spec.name], known.get(spec.name)  # how it was given: repeated, no padding looks like one
        if own is not None and (own.ndim != len(shape) or _is_blank(spec, own, tables)):
            own = None
        if own is not None and ragged and own.dtype.kind not in "iub" and not (own.any() or is_mask(spec.name)):
            feeds[spec.name] = random.uniform(0.0, 1.0, shape).astype(own.dtype)
            continue  # what a stream begins with, and what it is later; a flag, a time and a count are not negative
        if is_mask(spec.name):
            feeds[spec.name] = _mask(spec, shape, own, draw, ragged=ragged)
        elif own is not None and tables.get(spec.name, 0) <= len(_BINARY) and _is_padding(own):
            feeds[spec.name] = _padding(spec, shape, own, draw)
        elif own is None or _is_looked_up(spec, own, tables):
            feeds[spec.name] = _random(spec, shape, tables, random)
            if own is not None and (padding := _tail(own)) is not None and len(shape) == 2:
                feeds[spec.name] = _with_tail(feeds[spec.name], padding, ragged=ragged, random=random)
        else:
            feeds[spec.name] = _drawn(spec, shape, draw.longer[spec.name], draw, varies=spec.name not in rising)
    return feeds


def is_mask(name: str) -> bool:
    """Tell whether an input is a mask by its name: ``attention_mask``, ``masks``, ``mask_1``, not ``masked_image``."""
    return _MASK.search(name) is not None


def within(
    feeds: Arrays,
    signature: Signature,
    positions: Mapping[str, str],
    lengths: Mapping[str, str],
    ordered: Mapping[str, int] | None = None,
) -> Arrays:
    """Return a request whose positions and lengths are within the dimension that they are of, what is ordered in order.

    Args:
        feeds: A request.
        signature: The model's.
        positions: Of inputs of whole numbers, the dimension in which they are positions, from 0 on.
        lengths: The dimension of which they are lengths, up to its size.
        ordered: Inputs of numbers that never fall, and what each begins with.
    """
    sizes = signature.sizes(feeds)
    found = dict(feeds)
    most = {name: sizes[dim] - 1 for name, dim in positions.items()}
    most.update((name, sizes[dim]) for name, dim in lengths.items())
    for name, largest in most.items():
        found[name] = np.minimum(feeds[name], largest).astype(feeds[name].dtype)
    for name, first in (ordered or {}).items():
        found[name] = np.sort(found[name])
        found[name][:1] = first
    return found


def risen(signature: Signature, item: Mapping[str, Array]) -> Arrays:
    """Return the whole numbers that rise in a request as they are at the end of the longest one that is made of it."""
    found: Arrays = {}
    for name, index in _rising(signature.inputs, item, _inner(signature.inputs)).items():
        own, axis = item[name], next(spec.shape[index] for spec in signature.inputs if spec.name == name)
        more = signature.dim(str(axis)).max - own.shape[index]
        if own.dtype.kind in "iu" and more > 0:
            longer = _rises_on(own, index, 1 - (-more // own.shape[index]))
            found[name] = np.take(longer, more + np.arange(own.shape[index]), axis=index)
    return found


def _joined(items: Sequence[Mapping[str, Array]], random: np.random.Generator) -> Mapping[str, Array]:
    """Return the rows of all items as one, where only their numbers of rows differ; else one of the items."""
    if len(items) == 1:
        return items[0]
    order: list[int] = random.permutation(len(items))[:_MOST_ITEMS].tolist()
    some = [items[index] for index in order]
    forms = {tuple((name, array.dtype, array.shape[1:]) for name, array in sorted(item.items())) for item in some}
    counts = [{len(array) if array.ndim else 0 for array in item.values()} for item in some]
    if len(forms) == 1 and all(len(count) == 1 and 0 not in count for count in counts):  # they have rows
        return {name: np.concatenate([item[name] for item in some]) for name in some[0]}
    return some[0]


def _says_something(item: Mapping[str, Array]) -> bool:
    """Tell whether floats are more than one and the same number throughout each input: zeros, ones, or many others."""
    floats = [array for name, array in item.items() if array.dtype.kind not in "iub" and not is_mask(name)]
    return not floats or any(
        array.min() != array.max() or (array.flat[0] not in (0, 1) and array.size < _FEW) for array in floats
    )


def _is_blank(spec: TensorSpec, own: Array, tables: Mapping[str, int]) -> bool:
    """Tell whether whole numbers are there to be traced: zeros, or one number throughout of a table of known size."""
    if own.dtype.kind not in "iu" or is_mask(spec.name):
        return False
    return not own.any() or (spec.name in tables and bool((own == own.flat[0]).all()))


def _is_looked_up(spec: TensorSpec, own: Array, tables: Mapping[str, int]) -> bool:
    """Tell whether all of an input is looked up in one table of known size, of which all rows are to be asked.

    Whole numbers in a few columns (categories) may have a part of it each, as those show whose ranges are apart; in
    many they are a sequence.
    """
    if numpy_dtype(spec.dtype).kind not in "iu" or spec.name not in tables:
        return False
    if all(isinstance(size, str) or size >= _FEW for size in spec.shape[1:]):
        return True
    columns = own.reshape(len(own), -1)
    ends = sorted(zip(columns.min(axis=0).tolist(), columns.max(axis=0).tolist(), strict=True))
    return len(own) >= _FEW and all(one[1] >= other[0] for one, other in itertools.pairwise(ends))


def _is_padding(own: Array) -> bool:
    """Tell whether an input looks like a mask, whatever its name: rows of two values that change once, if at all."""
    if own.ndim != 2 or own.dtype.kind not in "iub":
        return False
    return np.unique(own).tolist() == _BINARY and _are_prefixes(own)


def _tail(own: Array) -> int | None:
    """Return the number that only ever ends rows, and not all of one: what sequences are padded with.

    Of several the one that is there most: others are the last of a row by chance, and so is what is there once.
    """
    if own.ndim != 2 or own.shape[1] < 2:
        return None
    found = {value: own == value for value in np.unique(own[:, -1]).tolist()}
    counts = {
        int(value): int(there.sum())
        for value, there in found.items()
        if there.sum() > 1 and _are_prefixes(there) and not there[:, 0].any()
    }
    return max(counts, key=lambda value: counts[value]) if counts else None


def _with_tail(ids: Array, padding: int, *, ragged: bool, random: np.random.Generator) -> Array:
    """Return ids without the padding, but at the end of rows where they may differ in length."""
    found = np.where(ids == padding, np.roll(ids, 1), ids)  # another one that was drawn
    found = np.where(found == padding, 1 if padding == 0 else 0, found)
    if ragged:
        lengths = random.integers(1, ids.shape[1] + 1, len(ids))
        lengths[0] = ids.shape[1]
        found[np.arange(ids.shape[1]) >= lengths[:, None]] = padding
    return found.astype(ids.dtype)


def _inner(specs: Sequence[TensorSpec]) -> frozenset[str]:
    """Return the dimensions that are within items somewhere: what they begin with is no row of items either."""
    return frozenset(axis for spec in specs for axis in spec.shape[1:] if isinstance(axis, str))


def _rising(specs: Sequence[TensorSpec], known: Mapping[str, Array], inner: frozenset[str]) -> dict[str, int]:
    """Return the axis within items along which numbers that somebody gave never fall, by input: times, or positions."""
    found: dict[str, int] = {}
    for spec in specs:
        own = known.get(spec.name)
        if own is None or own.ndim != len(spec.shape) or own.dtype.kind == "b":
            continue
        for index, axis in enumerate(spec.shape):
            if isinstance(axis, str) and axis in inner and own.shape[index] > 2:
                steps = np.diff(own.astype(np.float64), axis=index)
                if (steps >= 0).all() and (steps > 0).any(axis=index).all():
                    found[spec.name] = index
    return found


def _extended(
    specs: Sequence[TensorSpec], shapes: Mapping[str, Shape], known: Mapping[str, Array], rising: Mapping[str, int]
) -> Mapping[str, Array]:
    """Return what somebody gave, long enough along the dimensions in which something rises: that rises on."""
    axes = {spec.shape[rising[spec.name]] for spec in specs if spec.name in rising}
    found = dict(known)
    for spec in specs:
        own = known.get(spec.name)
        for index, axis in enumerate(spec.shape):
            if own is None or own.ndim != len(spec.shape) or axis not in axes:
                continue
            turns = -(-shapes[spec.name][index] // own.shape[index])
            more = _rises_on(own, index, turns) if rising.get(spec.name) == index else None
            own = np.concatenate([own] * turns, axis=index) if more is None else more
        if own is not None:
            found[spec.name] = own
    return found


def _rises_on(own: Array, index: int, turns: int) -> Array:
    """Return numbers that rise, several times over, each time from where they were.

    Whole numbers only where they look like times or positions: others may be places in a table, and stay what they are.
    """
    steps = np.diff(own.astype(np.float64) if own.dtype.kind == "f" else own, axis=index)
    first, last = (np.take(one, [place], axis=index) for one, place in ((own, 0), (own, -1)))
    if own.dtype.kind in "iu" and (steps != steps.flat[0]).any() and own.max() < _TIMES:
        again = np.concatenate([own] * turns, axis=index)
        return np.asarray(np.maximum.accumulate(again, axis=index))
    span = (last - first) + np.maximum(np.take(steps, [-1], axis=index), steps.max(axis=index, keepdims=True) / 2)
    return np.concatenate([own + (turn * span).astype(own.dtype) for turn in range(turns)], axis=index)


@dataclass
class _Draw:
    """One request in the making.

    Attributes:
        random: The source of what is random.
        inner: The dimensions that are within items, see :func:`_inner`.
        longer: What was given, as long as is asked for where it rises on.
        places: Which places of each dimension were taken: the same for every input that has it.
    """

    random: np.random.Generator
    inner: frozenset[str]
    longer: Mapping[str, Array]
    places: dict[str, Array] = field(default_factory=dict)


def _drawn(
    spec: TensorSpec,
    shape: Shape,
    own: Array,
    draw: _Draw,
    *,
    varies: bool = True,
) -> Array:
    array = np.asarray(own[np.ix_(*_axes(spec, shape, draw))])
    if varies and own.dtype.kind not in "iub" and own.shape[:1] < (_FEW,):
        wide = array.astype(np.float64)
        varied = wide * draw.random.uniform(1 - _VARIED, 1 + _VARIED, shape)
        array = np.where(wide == np.round(wide), wide, np.clip(varied, float(np.nanmin(own)), float(np.nanmax(own))))
    return np.array(array, own.dtype, order="C")  # ascontiguousarray makes vectors of numbers


def _axes(spec: TensorSpec, shape: Shape, draw: _Draw) -> list[Array]:
    """Return which places of each axis to take: the same for every input that has a dimension."""
    found = []
    for index, (axis, have, wanted) in enumerate(zip(spec.shape, draw.longer[spec.name].shape, shape, strict=True)):
        if isinstance(axis, int):
            found.append(np.arange(wanted))
            continue
        if axis not in draw.places:
            # items are drawn, what is in them keeps its order: pixels and words have neighbours
            if index == 0 and axis not in draw.inner:
                draw.places[axis] = draw.random.integers(0, have, wanted)
            elif wanted <= have:
                draw.places[axis] = int(draw.random.integers(have - wanted + 1)) + np.arange(wanted)
            else:
                draw.places[axis] = (int(draw.random.integers(have)) + np.arange(wanted)) % have
        found.append(draw.places[axis])
    return found


def _padding(
    spec: TensorSpec,
    shape: Shape,
    own: Array,
    draw: _Draw,
) -> Array:
    """Return rows that change where those that somebody gave do, as a share of their length; what changes, changes.

    One row alone shows only that they do, not where.
    """
    rows = own[_axes(spec, shape, draw)[0] % len(own)]
    kept = (rows == rows[:, :1]).sum(axis=1)
    shares = kept / rows.shape[1] if len(own) > 1 else draw.random.uniform(0.0, 1.0, len(rows))
    lengths = np.maximum(1, np.ceil(shares * shape[1]).astype(int))
    if shape[1] > 1:
        lengths = np.where(kept < rows.shape[1], np.minimum(lengths, shape[1] - 1), shape[1])
    changed = np.arange(shape[1]) >= lengths[:, None]
    return np.asarray(np.where(changed, 1 - rows[:, :1].astype(np.int64), rows[:, :1]).astype(own.dtype))


def _mask(
    spec: TensorSpec,
    shape: Shape,
    own: Array | None,
    draw: _Draw,
    *,
    ragged: bool,
) -> Array:
    """Return a mask: what is kept comes first in each row, and everywhere unless rows differ in length.

    Which value means that, the mask that somebody gave tells by its first column: ``attention_mask`` has 1 there,
    torch's ``key_padding_mask`` has False. Of other forms (two dimensions of a sequence) it is drawn as it is.
    """
    dtype = numpy_dtype(spec.dtype)
    values: list[Any] = [] if own is None else np.unique(own).tolist()
    if own is None or (values == [0] and dtype.kind != "b"):  # zeros of numbers are there to be traced
        keep, drop = 1, 0
    elif len(values) == 1:
        keep = values[0]
        drop = 1 - int(keep) if keep in (0, 1) and dtype.kind in "iub" else keep
    elif own.ndim == 2 and len(values) == 2 and _are_prefixes(own):
        keep = own[0, 0].item()
        drop = values[0] if keep == values[1] else values[1]
    else:
        axes = _axes(spec, shape, draw)
        tiled = [
            axes[0] % len(own),
            *(np.arange(size) % have for size, have in zip(shape[1:], own.shape[1:], strict=True)),
        ]
        return np.array(own[np.ix_(*tiled)], dtype, order="C")
    mask = np.full(shape, keep, dtype)
    if ragged and len(shape) == 2:
        lengths = draw.random.integers(1, shape[1] + 1, shape[0])
        lengths[0] = shape[1]
        mask[np.arange(shape[1]) >= lengths[:, None]] = drop
    return mask


def _are_prefixes(mask: Array) -> bool:
    """Tell whether every row begins with one and the same value and changes once at most."""
    changes = (mask[:, 1:] != mask[:, :-1]).sum(axis=1)
    return bool((mask[:, 0] == mask[0, 0]).all() and (changes <= 1).all())


def _random(spec: TensorSpec, shape: Shape, tables: Mapping[str, int], random: np.random.Generator) -> Array:
    dtype = numpy_dtype(spec.dtype)
    if dtype.kind in "iu":
        return np.asarray(random.integers(0, max(1, tables.get(spec.name, 2)), shape).astype(dtype))
    if dtype.kind == "b":
        return np.asarray(random.integers(0, 2, shape).astype(bool))
    return np.asarray(random.standard_normal(shape).astype(dtype))
