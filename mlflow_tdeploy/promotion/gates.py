"""Gates that are asked of a version while it is on the server, before anybody else is answered by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlflow_tdeploy.core.budget import higher_is_better
from mlflow_tdeploy.core.errors import InvalidInputError, VerificationError
from mlflow_tdeploy.core.labelled import Labelled
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.deploy.apply import Judge
from mlflow_tdeploy.deploy.ask import ask
from mlflow_tdeploy.deploy.state import State
from mlflow_tdeploy.promotion.spec import Metric
from mlflow_tdeploy.triton.bundle_version import BundleVersion
from mlflow_tdeploy.triton.client import TritonClient
from mlflow_tdeploy.triton.repository import Deployable


def measured_by(task: str, quality: Sequence[str], metric: Metric) -> str:
    """Return the name of the metric that a gate is about.

    Raises:
        InvalidInputError: The task measures none, or not that one.
    """
    if not quality:
        raise InvalidInputError(f"Task '{task}' has no metric on labelled data: leave the gate 'metric' out.")
    if metric.name and metric.name not in quality:
        raise InvalidInputError(f"Task '{task}' does not measure '{metric.name}', but {', '.join(quality)}.")
    return metric.name or quality[0]


def metric_gate(metric: Metric | None, found: State, name: str) -> Judge | None:
    """Return what asks a version's trial all labelled texts, and the version that serves the same.

    Args:
        metric: The gate; None for none.
        found: What is deployed on the server.
        name: The stable name.
    """
    if metric is None:
        return None

    def judge(what: Deployable, trial: str) -> None:
        if not isinstance(what, BundleVersion):
            raise InvalidInputError("A Triton model, as it is, has no metric on labelled data.")
        data, task = Labelled.read(Path(metric.data)), what.bundle.task()
        measured = measured_by(task.name, task.quality, metric)
        new = _asked(found.client, trial, task, data, measured, what.version)
        if found.answering(name) is None:
            return  # nothing serves: there is nothing to be worse than
        old = _asked(found.client, name, task, data, measured, None)
        lost = old - new if higher_is_better(measured) else new - old
        if lost > metric.worse_by:
            raise VerificationError(
                f"{measured} of version {what.version} on '{Path(metric.data).name}' ({len(data.texts)} texts) is "
                f"{new:.4g}, that of the version which serves {old:.4g}: worse by more than {metric.worse_by:g}."
            )

    return judge


def _asked(
    client: TritonClient, name: str, task: Task, data: Labelled, metric: str, version: int | None
) -> float:  # fmt: skip
    task.check_labels(data.labels, task.items(list(data.texts)))
    return task.metric(ask(client, name, list(data.texts), version=version, params=task.scored), data.labels)[metric]
