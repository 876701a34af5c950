"""Latency of variants over shapes, side by side: inputs from the signature, calls interleaved."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import Shape
from mlflow_tdeploy.core.measure import Timing
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.decision import Candidate
from mlflow_tdeploy.runtime.latency import Contender, time_shape
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.sessions import Opener
from mlflow_tdeploy.store.bundle import Bundle, Fetch

_log = logging.getLogger("mlflow_tdeploy")


@dataclass(frozen=True)
class BenchRow:
    """One variant on one runtime at one shape.

    Attributes:
        variant: Id of the variant.
        runtime: Name of the runtime.
        shape: Size of every named dimension.
        timing: Statistics of single calls, in ms.
        throughput: Items per second, from the mean; a call has as many as the first axis of the first input.
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
    fetch: Fetch | None = None,
) -> list[BenchRow]:
    """Time candidates at every shape.

    Args:
        bundle: The bundle.
        candidates: Which variants on which runtimes.
        shapes: Sizes by dimension; None for :func:`default_shapes`.
        rounds: Calls of each candidate per shape.
        seconds: Most time per shape and candidate, once three rounds are done.
        options: Session options. Text batches are split as they are served with them.
        fetch: Brings a variant's files where the bundle was downloaded without them.

    Returns:
        A row per shape and candidate.
    """
    wanted = [check_shape(bundle.manifest.signature, s) for s in (shapes or default_shapes(bundle.manifest.signature))]
    with contenders(bundle, candidates, options, fetch) as taking_part:
        return time_contenders(bundle, taking_part, wanted, rounds=rounds, seconds=seconds)


def time_contenders(
    bundle: Bundle, taking_part: Sequence[Contender], shapes: Iterable[Shape], *, rounds: int, seconds: float
) -> list[BenchRow]:
    """Time opened contenders; the arguments and rows are those of :func:`sweep`."""
    rows, task, signature = [], bundle.task(), bundle.manifest.signature
    for shape in shapes:
        limit = seconds * max(1, len(taking_part))
        timings = time_shape(taking_part, task, shape, rounds=rounds, seconds=limit)
        for one, timing in zip(taking_part, timings, strict=True):
            throughput = _items(signature, shape) * 1e3 / timing.mean_ms
            rows.append(BenchRow(one.variant, one.runtime, shape, timing, throughput))
    return rows


def _items(signature: Signature, shape: Shape) -> int:
    """Return how many items a call at a shape has: its first axis, however it is called, fixed or not."""
    axes = signature.inputs[0].shape
    if not axes:
        return 1
    first = axes[0]
    return first if isinstance(first, int) else shape[first]


@contextmanager
def contenders(
    bundle: Bundle,
    candidates: Iterable[Candidate],
    options: SessionOptions | None = None,
    fetch: Fetch | None = None,
) -> Iterator[list[Contender]]:
    """Open candidates as bulk work is served; closed on the way out.

    Args:
        bundle: The bundle.
        candidates: Which variants on which runtimes.
        options: Session options.
        fetch: Brings a variant's files where the bundle was downloaded without them.

    Raises:
        Exception: What the last of them raised, where none can be opened; of several, those that can are yielded.
    """
    given = options or SessionOptions()
    failed: Exception | None = None
    opener = Opener.of(bundle)
    with ExitStack() as stack:
        found = []
        for candidate in candidates:
            try:
                if fetch is not None:
                    fetch(bundle.variants[candidate.variant])
                session = opener.open(candidate, given)
            except Exception as error:  # also a store's: what cannot serve is not timed; the others are
                _log.warning("Variant %s cannot serve on %s: %s", candidate.variant, candidate.runtime, error)
                failed = error
                continue
            stack.callback(session.close)
            runtime = RUNTIMES.get(candidate.runtime)()
            found.append(Contender.served(bundle.variants[candidate.variant], runtime, session.infer, given))
        if not found and failed is not None:
            raise failed
        yield found
