"""Latency of variants over shapes, side by side: inputs from the signature, calls interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.batching import DEFAULT_TOKEN_BUDGET, plan_batches
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.hardware import host_cpu
from mlflow_tdeploy.core.measure import Timing, interleave
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.runtime.base import RUNTIMES, Session, SessionOptions
from mlflow_tdeploy.runtime.select import Candidate
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import ASSETS

Shape = dict[str, int]
#: Seconds of rest before each timed call.
PAUSE = 0.02


def as_served(
    infer: Infer, feeds: Arrays, signature: Signature, executor: Executor, workers: int
) -> Callable[[], object]:
    """Return a call that runs a batch of equally long rows the way a request of these rows is served.

    Rows are split into batches that run side by side, one thread each; what has no batch and sequence dimension, or is
    one batch, runs as it is.
    """
    first = signature.inputs[0]
    if first.shape[:2] != ("batch", "sequence"):
        return lambda: infer(feeds)
    rows, width = feeds[first.name].shape[:2]
    plan = plan_batches([width] * rows, max_batch=rows, token_budget=DEFAULT_TOKEN_BUDGET, workers=workers)
    parts = [{name: array[batch] for name, array in feeds.items()} for batch in plan]
    return (lambda: infer(parts[0])) if len(parts) == 1 else (lambda: list(executor.map(infer, parts)))


@dataclass(frozen=True)
class BenchRow:
    """One variant on one runtime at one shape.

    Attributes:
        variant: Id of the variant.
        runtime: Name of the runtime.
        shape: Size of every named dimension.
        timing: Statistics of single calls, in ms.
        throughput: Items (rows of the batch) per second, from the mean.
    """

    variant: str
    runtime: str
    shape: Shape
    timing: Timing
    throughput: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return {
            "variant": self.variant, "runtime": self.runtime, "shape": self.shape,
            "throughput_per_s": self.throughput, **self.timing.as_metrics(),
        }  # fmt: skip


def default_shapes(signature: Signature) -> list[Shape]:
    """Return the sweep that suits a signature: every batch × length that it names.

    Texts get batch min/opt × sequence 16/opt/max; other graphs get all dims at min, at opt and at max.
    """
    if not (signature.has_dim("batch") and signature.has_dim("sequence")):
        corners: list[Shape] = [{dim.name: dim.at(at) for dim in signature.dims} for at in ("min", "opt", "max")]
        return [corner for index, corner in enumerate(corners) if corner not in corners[:index]]
    batch, sequence = signature.dim("batch"), signature.dim("sequence")
    short = min(max(16, sequence.min), sequence.max)
    batches = dict.fromkeys((batch.min, batch.opt))
    lengths = dict.fromkeys((short, sequence.opt, sequence.max))
    return [{"batch": rows, "sequence": tokens} for rows in batches for tokens in lengths]


def check_shape(signature: Signature, shape: Mapping[str, int]) -> Shape:
    """Return the shape with every dimension filled (opt where not given).

    Raises:
        InvalidInputError: An unknown dimension or a size outside its range.
    """
    for name, size in shape.items():
        dim = signature.dim(name)
        if not dim.min <= size <= dim.max:
            raise InvalidInputError(f"Dimension '{name}' = {size} is outside its range {dim.min}..{dim.max}.")
    return {dim.name: shape.get(dim.name, dim.opt) for dim in signature.dims}


def sweep(
    bundle: Bundle,
    candidates: Iterable[Candidate],
    *,
    shapes: Sequence[Mapping[str, int]] | None = None,
    rounds: int = 20,
    seconds: float = 3.0,
    options: SessionOptions | None = None,
) -> list[BenchRow]:
    """Time candidates at every shape.

    Args:
        bundle: The bundle, with the candidates' files present.
        candidates: Which variants on which runtimes.
        shapes: Sizes by dimension; None for :func:`default_shapes`.
        rounds: Calls of each candidate per shape.
        seconds: Most time per shape, once three rounds are done.
        options: Session options. Without ``intra_op_threads`` text batches run as they are served, see
            :func:`as_served`; with it, each is one call.

    Returns:
        A row per shape and candidate.
    """
    manifest = bundle.manifest
    task = TASKS.get(manifest.task)(manifest.task_config, manifest.signature, bundle.root / ASSETS)
    wanted = [check_shape(manifest.signature, s) for s in (shapes or default_shapes(manifest.signature))]
    sessions: dict[tuple[str, str], Session] = {}
    try:
        for candidate in candidates:
            runtime = RUNTIMES.get(candidate.runtime)()
            variant = bundle.variants[candidate.variant]
            opened = runtime.open(bundle.root, variant, manifest.signature, options or SessionOptions())
            sessions[candidate.variant, candidate.runtime] = opened
        with ThreadPoolExecutor(host_cpu().cores) as executor:
            split = executor if options is None or not options.intra_op_threads else None
            timed = (_time_shape(task, sessions, shape, rounds, seconds, split) for shape in wanted)
            return [row for rows in timed for row in rows]
    finally:
        for session in sessions.values():
            session.close()


def _time_shape(
    task: Task,
    sessions: Mapping[tuple[str, str], Session],
    shape: Shape,
    rounds: int,
    seconds: float,
    executor: Executor | None,
) -> list[BenchRow]:
    feeds = task.example_feeds("opt", ragged=False, sizes=shape)
    calls = {
        f"{name}|{runtime}": _call(session, runtime, feeds, task, executor)
        for (name, runtime), session in sessions.items()
    }
    # A pause lets the threads of the call before, which torch leaves spinning for a while, fall asleep.
    samples = interleave(calls, rounds=rounds, warmup=2, seconds=seconds * max(1, len(calls)), pause=PAUSE)
    rows = []
    for variant, runtime in sessions:
        timing = Timing.of(samples[f"{variant}|{runtime}"])
        throughput = shape.get("batch", 1) * 1e3 / timing.mean_ms
        rows.append(BenchRow(variant, runtime, shape, timing, throughput))
    return rows


def _call(session: Session, runtime: str, feeds: Arrays, task: Task, executor: Executor | None) -> Callable[[], object]:
    if executor is None or not RUNTIMES.get(runtime).one_thread_sessions:
        return lambda: session.infer(feeds)
    return as_served(session.infer, feeds, task.signature, executor, host_cpu().cores)
