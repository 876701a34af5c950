"""Does what tells one answer from another stay? An answer that never changes can be as close as any cosine asks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlflow_tdeploy.core.tensors import Array

#: So many rows tell how far a column spreads.
_ENOUGH = 8
#: What spreads less than this share of its own size is constant as far as float32 can say, and tells nothing apart:
#: it has to stay the same within :data:`_STEADY` of its size and of what is usual.
_CONSTANT, _STEADY = 2e-6, (0.01, 0.1)
#: Of so many columns those that are at least as lively as this share of the median are of a kind, and noise is the
#: same in all: a quiet one is held against the median. What is quieter is something of its own (a score beside boxes in
#: pixels), and so is each of a few columns.
_MANY, _ALIKE = 32, 0.05
#: One of many that keeps less than this share of its spread never changes any more, which noise never does to it.
_DEAD = 0.01
#: What something of its own is held against at least, of many columns: this share of its size (a saturated tanh).
_OF_MANY = 0.01
#: Columns that are exactly 0 in so many of the rows (codes, terms: few answer for a row) are of a kind, too.
_SILENT = 0.5
#: What is next to nothing beside the others, and by itself: the probability of what never happens.
_NOTHING, _TINY = 0.001, 1e-3
#: A difference that no float32 of an answer around 1 shows. Answers that are all smaller are not told apart.
ABSOLUTE = 5e-7
#: Stands for what is too large for a number: metrics are finite.
_LARGEST = 1e300


@dataclass
class _Columns:
    """Running sums of each column of the reference, and the variant's mean and squared deviations."""

    count: Array
    mean: Array
    deviations: Array
    squares: Array
    errors: Array
    zeros: Array
    new_mean: Array
    new_deviations: Array

    @classmethod
    def of(cls, ref: Array, new: Array, known: Array) -> _Columns:
        ref, new = np.where(known, ref, 0.0), np.where(known, new, 0.0)
        count = known.sum(axis=0).astype(np.float64)
        (mean, apart), (new_mean, new_apart) = (_about_mean(one, known, count) for one in (ref, new))
        sums = (apart, (ref**2).sum(axis=0), ((new - ref) ** 2).sum(axis=0), (known & (ref == 0)).sum(axis=0))
        return cls(count, mean, *sums, new_mean, new_apart)

    def joined(self, other: _Columns) -> _Columns:
        """Return the sums of both, whose deviations are from the mean of all (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1.0)
        step, new_step = other.mean - self.mean, other.new_mean - self.new_mean
        return _Columns(
            count,
            self.mean + step * share,
            self.deviations + other.deviations + step**2 * self.count * share,
            self.squares + other.squares,
            self.errors + other.errors,
            self.zeros + other.zeros,
            self.new_mean + new_step * share,
            self.new_deviations + other.new_deviations + new_step**2 * self.count * share,
        )


def _about_mean(rows: Array, known: Array, count: Array) -> tuple[Array, Array]:
    """Return mean and summed squared deviations of each column."""
    mean = rows.sum(axis=0) / np.maximum(count, 1.0)
    return mean, (np.where(known, rows - mean, 0.0) ** 2).sum(axis=0)


class Spread:
    """The *spread error*: in each column, how far off a variant is beside how far the reference's rows are apart.

    Both as root of the mean square over all rows, so order and batches do not matter; the worst column counts. An
    answer that never changes has 1 or more, one of other rows about 1.4, and noise the share that it is of the spread.
    Of many columns a quiet one is held against the median of all, unless it never changes any more; what does not
    spread at all, against its own size.
    """

    def __init__(self) -> None:
        self._columns: dict[int, _Columns] = {}

    def add(self, ref: Array, new: Array, known: Array | None = None) -> None:
        """Take in rows of the reference and of the variant.

        Args:
            ref: Finite numbers, (rows, columns).
            new: Finite numbers of the same shape.
            known: Where they are answers, of the same shape (a mask is none); None for everywhere.
        """
        where = np.ones(ref.shape, bool) if known is None else known
        with np.errstate(over="ignore", invalid="ignore"):  # squares may be too large for a number
            added, width = _Columns.of(ref, new, where), ref.shape[1]
            before = self._columns.get(width)
            self._columns[width] = added if before is None else before.joined(added)

    def error(self, least: float = 0.0) -> float:
        """Return the spread error; 0 where too few rows of one width were added to tell.

        Args:
            least: A difference that matters to nobody: what spreads less is held against it.
        """
        return max((float(one.max(initial=0.0)) for one in self._errors(least)), default=0.0)

    def mean(self) -> float:
        """Return the root of the mean square of the columns' spread errors; 0 where too few rows were added to tell."""
        return max((float(np.sqrt((one**2).mean())) for one in self._errors(0.0) if len(one)), default=0.0)

    def worst_of_few(self) -> float:
        """Return the worst column's spread error where columns are few: what each says is then something of its own."""
        return max((float(one.max(initial=0.0)) for one in self._errors(0.0) if len(one) < _MANY), default=0.0)

    def _errors(self, least: float) -> list[Array]:
        return [_error(columns, least) for columns in self._columns.values()]


def _error(columns: _Columns, least: float) -> Array:
    """Return the spread error of each column that has rows enough; none where there is nothing to tell apart."""
    enough = columns.count >= _ENOUGH
    if not enough.any():
        return np.empty(0)
    count = columns.count[enough]
    spread, errors, size = (sums[enough] / count for sums in (columns.deviations, columns.errors, columns.squares))
    if not (spread.any() and np.isfinite(size).all() and np.isfinite(errors).all()):
        return np.empty(0)  # nothing to tell apart, or beyond what can be squared: cosine and length say enough
    silent, least = columns.zeros[enough] / count, max(least**2, ABSOLUTE**2)
    lively = spread > _CONSTANT**2 * size
    usual = float(np.median(spread[lively])) if lively.any() else 0.0
    alike = (spread >= _ALIKE**2 * usual) & (len(spread) >= _MANY)
    floor = np.maximum(_floor(spread, size, silent, lively, usual, alike), least)
    found = np.sqrt(errors / np.maximum(spread, floor))
    dead = lively & alike & (silent < _SILENT) & (columns.new_deviations[enough] / count <= _DEAD**2 * spread)
    found = np.where(dead & (spread > least), np.maximum(found, 1.0), found)
    return np.asarray(np.minimum(found, _LARGEST))


def _floor(spread: Array, size: Array, silent: Array, lively: Array, usual: float, alike: Array) -> Array:
    """Return what each column is held against at least; all numbers are squares, but for the share of zeros."""
    floor = np.full_like(spread, min(_NOTHING**2 * usual, _TINY**2))
    if len(spread) >= _MANY:
        floor = np.where(alike, usual, np.maximum(floor, _OF_MANY**2 * size))
    sparse = silent >= _SILENT
    if sparse.sum() >= _MANY and (sparse & lively).any():
        floor = np.where(sparse, np.maximum(floor, spread[sparse & lively].mean()), floor)
    steady = np.maximum(_STEADY[0] ** 2 * size, _STEADY[1] ** 2 * usual)
    return np.where(lively, floor, np.maximum(floor, steady))
