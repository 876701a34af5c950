"""Graphs that a recipe tries: each is made once, held against the source's answers, and remembered."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mlflow_tdeploy.build.judge import Judge
from mlflow_tdeploy.build.recipes import Graph, NothingWithinBudgetError, RecipeContext
from mlflow_tdeploy.build.verify import Verified

Key = TypeVar("Key", bound=Hashable)
_log = logging.getLogger("mlflow_tdeploy")
#: Share of a search that is for the order of parts.
_FOR_THE_ORDER = 0.6
_NOTHING = "No product of this graph can be quantized within the budget"
_LOOKED_AT = ("worst_cosine", "mean_cosine", "max_score_difference", "label_agreement", "span_agreement")


@dataclass(frozen=True)
class Trial:
    """What was found.

    Attributes:
        what: What was made, in one line.
        seconds: For making and asking it.
        distance: How far its answers to a sample are off, see :meth:`Judge.distance`; None where it was asked all.
        metrics: What a check of it found; empty where it was asked a sample.
        answering: Seconds that its answers took in that check, all questions one after the other.
        passed: Whether that is within the budget; None where it was asked a sample.
        violations: Why it is not.
    """

    what: str
    seconds: float
    distance: float | None = None
    metrics: dict[str, float] | None = None
    answering: float | None = None
    passed: bool | None = None
    violations: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.passed is None:
            return f"{self.what}: off by {self.distance:.2g}"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in (self.metrics or {}).items())
        return (
            f"{self.what}: {'within' if self.passed else 'over'} the budget ({figures or '; '.join(self.violations)})"
        )

    def record(self) -> dict[str, Any]:
        """Return it for a variant's record; figures that are no numbers are left out, as JSON has no such ones."""
        known = {"distance": self.distance, "answering_seconds": self.answering, **(self.metrics or {})}
        finite = {name: round(one, 6) for name, one in known.items() if one is not None and math.isfinite(one)}
        passed = {} if self.passed is None else {"passed": self.passed}
        why = {"violations": "; ".join(self.violations)} if self.violations else {}
        return {"what": self.what, "seconds": round(self.seconds, 2), **finite, **passed, **why}


class Trials(Generic[Key]):
    """Those of one search.

    Args:
        context: What the recipe works with: it says how long is looked, and is told of each.
        judge: Asks them.
        make: Makes the graph of a key; it may lie where the one before did.
        say: Says what a key is, in one line.
    """

    def __init__(
        self, context: RecipeContext, judge: Judge, make: Callable[[Key], Graph], say: Callable[[Key], str]
    ) -> None:
        self._context, self._judge, self._make, self._say = context, judge, make, say
        self._cut_short = False
        self._verdicts: dict[Key, Verified] = {}
        self._distances: dict[Key, float] = {}
        self._alone: dict[str, float] = {}
        self.all: list[Trial] = []

    def passes(self, key: Key) -> bool:
        """Tell whether a graph is within the budget."""
        if key not in self._verdicts:
            started = time.perf_counter()
            found = self._verdicts[key] = self._judge.verdict(self._make(key))
            self._note(
                Trial(
                    self._say(key),
                    time.perf_counter() - started,
                    metrics=self._short(found),
                    answering=found.seconds,
                    passed=found.passed,
                    violations=tuple(found.violations),
                )
            )
        return self._verdicts[key].passed

    def distance(self, key: Key, alone: Sequence[str] = ()) -> float:
        """Return how far a graph's answers to a sample are off; infinite where they are no numbers, or none.

        Args:
            key: The graph.
            alone: The parts that it is about, where it has been made to see what they do: neighbours, in order.
        """
        if key not in self._distances:
            started = time.perf_counter()
            found = self._distances[key] = self._judge.distance(self._make(key))
            self._note(Trial(self._say(key) + _only(alone), time.perf_counter() - started, distance=found))
        if len(alone) == 1:
            self._alone[alone[0]] = self._distances[key]
        return self._distances[key]

    def closest(self, keys: Mapping[str, Key]) -> str:
        """Return the name of the graph whose answers to a sample are off least, the first of several.

        Those that there is no time for are not asked, but for the first one.
        """
        distances: dict[str, float] = {}
        for name, key in keys.items():
            if not distances or not self.late():
                distances[name] = self.distance(key)
        return min(distances, key=distances.__getitem__)

    def late(self, share: float = 1.0) -> bool:
        """Tell whether the time, or the trials, are used up: what is not known by now is not looked for.

        Args:
            share: Of both, for what others come after.
        """
        context = self._context
        used = time.monotonic() - context.started > share * context.search_seconds
        late = used or len(self.all) >= share * context.search_trials
        self._cut_short = self._cut_short or late
        return late

    def order_known(self) -> bool:
        """Tell whether no more is to be found out about which parts matter: the checks after that are the dearest."""
        return self.late(_FOR_THE_ORDER)

    def settings(self, key: Key) -> dict[str, Any]:
        """Return what a record says of the search that has found a graph.

        ``cut_short`` where its bounds were reached: then another search may find another graph. ``off_alone``: how far
        answers to a sample are off where one part is quantized and no other; of parts that were looked at one by one.
        """
        cut_short = {"cut_short": True} if self._cut_short else {}
        if cut_short:
            _log.warning(
                "A search was cut short after %d graphs: %s is what it knew by then. A longer one may find better: "
                "search_seconds=, search_trials= (--minutes, --trials).", len(self.all), self._say(key),
            )  # fmt: skip
        alone = {name: float(f"{off:.3g}") for name, off in self._alone.items() if math.isfinite(off)}
        trials = [one.record() for one in self.all]
        return {"searched": self._say(key), "trials": trials, **({"off_alone": alone} if alone else {}), **cut_short}

    def nothing_within(self, recipe: str, what: str = "") -> NothingWithinBudgetError:
        """Return the error of a search that has found nothing, with all that was tried.

        Args:
            recipe: Id of the recipe.
            what: What is certain, however long is looked; empty where a longer search might find something.
        """
        advice = f"State a wider budget, or leave '{recipe}' out."
        if self._cut_short and not what:
            what = f"Nothing within the budget was found by {len(self.all)} graphs, when the search was cut short"
            advice = f"Give it more (search_seconds=, search_trials=; --minutes, --trials). Else: {advice.lower()}"
        return NothingWithinBudgetError(
            f"{what or _NOTHING}; of the last one tried {self.failure}. {advice}",
            [one.record() for one in self.all],
            self._judge.budget,
        )

    def _note(self, trial: Trial) -> None:
        self.all.append(trial)
        self._context.tried(str(trial), trial.seconds)

    @property
    def failure(self) -> str:
        """Why the last graph that was over the budget was, in one line."""
        over = (one.violations for one in reversed(self._verdicts.values()) if not one.passed)
        return "; ".join(next(over, ()))

    def _short(self, found: Verified) -> dict[str, float]:
        """Return the figures that people look at, and those that the budget is about."""
        looked_at = {*_LOOKED_AT, *(limit.metric for limit in self._judge.budget.limits)}
        return {
            name: float(value)
            for name, value in found.metrics.items()
            if name in looked_at or name.endswith(("_drop", "_rise"))
        }


def _only(parts: Sequence[str]) -> str:
    """Say which parts a graph was made for."""
    if not parts:
        return ""
    return f"; only {parts[0]}" if len(parts) == 1 else f"; only {parts[0]} to {parts[-1]} ({len(parts)})"
