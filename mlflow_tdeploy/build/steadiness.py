"""Which answers of a reference are its own, and which are only what rounding makes of a request that nobody gave."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.compare import same_outputs
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays

_log = logging.getLogger("mlflow_tdeploy")

#: Answers a request with other roundings, by a seed; None where that cannot be had.
Shaken = Callable[[Arrays, int], Arrays | None]
#: How often a request is asked so: one time may happen to be close.
_TIMES = 3


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
        self._found: dict[int, frozenset[str]] = {}

    def unsteady(self, feeds: Arrays, reference: Arrays, budget: Budget) -> frozenset[str]:
        """Name the outputs that are further from the reference's than the budget allows with other roundings.

        Args:
            feeds: A request; it is asked once, however many variants differ from it.
            reference: The reference's answer to it.
            budget: What holds for a single request.
        """
        key = id(feeds)
        if key not in self._found:
            self._found[key] = self._find(feeds, reference, budget)
            if self._found[key]:
                _log.info(
                    "The model has no answer of its own to zeros in %s: with other roundings it gives another one.",
                    ", ".join(sorted(self._found[key])),
                )
        return self._found[key]

    def _find(self, feeds: Arrays, reference: Arrays, budget: Budget) -> frozenset[str]:
        found: set[str] = set()
        try:
            for seed in range(_TIMES if self._shaken is not None else 0):
                got = self._shaken(feeds, seed) if self._shaken is not None else None
                if got is None or same_outputs(reference, got) is not None:
                    return frozenset()
                found |= {name for name in reference if self._differs(name, feeds, reference, got, budget)}
        except Exception as error:  # whatever a model meets that is asked in another way: variants are judged then
            _log.debug("The model was not asked with other roundings.", exc_info=error)
            return frozenset()
        return frozenset(found)

    def _differs(self, name: str, feeds: Arrays, reference: Arrays, got: Arrays, budget: Budget) -> bool:
        if not np.isfinite(got[name]).all():
            return True
        comparison = self._task.comparison()
        comparison.add(reference, {**reference, name: got[name]}, feeds)
        return bool(budget.violations(comparison.metrics(), single=True))
