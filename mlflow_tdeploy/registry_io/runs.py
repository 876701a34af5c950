"""Runs that say how a logged model came about, or what it does: below the run that logged it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Metric
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

#: Step of what is known of a logged model, which no model has: MLflow gives every model what its run has at its own.
EVIDENCE_STEP = -1
#: Name of a picture of accuracy against speed among a run's artifacts.
PICTURE = "accuracy_against_speed.png"
#: MLflow takes at most 1000 metrics in a batch.
_MOST = 900


@contextlib.contextmanager
def run_below(client: MlflowClient, model: LoggedModel, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """Yield the id of a new run about a logged model, finished or failed at the end of the block.

    Args:
        client: Of the tracking server.
        model: The model; where a run has logged it, the new one is below that.
        name: Of the run.
        tags: Of the run, besides the model's id.
    """
    parent = {MLFLOW_PARENT_RUN_ID: model.source_run_id} if model.source_run_id else {}
    tags = {"tdeploy.model_id": model.model_id, **parent, **tags}
    run_id = client.create_run(model.experiment_id, tags=tags, run_name=name).info.run_id
    try:
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id)


def log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    """Write metrics, however many."""
    for start in range(0, len(metrics), _MOST):
        client.log_batch(run_id, metrics=metrics[start : start + _MOST])


def log_rows(client: MlflowClient, run_id: str, rows: Sequence[Mapping[str, Any]], file: str) -> None:
    """Write a table that MLflow's page shows; what a row has not is empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    client.log_table(run_id, {name: [row.get(name) for row in rows] for name in columns}, file)
