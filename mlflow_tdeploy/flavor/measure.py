"""Latency of a model's variants on this host, recorded with the model: other hosts of this kind rank by it."""

from __future__ import annotations

from datetime import datetime, timezone

from mlflow_tdeploy.core.errors import TDeployError
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.flavor.extend import update_tags
from mlflow_tdeploy.registry_io import append_evidence, fetch_variant, fetch_view, locate, mlflow_errors
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.bench import BenchRow, Shape, sweep
from mlflow_tdeploy.runtime.select import Candidate, Decision, decide
from mlflow_tdeploy.store.bundle import Bundle

#: The lone short item that the build measures, too; the other shape is the signature's *opt*.
_SHORT = {"batch": 1, "sequence": 16}


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
    bundle = Bundle.open(location.local) if location.local is not None else fetch_view(location)
    evidence = {variant_id: bundle.evidence(variant_id) for variant_id in bundle.variants}
    decision = decide(bundle.manifest, bundle.variants, evidence, probe.host())
    if not decision.openable:
        raise decision.none_left()
    for variant_id in {candidate.variant for candidate in decision.openable}:
        if location.local is None:
            fetch_variant(location, bundle, bundle.variants[variant_id])
        bundle.verify(bundle.variants[variant_id])
    short, opt = shapes(bundle.manifest.signature)
    rows = sweep(bundle, decision.openable, shapes=[short, opt], rounds=rounds, seconds=seconds)
    append_evidence(location, [_evidence(bundle, one, rows, short, opt) for one in decision.openable])
    update_tags(location)
    return decision, rows


def shapes(signature: Signature) -> tuple[Shape, Shape]:
    """Return the short and the opt shape, as a build measures them."""
    short = {dim.name: max(dim.min, min(dim.max, _SHORT.get(dim.name, dim.min))) for dim in signature.dims}
    return short, {dim.name: dim.opt for dim in signature.dims}


def _evidence(bundle: Bundle, candidate: Candidate, rows: list[BenchRow], short: Shape, opt: Shape) -> Evidence:
    own = [row for row in rows if (row.variant, row.runtime) == (candidate.variant, candidate.runtime)]
    if len(own) != 2:
        raise TDeployError(f"Variant '{candidate.variant}' was not measured on '{candidate.runtime}'.")
    host = probe.host()
    one_thread = RUNTIMES.get(candidate.runtime).one_thread_sessions
    at_short, at_opt = (row.timing.as_metrics() for row in own)
    return Evidence(
        variant=candidate.variant,
        kind="latency",
        metrics={**{f"short_{name}": value for name, value in at_short.items()}, **at_opt},
        host=host,
        shapes=(f"short_p50_ms: {_text(short)}", f"p50_ms: {_text(opt)}"),
        settings={
            "runtime": candidate.runtime,
            "intra_op_threads": 1 if one_thread else host.cores,
            "interleaved_with": sorted({row.variant for row in rows}),
        },
        created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        files=bundle.variants[candidate.variant].digest or None,
    )


def _text(shape: Shape) -> str:
    return ",".join(f"{name}={size}" for name, size in shape.items()) or "fixed"
