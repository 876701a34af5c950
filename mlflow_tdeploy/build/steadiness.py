"""Which answers of a reference are its own, and which are only what rounding makes of a request that nobody gave."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.compare import same_outputs
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Array, Arrays

_log = logging.getLogger("mlflow_tdeploy")

#: Answers a request with other roundings, by a seed; None where that cannot be had.
Shaken = Callable[[Arrays, int], Arrays | None]
#: How often a request is asked so: one time may happen to be close.
_TIMES = 3
#: How many times as far off as the farthest of these an answer may be.
_AS_FAR = 4.0


class Steadiness:
    """Asks a reference with other roundings than its own, where a variant differs from it.

    Of zeros some models have no answer: the best five of places that are all as good, a constant signal less its mean
    divided by its deviation. Nothing can be held against that. What is changed is no input, as no change is small
    enough for every model and still does something: beside 1e-9 in ``log(p + 1e-9)`` a millionth is large. What is
    changed is each computed number, by a part of its own size: an epsilon beside zeros stays what it is.

    Args:
        task: The task.
        shaken: Answers with other roundings; None where the reference cannot be asked so.
    """

    def __init__(self, task: Task, shaken: Shaken | None) -> None:
        self._task = task
        self._shaken = shaken
        self._found: dict[int, dict[str, float]] = {}

    def excused(self, feeds: Arrays, reference: Arrays, got: Arrays, budget: Budget) -> frozenset[str]:
        """Name the outputs in which a variant is no further from the reference than that may be from itself.

        Only outputs count that are further off than the budget allows with other roundings.

        Args:
            feeds: A request; it is asked once, however many variants differ from it.
            reference: The reference's answer to it.
            got: The variant's.
            budget: What holds for a single request.
        """
        unsteady = self._unsteady(feeds, reference, budget)
        return frozenset(name for name, far in unsteady.items() if _distance(got[name], reference[name]) <= far)

    def _unsteady(self, feeds: Arrays, reference: Arrays, budget: Budget) -> dict[str, float]:
        """Return the outputs without an answer of their own, each with how far off one may be."""
        key = id(feeds)
        if key not in self._found:
            self._found[key] = self._find(feeds, reference, budget)
            if self._found[key]:
                _log.info(
                    "The model has no answer of its own to zeros in %s: with other roundings it gives another one.",
                    ", ".join(sorted(self._found[key])),
                )
        return self._found[key]

    def _find(self, feeds: Arrays, reference: Arrays, budget: Budget) -> dict[str, float]:
        far, unsteady = dict.fromkeys(reference, 0.0), set[str]()
        try:
            for seed in range(_TIMES if self._shaken is not None else 0):
                got = self._shaken(feeds, seed) if self._shaken is not None else None
                if got is None or same_outputs(reference, got) is not None:
                    return {}
                unsteady |= {name for name in reference if self._differs(name, feeds, reference, got, budget)}
                far = {name: max(far[name], _distance(got[name], reference[name])) for name in reference}
        except Exception as error:  # whatever a model meets that is asked in another way: variants are judged then
            _log.debug("The model was not asked with other roundings.", exc_info=error)
            return {}
        return {name: _AS_FAR * far[name] for name in unsteady}

    def _differs(self, name: str, feeds: Arrays, reference: Arrays, got: Arrays, budget: Budget) -> bool:
        if not np.isfinite(got[name]).all():
            return True
        comparison = self._task.comparison()
        comparison.add(reference, {**reference, name: got[name]}, feeds)
        return bool(budget.violations(comparison.metrics(), single=True))


def _distance(one: Array, other: Array) -> float:
    """Return how far apart two answers are at most; infinitely where one is not finite."""
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(apart.max(initial=0.0)) if np.isfinite(apart).all() else np.inf
