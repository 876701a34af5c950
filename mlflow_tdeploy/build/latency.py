"""How fast variants are on this host, measured in turn so that they can be ranked.

``p50_ms`` and the other plain names are at the signature's *opt* sizes, which mean "the size to be fastest at": one
defined shape for every variant, so that ranking compares like with like. A text batch runs as it is served: split into
batches that run side by side. ``short_…`` figures are for one short item (one row of 16 tokens, or the smallest sizes
where a graph has other dimensions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from mlflow_tdeploy.build.reference import corner_sizes, shape_text
from mlflow_tdeploy.build.verify import now
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.measure import Timing, interleave
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.runtime.bench import as_served

_SHORT = {"batch": 1, "sequence": 16}


@dataclass(frozen=True)
class Measured:
    """One variant to measure.

    Attributes:
        infer: Its session's ``infer``.
        runtime: Name of the runtime.
        threads: Threads inside one operator; with one, batches run side by side.
    """

    infer: Infer
    runtime: str
    threads: int


def measure_latency(
    variants: Mapping[str, Measured], task: Task, data: VerifyData, host: Fingerprint, *, seconds: float = 10.0
) -> list[Evidence]:
    """Time variants at the short and the opt shape.

    Args:
        variants: By id.
        task: The task.
        data: Where text tasks take their tokens from.
        host: This host.
        seconds: For everything; at least three rounds are done at each shape.
    """
    feeds = {"short_": short_feeds(task, data), "": opt_feeds(task, data)}
    metrics: dict[str, dict[str, float]] = {variant_id: {} for variant_id in variants}
    with ThreadPoolExecutor(host.cores) as executor:
        for prefix, arrays in feeds.items():
            calls = {name: _call(measured, arrays, task, executor, host) for name, measured in variants.items()}
            share = seconds / (4 if prefix else 4 / 3)
            rounds = interleave(calls, rounds=30 if prefix else 15, warmup=2 if prefix else 1, seconds=share)
            for variant_id, samples in rounds.items():
                metrics[variant_id] |= {f"{prefix}{k}": v for k, v in Timing.of(samples).as_metrics().items()}
    shapes = tuple(f"{prefix}p50_ms: {shape_text(task.signature, arrays)}" for prefix, arrays in feeds.items())
    return [
        Evidence(
            variant=variant_id,
            kind="latency",
            metrics=metrics[variant_id],
            host=host,
            shapes=shapes,
            settings={
                "runtime": measured.runtime,
                "intra_op_threads": measured.threads,
                "interleaved_with": sorted(variants),
            },
            created=now(),
        )
        for variant_id, measured in variants.items()
    ]


def short_feeds(task: Task, data: VerifyData) -> Arrays:
    """Return one short item: 1 × 16 tokens as far as the signature allows, other dimensions at their smallest."""
    signature = task.signature
    sizes = {dim.name: max(dim.min, min(dim.max, _SHORT.get(dim.name, dim.min))) for dim in signature.dims}
    return task.example_feeds("min", ragged=False, sizes=sizes, items=data.texts or None)


def opt_feeds(task: Task, data: VerifyData, largest: int | None = None) -> Arrays:
    """Return a batch at the sizes to be fastest at, or a smaller one of at most ``largest`` elements."""
    sizes = corner_sizes(task.signature, "opt", largest)[-1] if largest else None
    return task.example_feeds("opt", ragged=False, sizes=sizes, items=data.texts or None)


def _call(measured: Measured, feeds: Arrays, task: Task, executor: Executor, host: Fingerprint) -> Callable[[], object]:
    if measured.threads == 1:
        return as_served(measured.infer, feeds, task.signature, executor, host.cores)
    return lambda: measured.infer(feeds)
