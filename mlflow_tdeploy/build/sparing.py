"""The fewest parts of a graph that have to stay as they are, for it to be within the budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeVar

from mlflow_tdeploy.build.sensitivity import by_sensitivity, fewest
from mlflow_tdeploy.build.trials import Trials

Key = TypeVar("Key", bound=Hashable)
#: Most graphs that are tried to find out which parts matter.
_TRIALS = 48
HOPELESS = "The graph that it starts from is over the budget itself"


def spare_fewest(
    trials: Trials[Key],
    parts: Sequence[str],
    sparing: Callable[[Collection[str]], Key],
    recipe: str,
    *,
    hopeless: str = HOPELESS,
) -> Key:
    """Return the graph that spares the fewest parts within the budget.

    Args:
        trials: Those of the search.
        parts: Names of what can be spared, in the order of the graph.
        sparing: Returns the key of the graph that spares some of them.
        recipe: Id of the recipe that looks for it.
        hopeless: What it means where not even the graph that spares all of them is within the budget.

    Raises:
        NothingWithinBudgetError: All of them would have to be spared.
    """

    def alone(names: Collection[str]) -> float:
        return trials.distance(sparing([name for name in parts if name not in set(names)]), alone=list(names))

    if trials.passes(sparing(())):
        return sparing(())
    if not trials.passes(sparing(parts)):
        raise trials.nothing_within(recipe, hopeless)
    order = by_sensitivity(parts, alone, trials=_TRIALS, enough=trials.order_known)
    count = _fewest(trials, order, sparing)
    while count is not None and count > 1 and not trials.late():
        # a sample may not show what a part does at worst: the one that made the difference comes first
        other = [order[count - 1], *order[: count - 1], *order[count:]]
        fewer = _fewest(trials, other, sparing)
        if fewer is None or fewer >= count:
            break
        order, count = other, fewer
    if count is None or count == len(order):
        raise trials.nothing_within(recipe)
    return sparing(order[:count])


def _fewest(trials: Trials[Key], order: Sequence[str], sparing: Callable[[Collection[str]], Key]) -> int | None:
    return fewest(len(order), lambda count: trials.passes(sparing(order[:count])), trials.late)
