"""Latency of a model's variants on this host, recorded with the model: other hosts of this kind rank by it."""

from __future__ import annotations

from dataclasses import replace

from mlflow_tdeploy.core.evidence import Evidence, after, recorded_shapes
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.flavor.extend import update_tags
from mlflow_tdeploy.registry_io import append_evidence, locate, mlflow_errors, open_records
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.bench import BenchRow, contenders, time_contenders
from mlflow_tdeploy.runtime.decision import Decision
from mlflow_tdeploy.runtime.latency import Contender, latency_evidence
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle


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
