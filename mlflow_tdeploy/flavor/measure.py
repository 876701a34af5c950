"""What a model's variants cost on this host, recorded with the model: other hosts of this kind rank by latency."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from mlflow_tdeploy.core.errors import first_line
from mlflow_tdeploy.core.evidence import SERVED, SWEEP, Evidence, after, recorded_shapes
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.flavor.analyze import Analysis, analyze_at
from mlflow_tdeploy.flavor.extend import update_tags
from mlflow_tdeploy.registry_io import Location, append_evidence, locate, mlflow_errors, open_records
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.bench import BenchRow, contenders, sweep, time_contenders
from mlflow_tdeploy.runtime.decision import Decision
from mlflow_tdeploy.runtime.latency import Contender, latency_evidence
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle

_log = logging.getLogger("mlflow_tdeploy")


@mlflow_errors()
def record_latency(model_uri: str, *, rounds: int = 20, seconds: float = 3.0) -> tuple[Decision, list[BenchRow]]:
    """Time every variant that this host can open, interleaved, and add the figures to the model's evidence.

    Shapes and the way of running are those that a build measures, so figures compare; what ``model_config`` or the
    environment force is left aside, as a ranking needs all variants.

    Args:
        model_uri: The model, see :func:`extend_model`; a local one or one behind a server.
        rounds: Calls of each variant per shape.
        seconds: Most time per shape and variant, once three rounds are done.

    Returns:
        What this host would have chosen before, and what was measured.

    Raises:
        MlflowException: There is no such model, or none of its variants can serve here.
    """
    location = locate(model_uri)
    bundle, fetch = open_records(location)
    decision = decide_bundle(bundle, probe.host())
    if not decision.openable:
        raise decision.none_left()
    shapes = recorded_shapes(bundle.manifest.signature)
    with contenders(bundle, decision.openable, fetch=fetch) as taking_part:
        rows = time_contenders(bundle, taking_part, shapes, rounds=rounds, seconds=seconds)
    append_evidence(location, _records(bundle, taking_part, rows, decision.host))
    update_tags(location)
    return decision, rows


def record_service(
    location: Location,
    data: Any = None,
    *,
    batches: Iterable[int] = (1, 32),
    rounds: int = 40,
    seconds: float = 3.0,
    progress: Callable[[str, float], None] | None = None,
) -> None:
    """Measure every variant that this host can open as it serves, and its graph over sizes, and add that to the model.

    Where the model's store takes nothing more, a warning says what was measured.

    Args:
        location: The model; an alias may point elsewhere when this has ended.
        data: What to ask, see :func:`analyze_model`.
        batches: How many items requests have.
        rounds: Most timed requests of each size and variant.
        seconds: Most time for those of one size and variant.
        progress: Called with each step and how long it took.

    Raises:
        TDeployError: There is no such model, or none of its variants can serve here.
    """
    analysis = analyze_at(location, data, None, tuple(batches), rounds, seconds, progress)
    bundle, fetch = open_records(location)
    decision = decide_bundle(bundle, probe.host())
    rows = sweep(bundle, decision.openable, rounds=rounds, seconds=seconds / 2, fetch=fetch)
    found = [*_served(analysis), *_swept(rows, analysis.host)]
    found = [
        replace(one, files=bundle.variants[one.variant].digest or None, created=after(bundle.evidence(one.variant)))
        for one in found
    ]
    try:
        append_evidence(location, found)
    except Exception as error:  # minutes of measuring are not lost for it
        _log.warning("'%s' takes no measurements: %s\n%s", location.uri, first_line(error), analysis.table())


def _served(analysis: Analysis) -> list[Evidence]:
    return [
        Evidence(
            variant=one.variant,
            kind=SERVED,
            metrics=one.metrics(),
            data=analysis.data,
            host=analysis.host,
            settings={"runtime": one.runtime, "batches": [speed.items for speed in one.speed]},
        )
        for one in analysis.variants
    ]


def _swept(rows: Iterable[BenchRow], host: Fingerprint) -> list[Evidence]:
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        figures = {"p50_ms": row.timing.p50_ms, "p95_ms": row.timing.p95_ms, "items_per_s": row.throughput}
        by.setdefault((row.variant, row.runtime), []).append({"shape": dict(row.shape), **figures})
    return [
        Evidence(variant=variant, kind=SWEEP, metrics={}, host=host, settings={"runtime": runtime, "rows": found})
        for (variant, runtime), found in by.items()
    ]


def _records(bundle: Bundle, taking_part: list[Contender], rows: list[BenchRow], host: Fingerprint) -> list[Evidence]:
    """Return a record per contender; the rows are theirs at the short shape, then at the *opt* shape."""
    short, opt = ([row.timing for row in part] for part in (rows[: len(taking_part)], rows[len(taking_part) :]))
    names = sorted({one.variant for one in taking_part})
    return [
        replace(
            latency_evidence(one, brief, usual, bundle.manifest.signature, host, names),
            files=bundle.variants[one.variant].digest or None,
            created=after(bundle.evidence(one.variant)),
        )
        for one, brief, usual in zip(taking_part, short, opt, strict=True)
    ]
