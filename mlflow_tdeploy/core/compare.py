"""Differences between a reference's outputs and a variant's, gathered over many batches.

Thresholds are elsewhere (:mod:`mlflow_tdeploy.core.budget`): a comparison only measures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable

import numpy as np

from mlflow_tdeploy.core.masks import (
    AS_GOOD_AS_INFINITE,
    END_OF_HALF,
    may_be_infinite,
    split_masks,
    stands_for_infinity,
)
from mlflow_tdeploy.core.spread import ABSOLUTE, Spread
from mlflow_tdeploy.core.tensors import Array, Arrays

#: The metric, there only where it is not 0, that counts rows in which the reference itself has no usable answer.
REFERENCE_NON_FINITE = "reference_non_finite"
#: The share of whole numbers and truth values (token ids, the index of the best label) that are the reference's own.
EXACT_SHARE = "exact_share"
#: The least share of one value of them (a class, True) that are the reference's own; a rare one would not be missed in
#: the share of all.
VALUE_SHARE = "value_share"
#: How far off the columns are beside how far the reference's rows are apart: of all of an output's columns together.
MEAN_SPREAD = "mean_spread_error"
#: A row that is this much smaller than the typical one is near zero: its direction is noise.
_NEAR_ZERO = 1e-3
#: Rows of few numbers have next to no direction (one number: its sign), which an error of this much of the typical one
#: may turn.
_NEAR_ZERO_NARROW, _NARROW = 0.1, 4
#: A difference this small beside a mask is what float32 rounds off.
_ROUNDING = 1e-5
#: A value that is there so often is looked at by itself; all but the most common one together, if they are so many.
_OFTEN, _SOME = 8, 3
#: Stands for what is too large for a number: metrics are finite.
_LARGEST = 1e300


class Comparison(ABC):
    """Adds up differences batch by batch; each task says which outputs are compared and how.

    Where the reference has NaN there is nothing to compare with: such rows are left out and counted as the metric
    ``reference_non_finite``.
    """

    @abstractmethod
    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        """Take in one batch: the reference's outputs, the variant's outputs, and the inputs of both."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return the metrics so far, always finite numbers."""


class Rows:
    """Row-wise differences of two matrices, accumulated.

    Rows are compared by cosine similarity (two zero rows are equal, one zero row has cosine 0), by their norms and by
    the largest absolute difference. A value that is finite in the reference and not in the variant makes its
    row's cosine -1 and is counted. A row of the reference with a NaN, or with infinite values only, says nothing: it is
    counted apart and not compared. Where the reference is infinite beside finite values, or as good as that (a mask,
    see :mod:`mlflow_tdeploy.core.masks`), the variant must be, too: infinite or at least
    :data:`~mlflow_tdeploy.core.masks.AS_GOOD_AS_INFINITE`, with the same sign; else it counts as above. Other masks
    of a row (-1e4, with a score added) are compared apart from the rest, and what is further off counts: beside them
    nothing would be seen of logits around 1. Rows that are next to nothing in the reference and in the difference,
    beside the median row of all that were added, count as equal. Rows of up to four numbers have no direction to speak
    of: what counts is how far off they are beside the median.

    Rows whose difference no float32 of an answer around 1 would show count as equal, too. A cosine and a length say
    little where rows are much alike (a temperature around 290, hidden states with one large value), so there is the
    spread error besides, see :class:`~mlflow_tdeploy.core.spread.Spread`.

    Args:
        spread: Whether to take that in: it keeps sums of each column for every width of rows that there is.
    """

    def __init__(self, *, spread: bool = True) -> None:
        self._rows: list[Array] = []
        self._max = 0.0
        self._scale = 0.0
        self._masks = 0.0
        self._bad = 0
        self._broken = 0
        self.spread = Spread()
        self._spreads = spread

    def add(self, reference: Array, got: Array) -> None:
        """Compare ``got`` with ``reference``, both (rows, features)."""
        if reference.shape != got.shape:
            raise ValueError(f"cannot compare shapes {reference.shape} and {got.shape}")
        if reference.size == 0:
            return
        ref, new = reference.astype(np.float64), got.astype(np.float64)
        broken = np.isnan(ref).any(axis=1) | np.isinf(ref).all(axis=1)
        self._broken += int(broken.sum())
        if broken.all():
            return
        usable = ~stands_for_infinity(ref, reference.dtype)[~broken]
        ref, new = ref[~broken], new[~broken]
        if (low := split_masks(np.where(usable, ref, 0.0))) is not None:
            # half precision ends before many a mask: graphs have infinity there, or what AS_GOOD_AS_INFINITE says
            ended = np.isneginf(new) | (may_be_infinite(ref) & (new <= -AS_GOOD_AS_INFINITE))
            new = np.where(low & (ref <= END_OF_HALF) & ended, ref, new)
        masked = (np.sign(new) == np.sign(ref)) & (np.abs(new) >= AS_GOOD_AS_INFINITE)  # NaN is neither
        bad = np.where(usable, ~np.isfinite(new), ~masked)
        silent = ~usable | bad  # positions that say nothing about closeness
        ref, new = np.where(silent, 0.0, ref), np.where(silent, 0.0, new)
        difference = np.abs(ref - new)
        self._max = max(self._max, min(float(difference.max()), _LARGEST))
        self._scale = max(self._scale, float(np.abs(ref).max()))
        self._bad += int(bad.sum())
        self._take(ref, new, silent, np.asarray(bad.any(axis=1)))

    def _take(self, ref: Array, new: Array, silent: Array, bad: Array) -> None:
        """Keep of each row what decides about it once it is known what is typical."""
        masks = split_masks(ref)
        apart = np.ones(len(ref))
        if masks is not None:
            beside = np.where(masks, ref, 0.0), np.where(masks, new, 0.0)
            apart, self._masks = _cosine(*beside), max(self._masks, float(_change(*beside).max()))
        lowest = np.abs(ref).max(axis=1)
        if masks is not None:
            ref, new = np.where(masks, 0.0, ref), np.where(masks, 0.0, new)
        size, off = np.abs(ref).max(axis=1), np.abs(ref - new).max(axis=1)
        rounded = (size == 0) & (off <= _ROUNDING * lowest)
        alone, narrow = (np.full(len(ref), ref.shape[1] <= width) for width in (1, _NARROW))
        before, after = _lengths(ref), _lengths(new)
        self._rows.append(np.stack([_cosine(ref, new), apart, size, off, before, after, rounded, bad, alone, narrow]))
        known = ~silent if masks is None else ~(silent | masks)
        if self._spreads:
            self.spread.add(ref, np.where(rounded[:, None], ref, new), known)

    def metrics(self) -> dict[str, float]:
        """Return worst and mean cosine, largest absolute and relative difference and that of norms, and the rows."""
        broken = {REFERENCE_NON_FINITE: float(self._broken)} if self._broken else {}
        cosine, norm = self._settled()
        return broken | {
            "worst_cosine": float(cosine.min(initial=1.0)),
            "mean_cosine": float(cosine.mean()) if len(cosine) else 1.0,
            "max_difference": self._max,
            "max_relative_difference": min(self._max / self._scale, _LARGEST) if self._scale else float(self._max > 0),
            "max_norm_difference": float(norm.max(initial=self._masks)),
            "max_spread_error": self.spread.error(),
            "non_finite": float(self._bad),
            "rows": float(len(cosine)),
        }

    def _settled(self) -> tuple[Array, Array]:
        """Return each row's cosine, and how much longer or shorter it became, beside the typical row of all."""
        if not self._rows:
            return np.empty(0), np.empty(0)
        numbers, flags = np.split(np.concatenate(self._rows, axis=1), [6])
        cosine, apart, size, off, before, after = numbers
        rounded, bad, alone, narrow = flags > 0  # by row: a dimension that varies may be one beside long rows
        limit = _typical(size)
        small = (off <= ABSOLUTE) | ((size < _NEAR_ZERO * limit) & (off < _NEAR_ZERO * limit))
        near = rounded | small | (narrow & (off <= _NEAR_ZERO_NARROW * limit))
        change = np.where(alone, off, np.abs(after - before))  # of one number, also where the sign turned
        scale = np.maximum(before, _typical(before))
        norm = np.minimum(np.where(scale > 0, change / np.where(scale > 0, scale, 1.0), change > 0), _LARGEST)
        norm = np.where(rounded | (small & ~alone) | (off <= ABSOLUTE), 0.0, norm)
        return np.where(bad, -1.0, np.minimum(np.where(near, 1.0, cosine), apart)), norm


class Parts:
    """How far off each part of an item is: a token's classes, a box.

    In the whole item one part of three hundred weighs little. Each is held against its own length, or the root of the
    mean square of all where that is more: what is next to nothing beside the others may be off by as much.
    """

    def __init__(self) -> None:
        self._lengths: list[Array] = []

    def add(self, ref: Array, new: Array) -> None:
        """Take in parts of the reference and of the variant, both (parts, numbers), finite."""
        self._lengths.append(np.stack([_lengths(ref), _lengths(ref - new)]))

    def error(self) -> float:
        """Return the error of the worst one."""
        if not self._lengths:
            return 0.0
        own, wrong = np.concatenate(self._lengths, axis=1)
        with np.errstate(over="ignore"):
            usual = np.sqrt(np.mean(own**2)) if np.isfinite(own**2).all() else own.max()
        scale = np.maximum(np.maximum(own, usual), ABSOLUTE)
        return float(min((wrong / scale).max(), _LARGEST))


class Choices:
    """How many whole numbers or truth values are the reference's own: of all, and of each value.

    Of a value that is there often enough, so many must be found again. All that is not the most common value, in the
    reference or in the variant, counts as one value besides: of three alarms in a thousand none may be lost.
    """

    def __init__(self) -> None:
        self._there: Counter[int] = Counter()
        self._found: Counter[int] = Counter()
        self._got: Counter[int] = Counter()

    def add(self, ref: Array, got: Array) -> None:
        """Take in values of the reference and of the variant, of the same shape."""
        for counter, values in ((self._there, ref), (self._found, ref[ref == got]), (self._got, got)):
            counter.update(dict(zip(*(one.tolist() for one in np.unique(values, return_counts=True)), strict=True)))

    def share(self) -> float:
        """Return the share of all that are the reference's own."""
        return self._found.total() / self._there.total() if self._there else 1.0

    def least(self) -> float:
        """Return the least share of one value."""
        if not self._there:
            return 1.0
        most = max(self._there.values())
        share = min(self._beside(value) for value, count in self._there.items() if count == most)
        often = [self._found[value] / count for value, count in self._there.items() if count >= _OFTEN]
        return min([share, *often])

    def _beside(self, usual: int) -> float:
        """Return the share of what is another value than the usual one in the reference or in the variant."""
        kept = self._found.total() - self._found[usual]
        either = self._there.total() - self._there[usual] + self._got.total() - self._got[usual] - kept
        return kept / either if either >= _SOME else 1.0


def merged(parts: Iterable[Rows]) -> dict[str, float]:
    """Return the metrics of several outputs, each compared by itself: the worst of each, means over all rows."""
    found = [rows.metrics() for rows in parts] or [Rows().metrics()]
    count = sum(one["rows"] for one in found)
    mean = sum(one["mean_cosine"] * one["rows"] for one in found) / count if count else 1.0
    names = dict.fromkeys(name for one in found for name in one)
    values = {name: [one.get(name, 0.0) for one in found] for name in names}
    sums = {"non_finite", "rows", REFERENCE_NON_FINITE}
    worst = {name: sum(all_) if name in sums else max(all_) for name, all_ in values.items()}
    return worst | {"worst_cosine": min(values["worst_cosine"]), "mean_cosine": mean}


def _cosine(a: Array, b: Array) -> Array:
    a, b = _unit(a), _unit(b)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    zero = norms == 0.0
    same = np.where((a == b).all(axis=1), 1.0, 0.0)
    return np.where(zero, same, np.clip((a * b).sum(axis=1) / np.where(zero, 1.0, norms), -1.0, 1.0))


def _unit(rows: Array) -> Array:
    """Return rows whose largest value is 1: squares of others may be too large for a number, or too small."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled: Array = rows / np.where(largest > 0, largest, 1.0)
    return scaled


def _typical(sizes: Array) -> float:
    """Return the median of what is not zero, the smaller one of two: a single large row is not typical."""
    some = sizes[sizes > 0]
    return float(np.partition(some, (len(some) - 1) // 2)[(len(some) - 1) // 2]) if len(some) else 0.0


def _lengths(rows: Array) -> Array:
    """Return how long each row is, as the root of its mean square: the same for short rows and long ones of a kind."""
    largest = np.minimum(np.abs(rows).max(axis=1), _LARGEST)
    lengths: Array = np.minimum(largest * np.sqrt(np.mean(_unit(rows) ** 2, axis=1)), _LARGEST)
    return lengths


def _change(ref: Array, new: Array) -> Array:
    """Return how much longer or shorter each row became, in relation to it.

    A cosine does not see it: a graph that answers three times as much as it should has cosine 1.
    """
    before, after = _lengths(ref), _lengths(new)
    changed: Array = np.abs(after - before) / np.where(before > 0, before, 1.0)
    return changed


def same_outputs(reference: Arrays, got: Arrays) -> str | None:
    """Return why two sets of outputs cannot be compared (a missing name, another shape), or None."""
    for name, array in reference.items():
        if name not in got:
            return f"output '{name}' is missing"
        if got[name].shape != array.shape:
            return f"output '{name}' has shape {got[name].shape}, the reference's is {array.shape}"
    return None
