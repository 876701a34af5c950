"""Which range of activations eight bits shall cover: calibrators, from histograms of what was met.

A wide range clips nothing and tells small numbers apart badly; a narrow one the other way round. All ranges here are
symmetric, ``-limit..limit``: engines take no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlflow_tdeploy.build.observe import Floats, observe
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.tensors import Arrays

#: Of magnitudes; a histogram covers a power of two, so that at least half of them are used.
BINS = 4096
#: Steps of eight bits on each side of 0.
LEVELS = 127
#: What is not larger is 0: a step of eight bits could not be written down.
_NOTHING = 1e-30
#: How many ranges the searching calibrators try.
_TRIED = 128
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often each magnitude was met.

    Attributes:
        counts: Of :data:`BINS` equal bins from 0 to ``span``.
        span: A power of two, so that histograms of different spans add up without loss; 0 for nothing but zeros.
        most: The greatest magnitude.
    """

    counts: Counts
    span: float
    most: float

    @classmethod
    def of(cls, array: Floats) -> Histogram:
        """Count a tensor.

        Raises:
            BuildError: It is not finite: it has no range.
        """
        sizes = np.abs(array).ravel()
        most = float(sizes.max(initial=0.0))
        if not np.isfinite(most):
            raise BuildError("not finite (NaN or infinite)")
        if most < _NOTHING:
            return cls(np.eye(1, BINS)[0] * sizes.size, 0.0, 0.0)
        span = 2.0 ** int(np.ceil(np.log2(most)))
        places = np.minimum((sizes * np.float64(BINS / span)).astype(np.int32), BINS - 1)
        return cls(np.bincount(places, minlength=BINS).astype(np.float64), span, most)

    def __add__(self, other: Histogram) -> Histogram:
        """Return the histogram of both."""
        small, large = sorted((self, other), key=lambda one: one.span)
        folded = np.zeros(BINS)
        times = int(min(large.span / small.span, BINS)) if small.span else BINS
        if times >= BINS:
            folded[0] = small.counts.sum()
        else:
            folded[: BINS // times] = small.counts.reshape(-1, times).sum(axis=1)
        return Histogram(large.counts + folded, large.span, max(small.most, large.most))

    @property
    def edges(self) -> Counts:
        """The upper ends of the bins."""
        return np.arange(1, BINS + 1, dtype=np.float64) * (self.span / BINS)


def histograms(path: Path, names: Sequence[str], batches: Sequence[Arrays]) -> dict[str, Histogram]:
    """Return what tensors of a graph hold on some batches.

    Raises:
        BuildError: The graph fails on them, or a tensor is not finite.
    """
    try:
        found = observe(path, names, batches, Histogram.of)
        return {name: functools.reduce(Histogram.__add__, seen) for name, seen in found if seen}
    except BuildError as error:
        if "not finite" not in str(error):
            raise
        raise BuildError(
            "What the graph computes on the calibration data is not finite (NaN or infinite) before some product: it "
            "has no range there. Leave that data out, or look at its values."
        ) from error


def of_max(histogram: Histogram) -> float:
    """Return the greatest magnitude: nothing is clipped."""
    return histogram.most


def of_percentile(histogram: Histogram, percent: float = 99.99) -> float:
    """Return what so many percent of all numbers are not larger than."""
    reached = np.cumsum(histogram.counts) / histogram.counts.sum()
    return min(float(histogram.edges[np.searchsorted(reached, percent / 100)]), histogram.most)


def of_mse(histogram: Histogram) -> float:
    """Return the range with the least mean squared error of eight bits."""
    middles = histogram.edges - histogram.span / BINS / 2

    def error(limit: float) -> float:
        step = limit / LEVELS
        rounded = np.clip(np.rint(middles / step), -LEVELS, LEVELS) * step
        return float((histogram.counts * (rounded - middles) ** 2).sum())

    return min(_tried(histogram), key=error)


def of_entropy(histogram: Histogram) -> float:
    """Return the range in which eight bits lose least information: by the Kullback-Leibler divergence.

    TensorRT's way (Migacz, "8-bit inference with TensorRT", GTC 2017): what is clipped is added to the last bin, and
    the bins of one step share what they hold among those that hold anything.
    """

    def divergence(limit: float) -> float:
        used = max(LEVELS, round(limit / histogram.span * BINS))
        met = histogram.counts[:used].copy()
        starts = np.linspace(0, used, LEVELS, endpoint=False).astype(int)
        of_step = np.diff(np.append(starts, used))
        held = np.add.reduceat((met > 0).astype(float), starts)
        shared = np.divide(np.add.reduceat(met, starts), held, out=np.zeros(LEVELS), where=held > 0)
        quantized = np.repeat(shared, of_step) * (met > 0)
        met[-1] += histogram.counts[used:].sum()
        return _divergence(met, quantized)

    return min(_tried(histogram), key=divergence)


def _divergence(p: Counts, q: Counts) -> float:
    """Return how much q loses of p; where q has nothing and p has, as much as a count of a ten-thousandth."""
    there = p > 0
    p, q = p[there] / p.sum(), np.maximum(q[there], 1e-4) / max(q.sum(), 1e-4)
    return float((p * np.log(p / q)).sum())


def _tried(histogram: Histogram) -> list[float]:
    """Return ranges to try, wide ones first: of several that are as good the one that clips least is taken."""
    least = histogram.most / _TRIED
    return [float(one) for one in np.geomspace(histogram.most, max(least, histogram.span * LEVELS / BINS), _TRIED)]


#: By name, from the histogram of a tensor to the end of its range.
CALIBRATORS: Mapping[str, Callable[[Histogram], float]] = {
    "max": of_max,
    "percentile": of_percentile,
    "mse": of_mse,
    "entropy": of_entropy,
}


def ranges(found: Mapping[str, Histogram], method: str) -> dict[str, float]:
    """Return the ends of the tensors' ranges; those that were nothing but 0 have none.

    Args:
        found: Their histograms.
        method: Of :data:`CALIBRATORS`.
    """
    return {name: CALIBRATORS[method](one) for name, one in found.items() if one.most > 0}


def ranges_known(found: Mapping[str, Histogram], name: str) -> bool:
    """Tell whether a tensor has a range: not where it was nothing but 0, or never there."""
    return name in found and found[name].most > 0
