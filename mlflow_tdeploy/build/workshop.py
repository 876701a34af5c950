"""The part that logging a model and extending a bundle share: make a variant, check it, keep it or not."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from mlflow_tdeploy.build.calibration import Calibration
from mlflow_tdeploy.build.golden import golden_requests
from mlflow_tdeploy.build.judge import Judge
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.recipes import Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.reference import ReferenceAnswers
from mlflow_tdeploy.build.report import Step
from mlflow_tdeploy.build.stage import (
    Staged,
    check,
    make_measure,
    make_trial,
    opened,
    serves_on,
    stage_recipe,
    without_folder,
)
from mlflow_tdeploy.build.steadiness import Shaken
from mlflow_tdeploy.build.verify import Verified
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget, loss_of
from mlflow_tdeploy.core.errors import (
    BudgetError,
    BuildError,
    InvalidInputError,
    NoVariantError,
    SessionError,
    TDeployError,
)
from mlflow_tdeploy.core.evidence import OPENED, Evidence
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.latency import Contender, measure_latency
from mlflow_tdeploy.source.base import Source

_log = logging.getLogger("mlflow_tdeploy")
Progress = Callable[[Step], None]


class Workshop:
    """Makes and checks variants of one model.

    Args:
        task: The task.
        budget: How far a variant may be.
        options: The caller's options.
        work: A folder for everything on the way.
        source: The model itself, where it is at hand.
        golden: The golden requests of a model that was logged, where the source is not at hand.
        progress: Told of every step that ended, well or not.
    """

    def __init__(
        self,
        task: Task,
        budget: Budget,
        options: BuildOptions,
        work: Path,
        *,
        source: Source | None = None,
        golden: Sequence[GoldenRequest] = (),
        progress: Progress | None = None,
    ) -> None:
        self.task = task
        self.budget = budget
        self.options = options
        self.work = work
        self.source = source
        self.host: Fingerprint = probe.host()
        self.data: VerifyData = (options.data or VerifyData.of(None)).for_task(
            task, source.examples if source else [request.feeds for request in golden]
        )
        task.check_budget(budget, labels=self.data.labels is not None)
        self._golden = tuple(golden)
        self.steps: list[Step] = []
        self._progress = progress
        self._calibration = Calibration.of(task, self.data, options.calibrate)
        self._measure = make_measure(task, self.data, self.host) if options.measure else None
        self._trial = make_trial(task, self.data, self.host)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what is appended to the yielded list becomes its detail. One that fails is reported, too."""
        started = time.perf_counter()
        detail: list[str] = []
        try:
            yield detail
        except Exception as error:
            self._report(name, started, [f"failed: {brief(error)}"])
            raise
        self._report(name, started, detail)

    def _report(self, name: str, started: float, detail: Sequence[str]) -> None:
        done = Step(name, time.perf_counter() - started, ", ".join(detail))
        self.steps.append(done)
        self._tell(done)

    def _tell(self, step: Step) -> None:
        if self._progress is not None:
            self._progress(step)

    def golden(self) -> tuple[GoldenRequest, ...]:
        """Return the model's golden requests: those it was logged with, else new ones, answered by the source."""
        if not self._golden and self.source is not None:
            self._golden = golden_requests(self.task, self.data, self.source.reference)
        return self._golden

    def ask_reference(self, reference: Infer, parameters: int, shaken: Shaken | None = None) -> ReferenceAnswers:
        """Let the reference answer everything, once; with other roundings (``shaken``) where a variant differs."""
        with self.step("reference answers") as detail:
            folder = self.work / "reference"
            answers = ReferenceAnswers(self.task, self.data, reference, folder, parameters=parameters, shaken=shaken)
            detail.append(f"{len(self.data.items)} items ({self.data.name}), {', '.join(answers.corner_shapes)}")
            if answers.skipped:
                detail.append(f"not at {', '.join(answers.skipped)}, where the model fails")
            if answers.not_compared:
                detail.append(f"{answers.not_compared} rows of them without a finite answer, not compared")
            if answers.unanswered:
                _log.warning(
                    "The model has no finite answer to made-up values at %s: variants are not checked there. Show what "
                    "it takes at such sizes with verify_with=….",
                    ", ".join(answers.unanswered),
                )
            if why := answers.unrepeatable(reference, self.budget):
                raise InvalidInputError(
                    f"The model answers one request differently each time ({why}): it draws random numbers or keeps "
                    f"something from one request to the next, so that nothing can be compared with it. Switch that "
                    f"off (dropout, sampling, a counter) and log it again."
                )
            for limit in self.budget.limits:
                if limit.metric in answers.metric and not limit.allows(answers.metric[limit.metric]):
                    raise InvalidInputError(
                        f"The budget wants {limit}, and the original itself reaches {answers.metric[limit.metric]:.4g} "
                        f"on this data. Limit what may be lost instead, such as {loss_of(limit.metric)} <= 0.01."
                    )
        return answers

    def can_ask(self, recipe: type[Recipe]) -> bool:
        """Tell whether something here runs what a recipe makes."""
        return recipe.runs_on_cpu or self.host.gpu is not None

    def make(self, recipe: type[Recipe], parent: Graph | None, answers: ReferenceAnswers | None = None) -> Staged:
        """Run a recipe.

        Args:
            recipe: The recipe.
            parent: The graph that it starts from.
            answers: The reference's answers, for recipes that look for a graph within the budget.

        Raises:
            BuildError: It failed.
        """
        workdir = self.work / recipe.id
        workdir.mkdir()
        judge = Judge(answers, self.budget, self.golden(), self.host) if answers is not None else None
        context = RecipeContext(
            task=self.task,
            data=self.data,
            workdir=workdir,
            parent=parent,
            source=self.source,
            measure=self._measure,
            trial=self._trial,
            judge=judge,
            calibration=self._calibration,
            options=self.options.recipe_options.get(recipe.id),
            tried=lambda what, seconds: self._tell(Step(f"  try {recipe.id}", seconds, what)),
            search_seconds=self.options.search_seconds,
            search_trials=self.options.search_trials,
            opset=self.options.opset,
            exporter=self.options.exporter,
        )
        with self.step(f"make {recipe.id}") as detail:
            graph = _run(recipe, context)
            staged = stage_recipe(recipe, graph, self.work / "staged", self.host)
            detail.append(_made(staged))
        return staged

    def check(self, staged: Staged, answers: ReferenceAnswers) -> Verified:
        """Hold a variant against the reference's answers.

        Raises:
            BuildError: It cannot be opened.
            BudgetError: It is over budget and the caller wants that to be an error.
        """
        with self.step(f"check {staged.variant.id}") as detail:
            verified = check(staged, answers, self.budget, self.host, self.golden())
            detail.append(_found(verified, self.budget))
        if not verified.passed and self.options.on_budget == "raise":
            raise over_budget(staged.variant.id, verified)
        return verified

    def evidence(self, staged: Staged, verified: Verified, reference: str) -> list[Evidence]:
        """Return what a check found of a variant, whose files are still there: its accuracy, and what it told."""
        accuracy = verified.evidence(
            staged.variant.id,
            self.host,
            reference=reference,
            runtime=verified.runtime,
            threads=self.host.cores,
            budget=str(self.budget),
        )
        found = [accuracy]
        if verified.facts:
            settings = {**verified.facts, "runtime": verified.runtime}
            found.append(
                Evidence(staged.variant.id, OPENED, {}, host=self.host, settings=settings, created=accuracy.created)
            )
        return [replace(record, files=staged.variant.digest or None) for record in found]

    def latencies(self, kept: Mapping[str, Staged], others: Sequence[Contender]) -> list[Evidence]:
        """Time variants against each other, and what is no graph after them."""
        if not self.options.measure or not (kept or others):
            return []
        with self.step("latency"), ExitStack() as stack:
            contenders = []
            for staged in kept.values():
                if not serves_on(staged.variant, self.host):
                    continue
                session, runtime = stack.enter_context(
                    opened(staged.root, staged.variant, self.task.signature, self.host)
                )
                contenders.append(Contender.served(staged.variant, runtime, session.infer))
            measure = functools.partial(measure_latency, task=self.task, host=self.host, items=self.data.real)
            found = measure(contenders, seconds=self.options.seconds * 0.8)
            found = [replace(record, files=kept[record.variant].variant.digest) for record in found]
            # Apart: a model as slow as torch's would use up the rounds of the others.
            return found + measure(others, seconds=self.options.seconds * 0.2)


def _run(recipe: type[Recipe], context: RecipeContext) -> Graph:
    """Run a recipe; whatever a library raises in it becomes a BuildError, errors of the host stay what they are."""
    try:
        return recipe().run(context)
    except (SessionError, NoVariantError) as error:
        why = without_folder(error, context.workdir)
        raise BuildError(f"The recipe of '{recipe.id}' made a graph that cannot be served: {why}") from error
    except (TDeployError, OSError, MemoryError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # libraries wrap what happened in what they were doing
            cause = cause.__cause__
        raise BuildError(f"The recipe of '{recipe.id}' failed: {type(cause).__name__}: {brief(cause)}") from error


def brief(error: BaseException) -> str:
    """Return an error's message as one line of bearable length."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def over_budget(variant_id: str, verified: Verified) -> BudgetError:
    """Return the error for a variant that may not be kept."""
    data = verified.data
    found = "is over the model's budget" if verified.metrics else "fails"
    return BudgetError(
        f"Variant '{variant_id}' {found} on {data.count} items ({data.name}): "
        f"{'; '.join(verified.violations)}. Leave it out with precisions=…, "
        f"{'state a wider budget=…, ' if verified.is_close else ''}or use on_budget='drop' to log the model without "
        f"its files."
    )


def _made(staged: Staged) -> str:
    settings = staged.variant.precision.settings
    parts = [f"{staged.variant.size / 1e6:.0f} MB"]
    if "exporter" in settings:
        parts.append(f"{settings['exporter']}, opset {settings['opset']}")
    if "searched" in settings:
        parts.append(settings["searched"])
    if settings.get("left_out"):
        parts.append(f"left out {' and '.join(settings['left_out'])}")
    return ", ".join(parts)


def _found(verified: Verified, budget: Budget) -> str:
    if verified.violations:
        return f"{verified.verdict}: {'; '.join(verified.violations)}"
    return ", ".join(f"{limit.metric} {verified.metrics[limit.metric]:.4g}" for limit in budget.limits)
