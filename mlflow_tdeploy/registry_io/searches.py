"""Searches for quantized graphs as MLflow runs: each trial a step of its metrics, a table of them, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Metric, Param
from mlflow.utils.time import get_current_time_millis

from mlflow_tdeploy.core.budget import Budget, Limit
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.registry_io.plot import Point, can_draw, draw
from mlflow_tdeploy.registry_io.runs import PICTURE, log_metrics, log_rows, run_below
from mlflow_tdeploy.store.bundle import Bundle

#: Tag of a logged model: the run that holds the search for a variant.
SEARCH_TAG = "tdeploy.search."
TABLE = "trials.json"
_SPEED = "answering_seconds"


@dataclass(frozen=True)
class Search:
    """How a variant was found.

    Attributes:
        variant: Its id.
        outcome: What it is made of, in one line; empty where nothing was found within the budget.
        budget: The limits that it was looked for within.
        trials: Records of all graphs that were tried, in order.
    """

    variant: str
    outcome: str
    budget: tuple[Limit, ...]
    trials: tuple[Mapping[str, Any], ...]

    @property
    def tag(self) -> str:
        """Name of the logged model's tag that names the run."""
        return f"{SEARCH_TAG}{self.variant}" if self.outcome else f"{SEARCH_TAG}nothing.{self.variant}"

    def points(self) -> list[Point]:
        """Return the graphs that answered all questions: how long that took, and how close they were."""
        name = self.shown()
        return [
            Point(
                str(one["what"]),
                one[_SPEED],
                one[name],
                good=bool(one["passed"]),
                chosen=bool(one["passed"]) and one["what"] == self.outcome,  # others may spare as many, and fail
            )
            for one in self.trials
            if name in one and _SPEED in one
        ]

    def shown(self) -> str:
        """Return the metric that a picture shows: the first of the budget that was noted of each trial."""
        noted = set[str]().union(*(one.keys() for one in self.trials))
        return next((limit.metric for limit in self.budget if limit.metric in noted), "")


def searches(bundle: Bundle) -> tuple[Search, ...]:
    """Return the searches that a bundle's records tell of, those that found nothing when it was logged included."""
    limits = bundle.manifest.budget.limits
    nothing = (Search(name, "", limits, trials) for name, trials in bundle.manifest.tried.items() if trials)
    found = (
        Search(
            variant.id,
            str(variant.precision.settings.get("searched", "")),
            _budget(bundle, variant.id).limits,
            tuple(variant.precision.settings["trials"]),
        )
        for variant in bundle.variants.values()
        if variant.precision.settings.get("trials")
    )
    return (*found, *nothing)


def _budget(bundle: Bundle, variant: str) -> Budget:
    """Return the budget that a variant was looked for within, which may be stricter than the model's own."""
    checked = [record for record in bundle.evidence(variant) if record.kind == "accuracy"]
    first = min(checked, key=lambda record: record.created, default=None)
    try:
        return Budget.of(first.settings["budget"]) if first else bundle.manifest.budget
    except (InvalidInputError, LookupError):  # as an older version, or a newer one, says it
        return bundle.manifest.budget


def log_searches(client: MlflowClient, model: LoggedModel, found: Sequence[Search]) -> None:
    """Write each search that is not there yet as a run of its own, below the run that logged the model.

    A run of its own, as MLflow gives a logged model every metric that its run has at the model's step, and trials are
    steps. The tag ``tdeploy.search.<variant>`` of the model names it, ``tdeploy.search.nothing.<variant>`` the one of
    a search that found nothing.

    Args:
        client: Of the tracking server.
        model: The logged model.
        found: Its searches.
    """
    for search in found:
        if search.tag not in model.tags:
            log_search(client, model, search)


def log_search(client: MlflowClient, model: LoggedModel, search: Search) -> None:
    """Write one search as a run of its own, see :func:`log_searches`."""
    tags = {"tdeploy.variant": search.variant}
    with run_below(client, model, f"{model.name} {search.variant} search", tags) as run_id:
        _fill(client, run_id, search)
    client.set_logged_model_tags(model.model_id, {search.tag: run_id})


def _fill(client: MlflowClient, run_id: str, search: Search) -> None:
    now = get_current_time_millis()
    metrics = [
        Metric(name, float(value), now, step)
        for step, one in enumerate(search.trials)
        for name, value in one.items()
        if isinstance(value, (bool, int, float))
    ]
    params = {
        "variant": search.variant,
        "budget": ", ".join(map(str, search.budget)),
        "found": search.outcome or "nothing within the budget",
        "trials": len(search.trials),
    }
    log_metrics(client, run_id, metrics)
    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items()])
    log_rows(client, run_id, search.trials, TABLE)
    if can_draw() and (points := search.points()):
        name = search.shown()
        limit = next(one for one in search.budget if one.metric == name)
        figure = draw(points, x="seconds to answer the verification data", y=name, limit=limit)
        client.log_figure(run_id, figure, PICTURE)
