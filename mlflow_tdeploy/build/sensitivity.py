"""Which parts of a graph bear eight bits least, and how few of them have to be spared: searches that know no graphs."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

#: How far off answers are where only these parts are changed.
Distance = Callable[[Sequence[str]], float]


def by_sensitivity(
    parts: Sequence[str], distance: Distance, *, trials: int, enough: Callable[[], bool] = lambda: False
) -> list[str]:
    """Return parts of a graph, those first that do most to its answers.

    Groups of neighbours are halved, the worst one first: a single part among many is found in a few trials, and where
    trials are used up, those that are not told apart do little. Errors of parts are taken to add up as independent
    ones do, by their squares.

    Args:
        parts: Their names, in the order of the graph.
        distance: See :data:`Distance`; what is not finite counts as infinitely far.
        trials: Most calls of it.
        enough: Asked before every two of them; once it says so, what is not told apart yet stays in the graph's order.
    """
    place = {part: index for index, part in enumerate(parts)}
    waiting = [(0.0, 0, tuple(parts))] if parts else []
    done: list[tuple[float, int, tuple[str, ...]]] = []
    while waiting:
        _, _, group = heapq.heappop(waiting)
        if len(group) == 1 or trials < 2 or enough():
            continue
        trials -= 2
        middle = len(group) // 2
        done = [one for one in done if one[2] != group]
        for half in (group[:middle], group[middle:]):
            off = _finite(distance(half))
            done.append((off / math.sqrt(len(half)), place[half[0]], half))
            heapq.heappush(waiting, (-off, place[half[0]], half))
    if not done:
        return list(parts)
    return [part for _, _, group in sorted(done, key=lambda one: (-one[0], one[1])) for part in group]


def fewest(count: int, good: Callable[[int], bool], enough: Callable[[], bool] = lambda: False) -> int | None:
    """Return the fewest parts, from the first on, with which all is well; None where it is not with all of them.

    Args:
        count: How many there are.
        good: Whether all is well with so many; more are taken to be no worse.
        enough: Asked from the first number on that is good; once it says so, what is good so far is taken.
    """
    if good(0):
        return 0
    bad, tried = 0, min(1, count)
    while tried > bad and not good(tried):
        bad, tried = tried, min(2 * tried, count - 1 if tried < count - 1 else count)
    if tried == bad:
        return None
    while tried - bad > 1 and not enough():
        middle = (bad + tried) // 2
        bad, tried = (bad, middle) if good(middle) else (middle, tried)
    return tried


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
