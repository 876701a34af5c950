"""Differences between a reference's outputs and a variant's, gathered over many batches.

Thresholds are elsewhere (:mod:`mlflow_tdeploy.core.budget`): a comparison only measures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from mlflow_tdeploy.core.tensors import Array, Arrays

#: The metric, there only where it is not 0, that counts rows in which the reference itself has no usable answer.
REFERENCE_NON_FINITE = "reference_non_finite"
#: The share of whole numbers and truth values (token ids, the index of the best label) that are the reference's own.
EXACT_SHARE = "exact_share"
#: What half-precision graphs put where others have infinity: fp16 ends at 65504, masks are often -1e4, and a score may
#: have been added to them.
AS_GOOD_AS_INFINITE = 5e3
#: From here on a value stands for infinity, whatever its sign: many models put the lowest number of their type there.
_ENDLESS = 1e30
#: From here on a negative one does: no score is that low.
_MASK = -1e8
#: A mask that was added to a score: so low, and so many times the size of everything else in its row.
_ADDED_MASK, _OUTWEIGHS = -1e3, 100.0
#: A row that is this much smaller than others is near zero: its direction is noise.
_NEAR_ZERO = 1e-3
#: One number has no direction but its sign: more of it is noise.
_NEAR_ZERO_ALONE = 0.05
#: Rows whose sizes tell what is typical.
_REMEMBERED = 4096
#: Stands for what is too large for a number: metrics are finite.
_LARGEST = 1e300
_ROOT = 1e140


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
    row's cosine -1 and is counted. A row of the reference with a NaN, or without any finite value, says nothing: it is
    counted apart and not compared. Where the reference is infinite beside finite values, or as good as that (a mask,
    see :func:`stands_for_infinity`), the variant must be, too: infinite or at least :data:`AS_GOOD_AS_INFINITE`, with
    the same sign; else it counts as above. Other masks of a row (-1e4, with a score added) are compared apart from the
    rest, and what is further off counts: beside them nothing would be seen of logits around 1. Rows that are next to
    nothing in the reference and in the difference, beside the median row, count as equal.
    """

    def __init__(self) -> None:
        self.count = 0
        self._worst = 1.0
        self._sum = 0.0
        self._max = 0.0
        self._relative = 0.0
        self._norm = 0.0
        self._bad = 0
        self._broken = 0
        self._sizes: Array = np.empty(0)

    def add(self, reference: Array, got: Array) -> None:
        """Compare ``got`` with ``reference``, both (rows, features)."""
        if reference.shape != got.shape:
            raise ValueError(f"cannot compare shapes {reference.shape} and {got.shape}")
        if reference.size == 0:
            return
        ref, new = reference.astype(np.float64), got.astype(np.float64)
        usable = ~np.isnan(ref) & ~stands_for_infinity(ref, reference.dtype)
        broken = np.isnan(ref).any(axis=1) | ~usable.any(axis=1)
        self._broken += int(broken.sum())
        if broken.all():
            return
        ref, new, usable = ref[~broken], new[~broken], usable[~broken]
        masked = (np.sign(new) == np.sign(ref)) & (np.abs(new) >= AS_GOOD_AS_INFINITE)  # NaN is neither
        bad = np.where(usable, ~np.isfinite(new), ~masked)
        silent = ~usable | bad  # positions that say nothing about closeness
        ref, new = np.where(silent, 0.0, ref), np.where(silent, 0.0, new)
        parts = _parts(ref, new)
        cosines = [_cosine(*part) for part in parts]
        cosines[-1][self._near_zero(*parts[-1])] = 1.0
        cosine = np.minimum.reduce(cosines)
        cosine[bad.any(axis=1)] = -1.0
        difference = np.abs(ref - new)
        self.count += len(ref)
        self._worst = min(self._worst, float(cosine.min()))
        self._sum += float(cosine.sum())
        largest, scale = min(float(difference.max()), _LARGEST), float(np.abs(ref).max())
        self._max = max(self._max, largest)
        self._relative = max(self._relative, min(largest / scale, _LARGEST) if scale else float(largest > 0))
        self._norm = max(self._norm, *(float(_norm_difference(*part).max()) for part in parts))
        self._bad += int(bad.sum())

    def _near_zero(self, ref: Array, new: Array) -> Array:
        """Tell which rows are next to nothing, as is their difference, beside the typical (median) row so far."""
        sizes = np.abs(ref).max(axis=1)
        self._sizes = np.concatenate([self._sizes, sizes])[-_REMEMBERED:]
        typical = np.partition(self._sizes, middle := (len(self._sizes) - 1) // 2)[middle]
        limit = float(typical) * (_NEAR_ZERO_ALONE if ref.shape[1] == 1 else _NEAR_ZERO)
        small: Array = (sizes < limit) & (np.abs(ref - new).max(axis=1) < limit)
        return small

    def metrics(self) -> dict[str, float]:
        """Return worst and mean cosine, largest absolute and relative difference and that of norms, and the rows."""
        broken = {REFERENCE_NON_FINITE: float(self._broken)} if self._broken else {}
        return broken | {
            "worst_cosine": self._worst,
            "mean_cosine": self._sum / self.count if self.count else 1.0,
            "max_difference": self._max,
            "max_relative_difference": self._relative,
            "max_norm_difference": self._norm,
            "non_finite": float(self._bad),
            "rows": float(self.count),
        }


def stands_for_infinity(values: Array, dtype: np.dtype[Any]) -> Array:
    """Tell which values of a type mean that there is no answer: infinite, as good as that, or far below any score."""
    end = min(_ENDLESS, float(np.finfo(dtype).max)) if np.issubdtype(dtype, np.floating) else _ENDLESS
    found: Array = (np.abs(values) >= end) | (values <= _MASK)
    return found


def _parts(ref: Array, new: Array) -> list[tuple[Array, Array]]:
    """Return what is compared of two matrices: all of it, or the masks in it and, last, the rest."""
    low = ref <= _ADDED_MASK
    if not low.any():
        return [(ref, new)]
    others = np.abs(np.where(low, 0.0, ref)).max(axis=1, keepdims=True)
    masks = low & (np.abs(ref) > _OUTWEIGHS * others) & (others > 0)
    if not masks.any():
        return [(ref, new)]
    return [
        (np.where(masks, ref, 0.0), np.where(masks, new, 0.0)),
        (np.where(masks, 0.0, ref), np.where(masks, 0.0, new)),
    ]


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


def _norm_difference(ref: Array, new: Array) -> Array:
    """Return how much longer or shorter each row became, in relation to it or, for short rows, to the typical row.

    A cosine does not see it: a graph that answers three times as much as it should has cosine 1.
    """
    largest = float(np.abs(ref).max()) or 1.0
    before, after = (np.linalg.norm(np.clip(rows / largest, -_ROOT, _ROOT), axis=1) for rows in (ref, new))
    scale = np.maximum(before, np.sqrt(np.mean(before**2)))
    change = np.abs(after - before)
    changed: Array = np.where(scale > 0, change / np.where(scale > 0, scale, 1.0), (change > 0).astype(np.float64))
    return changed


def same_outputs(reference: Arrays, got: Arrays) -> str | None:
    """Return why two sets of outputs cannot be compared (a missing name, another shape), or None."""
    for name, array in reference.items():
        if name not in got:
            return f"output '{name}' is missing"
        if got[name].shape != array.shape:
            return f"output '{name}' has shape {got[name].shape}, the reference's is {array.shape}"
    return None
