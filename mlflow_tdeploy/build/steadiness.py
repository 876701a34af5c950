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
#: How often a request is asked so: one time may happen to be close, of two places that are as good it may be the same.
_TIMES = 5
#: How many times as far off as the farthest of these an answer may be.
_AS_FAR = 4.0
#: What is off by no more than this part of an output's largest number, however often it is asked, is steady.
_STEADY = 1e-3


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
        self._found: dict[int, tuple[Arrays, Arrays]] = {}  # by the request, which is kept: its number is its own then

    def excused(self, feeds: Arrays, reference: Arrays, got: Arrays, budget: Budget) -> Arrays:
        """Return a variant's answer with the reference's numbers where those are not its own.

        That is in outputs that are further off than the budget allows with other roundings, and in which the variant is
        no further from the reference than that may be from itself. What is steady in them stays the variant's.

        Args:
            feeds: A request; it is asked once, however many variants differ from it.
            reference: The reference's answer to it.
            got: The variant's.
            budget: What holds for a single request.
        """
        excused = dict(got)
        for name, apart in self._unsteady(feeds, reference, budget).items():
            farthest = apart.max(initial=0.0)
            if _apart(got[name], reference[name]).max(initial=0.0) <= _AS_FAR * farthest:
                excused[name] = np.where(_noise(apart, reference[name]), reference[name], got[name])
        return excused

    def _unsteady(self, feeds: Arrays, reference: Arrays, budget: Budget) -> Arrays:
        """Return the outputs without an answer of their own, as how far off each of their numbers was at most."""
        key = id(feeds)
        if key not in self._found:
            self._found[key] = feeds, self._find(feeds, reference, budget)
            if self._found[key][1]:
                _log.info(
                    "The model has no answer of its own to zeros in %s: with other roundings it gives another one.",
                    ", ".join(sorted(self._found[key][1])),
                )
        return self._found[key][1]

    def _find(self, feeds: Arrays, reference: Arrays, budget: Budget) -> Arrays:
        far, unsteady = {name: np.zeros(array.shape) for name, array in reference.items()}, set[str]()
        try:
            for seed in range(_TIMES if self._shaken is not None else 0):
                got = self._shaken(feeds, seed) if self._shaken is not None else None
                if got is None or same_outputs(reference, got) is not None:
                    return {}
                unsteady |= {name for name in reference if self._differs(name, feeds, reference, got, budget)}
                far = {name: np.maximum(far[name], _apart(got[name], reference[name])) for name in reference}
        except Exception as error:  # whatever a model meets that is asked in another way: variants are judged then
            _log.debug("The model was not asked with other roundings.", exc_info=error)
            return {}
        return {name: far[name] for name in unsteady}

    def _differs(self, name: str, feeds: Arrays, reference: Arrays, got: Arrays, budget: Budget) -> bool:
        if not np.isfinite(got[name]).all():
            return True
        comparison = self._task.comparison()
        comparison.add(reference, {**reference, name: got[name]}, feeds)
        return bool(budget.violations(comparison.metrics(), single=True))


def _apart(one: Array, other: Array) -> Array:
    """Return how far apart the numbers of two answers are; infinitely where one is not finite and the other is."""
    mine, theirs = one.astype(np.float64), other.astype(np.float64)
    same = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.nan_to_num(np.abs(mine - theirs), nan=np.inf, posinf=np.inf))


def _noise(apart: Array, reference: Array) -> Array:
    """Tell which numbers of an output rounding makes, by how far off it puts them."""
    sizes = np.abs(reference.astype(np.float64))
    return apart > _STEADY * sizes.max(initial=0.0, where=np.isfinite(sizes))
