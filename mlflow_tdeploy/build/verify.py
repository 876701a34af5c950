"""How close a variant is to its reference: the same questions, output by output, held against the budget."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlflow_tdeploy.build.reference import Case, ReferenceAnswers, Score
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget, higher_is_better, is_metric, loss_of
from mlflow_tdeploy.core.compare import Comparison, same_outputs
from mlflow_tdeploy.core.evidence import DataRecord, Evidence, now, verdict
from mlflow_tdeploy.core.golden import GoldenRequest, check_golden
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.tensors import Arrays

__all__ = ["ReferenceAnswers", "Verified", "VerifyData", "verify"]

#: After so many batches without a comparable answer the rest is not asked.
_MOST_PROBLEMS = 3
#: What is said of a request that was made up.
ZEROS = "where inputs are 0 throughout"


@dataclass(frozen=True)
class Verified:
    """What a verification found: the part of accuracy evidence that does not depend on the host.

    Attributes:
        metrics: Over all batches, or over the items alone where that is worse.
        violations: Why it failed; empty when the budget holds.
        shapes: Corners really covered.
        data: What was asked.
        settings: The same metrics for corners and items apart, and how many batches each.
        runtime: Name of the runtime that answered.
        facts: What the opened variant told about itself.
        seconds: How long its answers took, one after the other.
        failed: Whether it did not answer everything, or not in the form of the reference.
    """

    metrics: Mapping[str, float]
    violations: tuple[str, ...]
    data: DataRecord
    shapes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    runtime: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    failed: bool = False

    @property
    def is_close(self) -> bool:
        """Whether a wider budget would hold: the variant answers everything, in finite numbers."""
        return bool(self.metrics) and not self.failed and not self.metrics.get("non_finite")

    @property
    def passed(self) -> bool:
        """Whether the budget holds."""
        return not self.violations

    @property
    def verdict(self) -> str:
        """The outcome in two words."""
        return verdict(self.violations, self.metrics)

    def evidence(self, variant: str, host: Fingerprint | None = None, **settings: Any) -> Evidence:
        """Return it as the evidence record of a variant."""
        return Evidence(
            variant=variant,
            kind="accuracy",
            metrics=dict(self.metrics),
            data=self.data,
            host=host,
            passed=self.passed,
            violations=self.violations,
            shapes=self.shapes,
            settings={**self.settings, **settings},
            created=now(),
        )


def verify(answers: ReferenceAnswers, infer: Infer, budget: Budget, golden: Sequence[GoldenRequest] = ()) -> Verified:
    """Ask a variant everything that the reference was asked.

    Never raises for what the variant does: an error, a missing output, a wrong shape or a value that is not finite
    is a violation.

    Args:
        answers: The reference's answers.
        infer: The variant.
        budget: How far it may be.
        golden: Requests of which each session replays the first before it serves.
    """
    asked = _Asked(answers, budget.of_one(answers.task.usual_budget()))
    for case, reference in answers:
        asked.ask(case, reference, infer)
        if len(asked.problems) >= _MOST_PROBLEMS:
            break
    metrics = asked.metrics()
    violations = (*asked.problems, *(budget.violations(metrics) if metrics else ()), *asked.over)
    if golden and not violations:  # what fails there must not pass here: it would be refused wherever it is loaded
        violations = asked.replay(golden, infer, budget)
    failed = bool(asked.problems)
    return Verified(
        metrics, violations, answers.data.record, asked.shapes, asked.settings(), seconds=asked.seconds, failed=failed
    )


class _Asked:
    """One variant's comparison in progress."""

    def __init__(self, answers: ReferenceAnswers, usual: Budget) -> None:
        self._answers, self._usual = answers, usual
        self._score = Score(answers.task, answers.data)
        self._whole = answers.task.comparison()
        self._parts: dict[str, Comparison] = {}
        self._batches: dict[str, int] = {}
        self._shapes: dict[str, None] = {}
        self.problems: list[str] = []
        self.over: list[str] = []
        self.seconds = 0.0

    @property
    def shapes(self) -> tuple[str, ...]:
        """The corners that were answered, each once."""
        return tuple(self._shapes)

    def ask(self, case: Case, reference: Arrays, infer: Infer) -> None:
        started = time.perf_counter()
        try:
            got = infer(case.feeds)
            self.seconds += time.perf_counter() - started
            problem = same_outputs(reference, got)
        except Exception as error:  # whatever a runtime raises is the variant's failure
            problem = str(error) or type(error).__name__
        if problem is None and case.part == "blanks":
            problem = _lost(reference, got) and _lost(reference, self._excused(case, reference, got))
        if problem is not None:
            self.problems.append(f"at {case.shape}: {problem}")
            return
        if case.part == "blanks":
            self._judge_alone(case, reference, got)
            return
        part = self._parts.setdefault(case.part, self._answers.task.comparison())
        for comparison in (self._whole, part):
            comparison.add(reference, got, case.feeds)
        if case.part == "corners" and case.shape not in self._answers.unanswered:
            self._shapes[case.shape] = None
        self._batches[case.part] = self._batches.get(case.part, 0) + 1
        self._score.add(case, got)

    def _judge_alone(self, case: Case, reference: Arrays, got: Arrays) -> None:
        """Hold one request against the budget; not where the source has no answer either, or none of its own."""
        if not all(np.isfinite(array).all() for array in reference.values()):
            return
        wrong = self._wrong(case, reference, got) and self._wrong(case, reference, self._excused(case, reference, got))
        self.over += [f"at {case.shape}, {ZEROS}, {one}" for one in wrong]

    def _excused(self, case: Case, reference: Arrays, got: Arrays) -> Arrays:
        """Return an answer without what the model has no answer of its own to."""
        return self._answers.steadiness.excused(case.feeds, reference, got, self._usual)

    def _wrong(self, case: Case, reference: Arrays, got: Arrays) -> list[str]:
        comparison = self._answers.task.comparison()
        comparison.add(reference, got, case.feeds)
        return list(self._usual.violations(comparison.metrics(), single=True))

    def replay(self, golden: Sequence[GoldenRequest], infer: Infer, budget: Budget) -> tuple[str, ...]:
        try:
            problem = check_golden(self._answers.task, budget, golden, infer)
        except Exception as error:  # as above
            problem = str(error) or type(error).__name__
        return () if problem is None else (f"golden request: {problem}",)

    def metrics(self) -> dict[str, float]:
        if not self._parts:
            return {}
        metrics = self._whole.metrics()
        if "items" in self._parts:  # what nobody gave may be so large that nothing is seen of what somebody did
            metrics = _worse(metrics, self._parts["items"].metrics())
        for name, value in ({} if self.problems else self._score.metric()).items():
            reference = self._answers.metric[name]
            lost = reference - value if higher_is_better(name) else value - reference
            metrics |= {name: value, f"reference_{name}": reference, loss_of(name): lost}
        return metrics

    def settings(self) -> dict[str, Any]:
        return {
            part: {"batches": self._batches[part], **comparison.metrics()} for part, comparison in self._parts.items()
        }


def _lost(reference: Arrays, got: Arrays) -> str | None:
    """Return what is no longer finite where inputs are 0."""
    for name, array in reference.items():
        if (np.isfinite(array) & ~np.isfinite(got[name])).any():
            return f"'{name}' is NaN or infinite {ZEROS}, and the source's own is not"
    return None


def _worse(whole: Mapping[str, float], part: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of all batches, or of a part of them where those are worse."""
    bounded = {name: value for name, value in part.items() if name in whole and is_metric(name)}
    worse = {name: (min if higher_is_better(name) else max)(whole[name], value) for name, value in bounded.items()}
    return {**whole, **worse}
