"""Timing: interleaved rounds, medians, ratios within one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Statistics over repeated calls, in milliseconds."""

    count: int
    mean_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarize durations given in seconds (at least one)."""
        ms = np.asarray(seconds, dtype=np.float64) * 1e3
        p50, p95, p99 = (float(q) for q in np.percentile(ms, (50, 95, 99)))
        return cls(len(ms), float(ms.mean()), float(ms.std()), float(ms.min()), float(ms.max()), p50, p95, p99)

    def as_metrics(self) -> dict[str, float]:
        """Return the figures as a flat mapping."""
        return {name: float(value) for name, value in asdict(self).items()}


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    seconds: float | None = None,
    pause: float = 0.0,
    lead: int = 0,
) -> dict[str, list[float]]:
    """Time several calls in turn (A B C A B C …), so that a drift of the machine's speed hits all alike.

    Args:
        calls: What to time, by name.
        rounds: How often each is timed.
        warmup: Uncounted calls of each first.
        seconds: Stop after the round in which this much time has passed; at least three rounds are done. Uncounted
            calls take no more than as much again, but for one of each.
        pause: Seconds of rest before each timed call: threads of the call before, which some libraries let spin for
            a while, are asleep by then.
        lead: Uncounted calls right before each timed one, as of a client that asks again as soon as it is answered.
            Without them a call after a rest is timed, whose code and weights have left the processor's caches.

    Returns:
        Durations in seconds per name.
    """
    share = float("inf") if seconds is None else seconds / len(calls)
    for call in calls.values():
        begun = time.perf_counter()
        for done in range(warmup):
            if done and time.perf_counter() - begun > share:
                break
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(rounds):
        if seconds is not None and done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, call in calls.items():
            if pause:
                time.sleep(pause)
            for _ in range(lead):
                call()
            begin = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - begin)
    return samples


def ratio(samples: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """Return the median of a/b pair by pair: how many times longer ``a`` takes than ``b``."""
    return float(np.median([x / y for x, y in zip(samples[a], samples[b], strict=False)]))
