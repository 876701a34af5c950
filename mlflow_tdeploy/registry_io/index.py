"""Tags and metrics of a logged model, so that MLflow's search finds variants by their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, LoggedModel, Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis

from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.registry_io.runs import EVIDENCE_STEP, log_metrics
from mlflow_tdeploy.registry_io.searches import Search, log_search, log_searches
from mlflow_tdeploy.store.bundle import Bundle

#: Tag of a logged model: the run that holds its evidence, where no run has logged it.
EVIDENCE_RUN = "tdeploy.evidence_run"


def describe(bundle: Bundle) -> tuple[dict[str, str], dict[str, float]]:
    """Return the tags and metrics of a logged model that make its variants and evidence searchable.

    Tags: ``tdeploy.task``, ``.source``, ``.budget``, ``.dims``, ``.variants`` (those within budget), ``.precisions``
    (theirs) and ``tdeploy.variant.<id>`` = ``ok``, ``over budget``, ``failed``, ``unverified`` or ``not made``.
    Metrics: ``<variant id>.<metric>``, from the newest accuracy and latency record of each variant.
    """
    manifest = bundle.manifest
    states = {variant.id: _state(bundle, variant) for variant in bundle.variants.values()}
    good = sorted(name for name, state in states.items() if state == "ok")
    tags = {
        "tdeploy.task": manifest.task,
        "tdeploy.source": manifest.source.name,
        "tdeploy.budget": str(manifest.budget),
        "tdeploy.dims": ", ".join(f"{dim.name}={dim.min}..{dim.max}" for dim in manifest.signature.dims),
        "tdeploy.variants": ",".join(good),
        "tdeploy.precisions": ",".join(sorted({bundle.variants[name].precision.name for name in good})),
        **{f"tdeploy.variant.{name}": state for name, state in states.items()},
        **{f"tdeploy.variant.{name}": "not made" for name in bundle.not_made},
    }
    metrics: dict[str, float] = {}
    for name in states:
        records = bundle.evidence(name)
        latencies = [record for record in records if record.kind == "latency"]
        newest = (latest_accuracy(records), max(latencies, key=lambda record: record.created, default=None))
        metrics |= {f"{name}.{key}": value for record in newest if record for key, value in record.metrics.items()}
    return tags, metrics


def _state(bundle: Bundle, variant: Variant) -> str:
    accuracy = latest_accuracy(bundle.evidence(variant.id))
    if accuracy is not None:
        return "ok" if accuracy.passed else accuracy.verdict
    return "ok" if variant.id == bundle.manifest.reference else "unverified"


def _with_unreadable(tags: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """Return the tags with those variants that another host found good and whose records cannot be read here."""
    prefix = "tdeploy.variant."
    good = {key.removeprefix(prefix) for key, state in before.items() if key.startswith(prefix) and state == "ok"}
    others = {name for name in good if prefix + name not in tags}
    if not others:
        return dict(tags)
    precisions = {*tags.get("tdeploy.precisions", "").split(","), *before.get("tdeploy.precisions", "").split(",")}
    variants = {*tags.get("tdeploy.variants", "").split(","), *others}
    joined = {"tdeploy.variants": variants, "tdeploy.precisions": precisions}
    return {**tags, **{key: ",".join(sorted(names - {""})) for key, names in joined.items()}}


def tag_logged_model(
    model_id: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    searches: Sequence[Search] = (),
    *,
    again: Sequence[Search] = (),
) -> None:
    """Write what :func:`describe` returned to a logged model, so that ``search_logged_models`` finds it.

    MLflow keeps a logged model's metrics with a run: the one that logged the model, else a new one of that purpose.
    They are at the step -1, at which no model is logged: MLflow gives every model what its run has at the model's own
    step, and a second model of the run would be found by the evidence of the first one.

    Args:
        model_id: The logged model.
        tags: Its tags.
        metrics: Its metrics.
        searches: How variants were found; each becomes a run of its own, once.
        again: Searches that become a run each in any case.
    """
    client = MlflowClient()
    model = client.get_logged_model(model_id)
    kept = _with_unreadable(tags, model.tags)
    client.set_logged_model_tags(model_id, {key: value for key, value in kept.items() if value})
    if metrics:
        _log_metrics(client, model, metrics)
    log_searches(client, model, searches)
    for search in again:
        log_search(client, model, search)


def _log_metrics(client: MlflowClient, model: LoggedModel, metrics: Mapping[str, float]) -> None:
    now = get_current_time_millis()
    entries = [Metric(key, value, now, EVIDENCE_STEP, model_id=model.model_id) for key, value in metrics.items()]
    log_metrics(client, model.source_run_id or _run_of_its_own(client, model), entries)


def _run_of_its_own(client: MlflowClient, model: LoggedModel) -> str:
    """Return the id of the run for the evidence of a model that no run has logged, the same each time."""
    known = model.tags.get(EVIDENCE_RUN)
    if known and _is_there(client, known):
        return str(known)
    tags = {"tdeploy.model_id": model.model_id}
    run_id = str(client.create_run(model.experiment_id, tags=tags, run_name=f"{model.name} evidence").info.run_id)
    client.set_terminated(run_id)
    client.set_logged_model_tags(model.model_id, {EVIDENCE_RUN: run_id})
    return run_id


def _is_there(client: MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)
    except MlflowException:  # deleted for good
        return False
