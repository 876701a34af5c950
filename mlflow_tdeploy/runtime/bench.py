"""Latency of variants over shapes, side by side: inputs from the signature, calls interleaved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.measure import Timing, interleave
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.runtime.base import RUNTIMES, Session, SessionOptions
from mlflow_tdeploy.runtime.select import Candidate
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import ASSETS

Shape = dict[str, int]


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
        options: Session options.

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
        return [row for shape in wanted for row in _time_shape(task, sessions, shape, rounds, seconds)]
    finally:
        for session in sessions.values():
            session.close()


def _time_shape(
    task: Task, sessions: Mapping[tuple[str, str], Session], shape: Shape, rounds: int, seconds: float
) -> list[BenchRow]:
    feeds = task.example_feeds("opt", ragged=False, sizes=shape)
    calls = {f"{variant}|{runtime}": _call(session, feeds) for (variant, runtime), session in sessions.items()}
    samples = interleave(calls, rounds=rounds, warmup=2, seconds=seconds * max(1, len(calls)))
    rows = []
    for variant, runtime in sessions:
        timing = Timing.of(samples[f"{variant}|{runtime}"])
        throughput = shape.get("batch", 1) * 1e3 / timing.mean_ms
        rows.append(BenchRow(variant, runtime, shape, timing, throughput))
    return rows


def _call(session: Session, feeds: Arrays) -> Any:
    return lambda: session.infer(feeds)
