"""``analyze_model``: every variant of a model as it serves here: quality, speed, size, memory, energy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.time import get_current_time_millis

from mlflow_tdeploy.core.budget import higher_is_better, is_metric
from mlflow_tdeploy.core.errors import InvalidInputError, first_line
from mlflow_tdeploy.core.evidence import DataRecord
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.registry_io import Location, locate, mlflow_errors, open_records
from mlflow_tdeploy.registry_io.plot import Point, can_draw, draw
from mlflow_tdeploy.registry_io.runs import EVIDENCE_STEP, PICTURE, log_metrics, log_rows, run_below
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.analysis import VariantFigures, Workload, measure_variants
from mlflow_tdeploy.runtime.decision import Candidate, align
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.runtime.power import meters
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle

_log = logging.getLogger("mlflow_tdeploy")
TABLE, DOCUMENT = "analysis_table.json", "analysis.json"
#: Tag of the run: the kind of host.
_TAG = "tdeploy.analysis"


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze_model` found.

    Attributes:
        host: Where.
        data: On what.
        labels: How many items had the right answer with them.
        variants: One for each variant and runtime.
        unmeasured: What energy was not counted, and why; empty where all was.
        run_id: The MLflow run that holds it; empty where none does.
    """

    host: Fingerprint
    data: DataRecord
    labels: int
    variants: tuple[VariantFigures, ...]
    unmeasured: str = ""
    run_id: str = ""

    def table(self) -> str:
        """Return it as text."""
        quality = list(dict.fromkeys(name for one in self.variants for name in (*one.quality, *one.closeness)))
        sizes = [one.items for one in self.variants[0].speed]
        head = ["variant", *quality]
        for size in sizes:
            head += [f"{size}: p50 ms", "p95", "p99", "items/s"]
        head += ["MB", "memory MiB"]
        counted = any(one.energy for one in self.variants)
        head += ["W", "J/item"] if counted else []
        return align([tuple(head), *(self._row(one, quality, counted=counted) for one in self.variants)])

    def _row(self, one: VariantFigures, quality: Sequence[str], *, counted: bool) -> tuple[str, ...]:
        known = {**one.closeness, **one.quality}
        row = [one.name, *(f"{known[name]:.4g}" if name in known else "-" for name in quality)]
        for asked in one.speed:
            known_times = asked.figures()
            times = (known_times.get(name) for name in ("p50_ms", "p95_ms", "p99_ms"))
            row += [*("-" if time is None else f"{time:.2f}" for time in times), f"{asked.per_second:.0f}"]
        row += [f"{one.megabytes:.0f}", "-" if one.memory_mib is None else f"{one.memory_mib:.0f}"]
        if counted:
            row += [f"{one.energy.watts:.1f}", f"{one.energy.joules_per_item:.3g}"] if one.energy else ["-", "-"]
        return tuple(row)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "host": {"kind": self.host.kind, "cores": self.host.cores, "software": dict(self.host.software)},
            "data": {"name": self.data.name, "sha256": self.data.sha256, "items": self.data.count},
            "labels": self.labels,
            "no_energy": self.unmeasured,
            "variants": [one.as_dict() for one in self.variants],
        }

    def figure(self) -> Any:
        """Return a picture (of matplotlib) of accuracy against speed: the task's first metric, or closeness, by p50.

        Raises:
            InvalidInputError: No variant has such a metric.
        """
        name = next((name for one in self.variants for name in (*one.quality, *one.closeness)), None)
        if name is None:
            raise InvalidInputError(
                "There is nothing to draw: without labels, and without a verdict on any variant, no accuracy is known."
            )
        points = [
            Point(one.name, asked.timing.p50_ms, known[name])
            for one in self.variants
            for known, asked in [({**one.closeness, **one.quality}, one.speed[-1])]
            if name in known
        ]
        size = self.variants[0].speed[-1].items
        better = "" if not is_metric(name) else " (more is better)" if higher_is_better(name) else " (less is better)"
        where = self.host.gpu.name if self.host.gpu else f"{self.host.cpu}, {self.host.cores} cores"
        return draw(points, x=f"ms for {size} items, median; {where}", y=f"{name}{better}", named=True)


@mlflow_errors()
def analyze_model(
    model_uri: str,
    data: Any = None,
    *,
    variants: Iterable[str] | None = None,
    batches: Iterable[int] = (1, 32),
    rounds: int = 100,
    seconds: float = 10.0,
    record: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Analysis:
    """Measure variants of a model as they serve on this host, all alike.

    One boundary for all runtimes: from a request in this process to its answer, through what serves. Requests go round
    the variants in turn; p95 is told of at least 20 of them, p99 of 100. Memory is the most of the host's (not of a
    GPU) that a process takes which answers the largest requests by one variant alone. Energy is counted where the
    hardware does (RAPL for CPUs, NVML for GPUs), idle power included, while the largest requests are answered without
    a break: energy per item is power times time, by items. Of variants on a CPU it is that of the CPU.

    Args:
        model_uri: The model, see :func:`extend_model`.
        data: What to ask: texts, a table with the columns ``text`` and ``label`` (then the task's own metrics are
            measured), or a list of mappings from tensor name to array; built-in texts, or the golden requests, if None.
        variants: Ids of variants; all that this host can open when None.
        batches: How many texts a request has; requests of arrays are asked as they are, those of a size together.
        rounds: Most timed requests of each size and variant.
        seconds: Most time for those of one size and variant; and for its energy.
        record: Whether to log it to MLflow: a run with metrics, a table, JSON and a picture, and metrics of the logged
            model (``<variant>.analysis.<metric>``). What MLflow does not take is a warning, and no ``run_id``.
        progress: Called with each step and how long it took.

    Returns:
        What was found; it has ``table()``, ``as_dict()`` and ``figure()``.

    Raises:
        MlflowException: There is no such model or variant, none of them can serve here, or the data is not what the
            task takes.
    """
    location = locate(model_uri)
    if record and location.model_id is None:
        raise InvalidInputError(f"'{model_uri}' is a folder outside MLflow, so there is nothing to record with.")
    analysis = analyze_at(location, data, variants, tuple(batches), rounds, seconds, progress)
    return _recorded(analysis, location) if record else analysis


def analyze_at(
    location: Location,
    data: Any,
    variants: Iterable[str] | None,
    batches: tuple[int, ...],
    rounds: int,
    seconds: float,
    progress: Callable[[str, float], None] | None,
) -> Analysis:
    """Measure variants of a model that was located; see :func:`analyze_model`."""
    bundle, fetch = open_records(location)
    work, what = _workload(bundle, data, batches, rounds, seconds)
    host = probe.host()
    candidates = _candidates(bundle, host, variants)
    by, why = meters(probe.gpu_uuid() if host.gpu else None)
    try:
        with open_model(bundle.root, policy=Policy(), fetch=fetch) as model:
            found = measure_variants(model, candidates, work, by, progress or (lambda what, seconds: None))
    finally:
        for meter in by:
            meter.close()
    labels = len(work.labels) if work.labels is not None else 0
    return Analysis(host, what, labels, tuple(found), why)


def _workload(
    bundle: Bundle, data: Any, batches: tuple[int, ...], rounds: int, seconds: float
) -> tuple[Workload, DataRecord]:  # fmt: skip
    from mlflow_tdeploy.build.verify_data import VerifyData

    task, given = bundle.task(), VerifyData.of(data)
    if given.texts and task.columns:
        given = given.items_of(task)
    if data is None or not given.texts:
        given = given.for_task(task, [request.feeds for request in bundle.golden()])
    if given.labels is not None:
        if not (task.quality or task.quality_of_scores):
            raise InvalidInputError(
                f"Task '{task.name}' has no metric that takes labels: leave them out (texts alone, --texts)."
            )
        task.check_labels(given.labels, given.texts)
    requests = _texts(task, given.texts) if given.texts else given.requests
    return Workload(requests, given.labels, batches, rounds, seconds), given.record


def _texts(task: Task, texts: Sequence[str]) -> Sequence[str]:
    if not task.columns:
        raise InvalidInputError(f"Task '{task.name}' is asked with arrays by input name, got texts.")
    task.items(list(texts))
    return texts


def _candidates(bundle: Bundle, host: Fingerprint, wanted: Iterable[str] | None) -> list[Candidate]:
    decision = decide_bundle(bundle, host)
    if wanted is None:
        if not decision.openable:
            raise decision.none_left()
        return list(decision.openable)
    found = []
    for variant in dict.fromkeys(wanted):
        chosen = [one for one in decision.openable if one.variant == variant]
        if not chosen:
            raise decide_bundle(bundle, host, Policy(variant)).none_left()
        found += chosen
    if not found:
        raise InvalidInputError("variants is empty: name at least one, or leave it out for all.")
    return found


def _recorded(analysis: Analysis, location: Location) -> Analysis:
    try:
        return replace(analysis, run_id=_record(analysis, location))
    except Exception as error:  # minutes of measuring are not lost for it
        _log.warning("The analysis of '%s' is not in MLflow: %s", location.uri, first_line(error))
        return analysis


def _record(analysis: Analysis, location: Location) -> str:
    client = MlflowClient()
    model = client.get_logged_model(location.model_id or "")
    now = get_current_time_millis()
    with run_below(client, model, f"{model.name} analysis", {_TAG: analysis.host.kind}) as run_id:
        log_metrics(
            client,
            run_id,
            [
                Metric(
                    f"{one.name}.analysis.{key}".replace(" ", "_"), value, now, EVIDENCE_STEP, model_id=model.model_id
                )
                for one in analysis.variants
                for key, value in one.metrics().items()
            ],
        )
        params = {"host": analysis.host.kind, "data": analysis.data.name, "items": analysis.data.count}
        client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items()])
        rows = [{"variant": one.name, **one.closeness, **one.metrics()} for one in analysis.variants]
        log_rows(client, run_id, rows, TABLE)
        client.log_dict(run_id, analysis.as_dict(), DOCUMENT)
        if can_draw() and any(one.quality or one.closeness for one in analysis.variants):
            client.log_figure(run_id, analysis.figure(), PICTURE)
    return run_id
