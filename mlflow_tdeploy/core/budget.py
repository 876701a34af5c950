"""How far a variant may be from its reference."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlflow_tdeploy.core.compare import EXACT_SHARE, MEAN_SPREAD, VALUE_SHARE
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.quality import SHARES

#: How good answers are beside the right ones, and how much worse than the original's.
_LOST = (*(f"{name}_drop" for name in SHARES), "loss", "loss_rise")
#: Shares of rows whose best answer is the original's.
_AGREEMENT = ("label_agreement", "span_agreement")
#: Metrics that get worse when they fall; every other known one gets worse when it rises.
_HIGHER_IS_BETTER = frozenset({"worst_cosine", "mean_cosine", EXACT_SHARE, VALUE_SHARE, *_AGREEMENT, *SHARES})
_LOWER_IS_BETTER = frozenset(
    {
        "max_difference",
        "max_relative_difference",
        "max_norm_difference",
        "max_spread_error",
        MEAN_SPREAD,
        "max_part_error",
        "max_score_difference",
        *_LOST,
        "non_finite",
    }
)
#: Shares and means of many rows: a single request says nothing about them.
_OF_MANY = frozenset(
    {"mean_cosine", EXACT_SHARE, VALUE_SHARE, *_AGREEMENT, *SHARES, *_LOST}
    | {"max_spread_error", MEAN_SPREAD, "max_part_error"}
)
_LARGEST = sys.float_info.max
#: Shares of whole numbers that have to be the reference's own, as a choice may turn where two were as good: of many
#: requests, of a single one, of which one choice may be a large share, and whose numbers they are.
_CHOICES = {EXACT_SHARE: (0.99, 0.5, ""), VALUE_SHARE: (0.7, 0.0, " of one value")}
#: How many whole numbers that differ were chosen from scores that are equal; and what to do about them.
TIED = "tied_differences"
_OF_TIES = (
    "; some are chosen among equal scores, of which each runtime takes another one first: have the model break such "
    "ties, for example by scores - 1e-6 * position"
)
_LIMIT = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=|≥|≤)\s*([-+0-9.eE]+)\s*")


def is_metric(metric: str) -> bool:
    """Tell whether a budget can limit it: counts of rows are no metrics."""
    return metric in _HIGHER_IS_BETTER | _LOWER_IS_BETTER


def higher_is_better(metric: str) -> bool:
    """Tell the direction of a known metric.

    Raises:
        InvalidInputError: The metric is not known.
    """
    if not is_metric(metric):
        known = ", ".join(sorted(_HIGHER_IS_BETTER | _LOWER_IS_BETTER))
        raise InvalidInputError(f"Unknown metric {metric!r} in a budget. Known: {known}.")
    return metric in _HIGHER_IS_BETTER


def loss_of(metric: str) -> str:
    """Return what it is called by how much a variant is worse than its reference in a metric."""
    return f"{metric}_drop" if higher_is_better(metric) else f"{metric}_rise"


@dataclass(frozen=True)
class Limit:
    """One bound, for example ``worst_cosine >= 0.99``."""

    metric: str
    op: Literal[">=", "<="]
    bound: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.bound):
            raise InvalidInputError(f"The bound of {self.metric!r} must be a finite number, got {self.bound!r}.")
        if self.op not in (">=", "<="):
            raise InvalidInputError(f"A limit is '>=' or '<=', got {self.op!r} for {self.metric!r}.")

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.bound:.10g}"

    def violation(self, metrics: Mapping[str, float]) -> str | None:
        """Return why ``metrics`` break this limit, or None. What was not measured counts as broken."""
        if self.metric not in metrics:
            return f"{self.metric} was not measured (budget {self})"
        value = metrics[self.metric]
        if self.allows(value):
            return None
        texts = (f"{value:.{digits}g}" for digits in (4, 6, 8, 10, 12))
        told = next(
            (text for text in texts if not self.allows(float(text))), repr(value)
        )  # "1 is not >= 1" helps nobody
        return f"{self.metric} is {told} (budget {self})"

    def allows(self, value: float) -> bool:
        """Tell whether a value keeps this limit."""
        return value >= self.bound if self.op == ">=" else value <= self.bound


@dataclass(frozen=True)
class Budget:
    """All limits of a model; a variant that breaks one is never chosen."""

    limits: tuple[Limit, ...]

    @classmethod
    def of(cls, value: object) -> Budget:
        """Make a budget from what a user writes.

        Args:
            value: A Budget, ``"worst_cosine >= 0.99"``, several of them separated by commas or in a list, or a
                mapping from metric to bound (the direction follows from the metric).

        Raises:
            InvalidInputError: Not of that form, an unknown metric or a wrong direction.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            if not value:
                raise _empty()
            return cls(tuple(_limit_of(name, bound) for name, bound in value.items()))
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, Iterable):
            raise InvalidInputError(f"A budget is text like 'worst_cosine >= 0.99' or a mapping, got {value!r}.")
        if not (limits := tuple(_parse_limit(part) for part in value)):
            raise _empty()
        return cls(limits)

    def violations(self, metrics: Mapping[str, float], *, single: bool = False) -> tuple[str, ...]:
        """Return every broken limit as a sentence.

        Numbers that are not finite always break it. So do whole numbers of which more than 1 % differ, or 30 % of one
        value, unless ``exact_share`` and ``value_share`` are limited.

        Args:
            metrics: What was measured.
            single: On one request only: shares and means of many, and what was not measured, are left out.
        """
        limits = [one for one in self.limits if not single or (one.metric in metrics and one.metric not in _OF_MANY)]
        found = [] if not metrics.get("non_finite") else [f"{metrics['non_finite']:.0f} values are NaN or infinite"]
        stated = {limit.metric for limit in self.limits}
        for metric, (least, alone, whose) in _CHOICES.items():
            share = metrics.get(metric, 1.0)
            if metric not in stated and share < (alone if single else least):
                allowed = f"allow that with budget='{self}, {metric} >= …'"
                tied = _OF_TIES if metrics.get(TIED) else ""
                found.append(f"{100 * (1 - share):.3g} % of the whole numbers{whose} differ ({allowed}{tied})")
        found += [text for limit in limits if (text := limit.violation(metrics))]
        return tuple(found)

    def of_one(self, usual: Budget) -> Budget:
        """Return this budget, or the usual one where no limit of it says anything about a single request."""
        return self if any(limit.metric not in _OF_MANY for limit in self.limits) else usual

    def tightened(self, by: Budget) -> Budget:
        """Return this budget with limits of another one that are at least as strict, or new.

        Raises:
            InvalidInputError: A limit is wider than this budget's for the same metric.
        """
        for limit in by.limits:
            for own in self.limits:
                if own.metric == limit.metric and not own.allows(limit.bound):
                    raise InvalidInputError(
                        f"The limit '{limit}' is wider than the model's own '{own}', and a variant beyond that one "
                        f"could never serve: a model's budget is fixed when it is logged. State a stricter limit or "
                        f"none, or log the model again with a wider budget."
                    )
        stated = {limit.metric for limit in by.limits}
        return Budget((*(own for own in self.limits if own.metric not in stated), *by.limits))

    def __str__(self) -> str:
        return ", ".join(map(str, self.limits)) or "no limit"


def _empty() -> InvalidInputError:
    return InvalidInputError("The budget is empty. State a limit, or leave it out for the task's default.")


def _limit_of(metric: object, bound: object) -> Limit:
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or abs(bound) > _LARGEST:
        raise InvalidInputError(f"The bound of {metric!r} must be a number, got {bound!r}.")
    return _checked(Limit(str(metric), ">=" if higher_is_better(str(metric)) else "<=", float(bound)))


def _parse_limit(part: Any) -> Limit:
    if isinstance(part, Limit):
        return _checked(part)
    match = _LIMIT.fullmatch(part) if isinstance(part, str) else None
    if match is None:
        raise InvalidInputError(f"Cannot read the limit {part!r}. Write it like 'worst_cosine >= 0.99'.")
    metric, op, bound = match.groups()
    try:
        number = float(bound)
    except ValueError:
        raise InvalidInputError(f"The bound of {metric!r} must be a number, got {bound!r}.") from None
    return _checked(Limit(metric, ">=" if op in (">=", "≥") else "<=", number))


def _checked(limit: Limit) -> Limit:
    """Return a limit that somebody states here. One that is read may be on what a newer version measures."""
    direction = ">=" if higher_is_better(limit.metric) else "<="
    if limit.op != direction:
        raise InvalidInputError(f"The limit '{limit}' has the wrong direction: use '{direction}'.")
    if limit.op == ">=" and limit.bound > 1:  # cosines, and shares
        raise InvalidInputError(f"No variant can keep '{limit}': {limit.metric} is 1 at most.")
    return limit


#: What tells one answer from another has to stay: an answer that never changes is off by 1 and more.
SPREAD = Limit("max_spread_error", "<=", 0.8)
#: A part that is gone is off by 1, one with its sign turned by 2.
PART = Limit("max_part_error", "<=", 0.7)
#: What is predicted (a price, a temperature; each of fewer than 32 targets) keeps 94 % of its variance.
MEAN = Limit(MEAN_SPREAD, "<=", 0.25)
#: Direction, length and what tells them apart: what answers that are vectors have to keep.
VECTOR_BUDGET = Budget((Limit("worst_cosine", ">=", 0.99), Limit("max_norm_difference", "<=", 0.1), SPREAD))
