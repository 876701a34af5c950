"""How fast variants are on this host, measured in turn so that they can be ranked.

One way of measuring for what a build records, what ``tdeploy bench`` shows and what a host adds later. Two shapes are
recorded: ``p50_ms`` and the other plain names are at the signature's *opt* sizes, which mean "the size to be fastest
at", one defined shape for every variant; ``short_…`` figures are for one short item (one row of 16 tokens, or the
smallest sizes where a graph has other dimensions).

A text batch is split as it is served, see :meth:`mlflow_tdeploy.runtime.base.Runtime.bulk`: for ONNX Runtime on a CPU
into small batches that run side by side, one thread each. What is a single batch, the short item above all, runs on
that one thread. Served, such a request also tries a session of every core and keeps to it where it is faster
(:mod:`mlflow_tdeploy.runtime.threads`), so it may be answered sooner than the figure says. That choice is left out
because it takes many requests and depends on what else the host does; the settings of the record say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.batching import plan_batches
from mlflow_tdeploy.core.evidence import Evidence, Shape, now, recorded_shapes, shape_text
from mlflow_tdeploy.core.hardware import Fingerprint, usable_cores
from mlflow_tdeploy.core.measure import Timing, interleave
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import Bulk, Runtime
from mlflow_tdeploy.runtime.options import SessionOptions

#: Seconds of rest before each timed call: threads of the one before (OpenMP's, torch's) spin for some milliseconds.
_PAUSE = 0.02
#: What a record says of how batches ran.
_METHOD = "split as they are served; a single batch in the first session, while serving also tries one of every core"
#: What is fast enough gets this many calls, whatever the time.
_ROUNDS = 30


@dataclass(frozen=True)
class Contender:
    """A variant on a runtime, to be measured.

    Attributes:
        variant: Its id.
        runtime: Name of the runtime.
        infer: Its session's ``infer``.
        bulk: How its batches run.
    """

    variant: str
    runtime: str
    infer: Infer
    bulk: Bulk

    @classmethod
    def served(
        cls, variant: Variant, runtime: Runtime, infer: Infer, options: SessionOptions | None = None
    ) -> Contender:
        """Return a variant as bulk work on this runtime is served.

        Args:
            variant: The variant.
            runtime: The runtime.
            infer: Its session's ``infer``, opened with the same options.
            options: Session options.
        """
        bulk = runtime.bulk(variant, options or SessionOptions(), usable_cores())
        return cls(variant.id, runtime.name, infer, bulk)


def time_shape(
    contenders: Sequence[Contender],
    task: Task,
    shape: Shape,
    *,
    rounds: int = _ROUNDS,
    seconds: float,
    items: Sequence[Any] | None = None,
) -> list[Timing]:
    """Time contenders at one shape, in turn.

    Args:
        contenders: Who takes part.
        task: The task, which makes the inputs.
        shape: Size of every named dimension.
        rounds: Most calls of each.
        seconds: Most time for all of them together, once three rounds are done.
        items: Texts whose tokens fill the inputs; random tokens when None.

    Returns:
        A timing per contender, in their order.
    """
    feeds = task.example_feeds("opt", ragged=False, sizes=shape, items=items)
    with ThreadPoolExecutor(max(one.bulk.workers for one in contenders)) as executor:
        calls = {
            str(index): side_by_side(one.infer, feeds, task.signature, executor, one.bulk)
            for index, one in enumerate(contenders)
        }
        samples = interleave(calls, rounds=rounds, warmup=2, seconds=seconds, pause=_PAUSE)
    return [Timing.of(samples[name]) for name in calls]


def measure_latency(
    contenders: Sequence[Contender],
    task: Task,
    host: Fingerprint,
    *,
    seconds: float = 10.0,
    items: Sequence[Any] | None = None,
) -> list[Evidence]:
    """Time contenders at both recorded shapes.

    Args:
        contenders: Who takes part.
        task: The task.
        host: This host.
        seconds: For everything, a quarter of it for the short shape; at least three rounds are done at each.
        items: See :func:`time_shape`.

    Returns:
        One record per contender, in their order.
    """
    if not contenders:
        return []
    short, opt = recorded_shapes(task.signature)
    at_short = time_shape(contenders, task, short, seconds=seconds / 4, items=items)
    at_opt = time_shape(contenders, task, opt, seconds=seconds * 3 / 4, items=items)
    names = sorted({one.variant for one in contenders})
    return [
        latency_evidence(one, brief, usual, task.signature, host, names)
        for one, brief, usual in zip(contenders, at_short, at_opt, strict=True)
    ]


def latency_evidence(
    contender: Contender, short: Timing, opt: Timing, signature: Signature, host: Fingerprint, names: Sequence[str]
) -> Evidence:
    """Return the record of a contender's timings at the two recorded shapes.

    Args:
        contender: What was measured.
        short: At the short shape.
        opt: At the *opt* shape.
        signature: The model's.
        host: This host.
        names: The variants that were measured in turn with it.
    """
    short_shape, opt_shape = (shape_text(shape) for shape in recorded_shapes(signature))
    return Evidence(
        variant=contender.variant,
        kind="latency",
        metrics={**{f"short_{name}": value for name, value in short.as_metrics().items()}, **opt.as_metrics()},
        host=host,
        shapes=(f"short_p50_ms: {short_shape}", f"p50_ms: {opt_shape}"),
        settings={
            "runtime": contender.runtime,
            **contender.bulk.method,
            "batches": _METHOD,
            "interleaved_with": list(names),
        },
        created=now(),
    )


def side_by_side(
    infer: Infer,
    feeds: Arrays,
    signature: Signature,
    executor: Executor,
    bulk: Bulk,
) -> Callable[[], object]:
    """Return a call that runs a batch of equally long rows split the way a request of these rows is served.

    The batches run side by side; what has no batch and sequence dimension, or is one batch, runs as it is.
    """
    first = signature.inputs[0]
    if first.shape[:2] != ("batch", "sequence"):
        return _whole(infer, feeds)
    rows, width = feeds[first.name].shape[:2]
    plan = plan_batches([width] * rows, max_batch=rows, token_budget=bulk.token_budget, workers=bulk.workers)
    parts = [{name: array[batch] for name, array in feeds.items()} for batch in plan]
    if len(parts) == 1:
        return _whole(infer, parts[0])
    if bulk.workers == 1:
        return lambda: [infer(part) for part in parts]
    return lambda: list(executor.map(infer, parts))


def _whole(infer: Infer, feeds: Arrays) -> Callable[[], object]:
    return lambda: infer(feeds)
