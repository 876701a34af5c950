"""Variants as they serve: how good, how fast, how large, and what they use; measured alike for all of them.

One boundary for every runtime: from a request (texts, arrays on the host) to its answer in this process, through the
same code that serves. Speed go round the variants in turn.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError, TDeployError, first_line
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.measure import Timing, interleave
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.decision import Candidate
from mlflow_tdeploy.runtime.footprint import footprint
from mlflow_tdeploy.runtime.model import Model
from mlflow_tdeploy.runtime.power import Meter, measured
from mlflow_tdeploy.store.bundle import Bundle

_log = logging.getLogger("mlflow_tdeploy")
#: Uncounted requests: some runtimes choose in their first ones how they go on.
_WARMUP = 12
#: Seconds of rest before each timed request: threads of the one before may spin for some milliseconds.
_PAUSE = 0.02
#: Of so many sizes of given arrays requests are timed at most, evenly from the smallest to the largest.
_MOST_SIZES = 4
#: Of fewer timed requests a percentile is no more than one of the slowest.
_FEWEST = {"p95_ms": 20, "p99_ms": 100}


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        requests: What is asked: texts, or name → array.
        labels: The right answers to the first of them; None where there are none.
        batches: How many items a request has. Of ``tensors``, requests are asked as they are, those of a size together.
        rounds: Most timed requests of each size and variant.
        seconds: Most time for those of one size and variant, and for what energy is measured over.
    """

    requests: Sequence[Any]
    labels: Sequence[Any] | None = None
    batches: tuple[int, ...] = (1, 32)
    rounds: int = 100
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InvalidInputError(f"Batch sizes are at least 1, got {list(self.batches)}.")
        if self.rounds < 1 or not self.seconds > 0:
            raise InvalidInputError("rounds and seconds must be above 0.")


@dataclass(frozen=True)
class Speed:
    """How fast requests of one size are answered.

    Attributes:
        items: How many items each has.
        timing: Of single requests, in ms.
    """

    items: int
    timing: Timing

    @property
    def per_second(self) -> float:
        """Items per second, from the mean."""
        return self.items * 1e3 / self.timing.mean_ms

    def figures(self) -> dict[str, float]:
        """Return what is known by name, percentiles only of enough requests."""
        times = {name: getattr(self.timing, name) for name in ("p50_ms", "p95_ms", "p99_ms", "mean_ms")}
        known = {name: value for name, value in times.items() if self.timing.count >= _FEWEST.get(name, 1)}
        return {**known, "items_per_s": self.per_second, "requests": float(self.timing.count)}


@dataclass(frozen=True)
class Energy:
    """What was used while requests were answered one after the other.

    Attributes:
        watts: Mean power of the meters, idle power included.
        joules_per_item: Power times time, by items.
        by: The meters.
    """

    watts: float
    joules_per_item: float
    by: tuple[str, ...]


@dataclass(frozen=True)
class VariantFigures:
    """One variant on one runtime.

    Attributes:
        name: What to call it: the variant's id, with the runtime where several open it.
        variant: Its id.
        runtime: Name of the runtime.
        precision: Of the variant.
        quality: The task's metrics on the labels; empty without.
        closeness: What the model's records say of how close it is to the original.
        speed: One for each size of requests.
        megabytes: Of its files.
        memory_mib: Most memory of the host (not of a GPU) in a process that serves the largest requests by it alone;
            None where that is not known.
        energy: None where nothing counts that of its device.
    """

    name: str
    variant: str
    runtime: str
    precision: str
    quality: Mapping[str, float]
    closeness: Mapping[str, float]
    speed: tuple[Speed, ...]
    megabytes: float
    memory_mib: float | None = None
    energy: Energy | None = None

    def metrics(self) -> dict[str, float]:
        """Return all figures by name; those of requests end in their size."""
        found = {**self.quality, "size_mb": self.megabytes}
        for one in self.speed:
            found |= {f"{name}_of_{one.items}": value for name, value in one.figures().items()}
        if self.memory_mib is not None:
            found["memory_mib"] = self.memory_mib
        if self.energy is not None:
            found |= {"power_w": self.energy.watts, "energy_j_per_item": self.energy.joules_per_item}
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **{key: value for key, value in asdict(self).items() if key != "speed"},
            "speed": [{"items": one.items, **one.figures()} for one in self.speed],
        }


def measure_variants(
    model: Model,
    candidates: Sequence[Candidate],
    work: Workload,
    meters: Sequence[Meter] = (),
    told: Callable[[str, float], None] = lambda what, seconds: None,
) -> list[VariantFigures]:
    """Measure variants of an opened model.

    Args:
        model: The model; its files of these variants are brought here.
        candidates: Which variants on which runtimes.
        work: What is measured.
        meters: What counts energy.
        told: Called with each step and how long it took.

    Returns:
        One for each candidate that answers, in their order.

    Raises:
        TDeployError: None of them does, or the data is not what the task takes.
    """
    named = dict(zip(_names(candidates), candidates, strict=True))
    ask = {name: functools.partial(_ask, model, one) for name, one in named.items()}
    step = functools.partial(_step, told)
    for name in list(named):
        try:
            step(f"open {name}", ask[name], _first(work, 1))
        except TDeployError as error:
            if len(ask) == 1:
                raise
            _log.warning("%s is left out, as it does not serve here: %s", name, error)
            del named[name], ask[name]
    asked = ask if work.labels is not None else {}
    quality = {name: step(f"ask {name} everything", _quality, model, call, work) for name, call in asked.items()}
    sized = _by_size(model, work)
    speed = [step(f"time requests of {size}", _timed, ask, of, size) for size, of in sized.items()]
    largest = sized[max(sized)]
    suited = {name: by for name, one in named.items() if (by := _suited(meters, one))}
    energy = {name: step(f"energy of {name}", _energy, model, ask[name], largest, by) for name, by in suited.items()}
    memory = {
        name: step(f"memory of {name}", _memory, model.bundle, one, _first(largest, max(sized)))
        for name, one in named.items()
    }
    return [
        VariantFigures(
            name=name, variant=one.variant, runtime=one.runtime, precision=one.precision, quality=quality.get(name, {}),
            closeness=_closeness(model.bundle, one.variant), speed=tuple(timed[name] for timed in speed),
            megabytes=one.size / 1e6, memory_mib=memory[name], energy=energy.get(name),
        )
        for name, one in named.items()
    ]  # fmt: skip


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """Return what to call candidates: a variant that several runtimes open with the runtime's name."""
    ids = [one.variant for one in candidates]
    return [one.variant if ids.count(one.variant) == 1 else f"{one.variant} on {one.runtime}" for one in candidates]


def _step(told: Callable[[str, float], None], what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    found = call(*arguments)
    told(what, time.perf_counter() - started)
    return found


def _ask(model: Model, candidate: Candidate, request: Any, params: Mapping[str, Any] | None = None) -> Any:
    forced = {"variant": candidate.variant, "runtime": candidate.runtime, "strict": True}
    return model.predict(request, {**(model.task.usual if params is None else params), **forced})


def _first(work: Workload, size: int) -> Any:
    return next(_requests(work, size))


def _requests(work: Workload, size: int) -> Iterator[Any]:
    """Yield requests of a size without end, arrays as they are; in the order of a draw, as files are often sorted."""
    order = np.random.default_rng(0).permutation(len(work.requests))
    items = itertools.cycle([work.requests[index] for index in order])
    if isinstance(work.requests[0], Mapping):
        yield from items
    while True:
        yield list(itertools.islice(items, size))


def _by_size(model: Model, work: Workload) -> dict[int, Workload]:
    """Return what is asked by how many items a request has; requests of arrays are put together by that."""
    if not isinstance(work.requests[0], Mapping):
        return dict.fromkeys(work.batches, work)
    found: dict[int, list[Any]] = {}
    for request in work.requests:
        found.setdefault(_count(model, request), []).append(request)
    sizes = sorted(found)
    if len(sizes) > _MOST_SIZES:
        sizes = [sizes[index] for index in np.linspace(0, len(sizes) - 1, _MOST_SIZES).round().astype(int)]
    return {size: replace(work, requests=found[size], labels=None) for size in sizes}


def _suited(meters: Sequence[Meter], candidate: Candidate) -> list[Meter]:
    """Return what counts the energy of a variant: of a GPU's all there is, of a CPU's no GPU's, which is idle then."""
    on_gpu = RUNTIMES.get(candidate.runtime).tier == 0
    if on_gpu and not any(meter.of_gpu for meter in meters):
        return []  # that of the host alone would be taken for all of it
    return [meter for meter in meters if on_gpu or not meter.of_gpu]


def _count(model: Model, request: Any) -> int:
    """Return how many items a request has: of arrays what the first axis of the first input has."""
    if isinstance(request, list):
        return len(request)
    spec = model.signature.inputs[0]
    return int(request[spec.name].shape[0]) if spec.shape else 1


def _quality(model: Model, ask: Callable[..., Any], work: Workload) -> dict[str, float]:
    assert work.labels is not None
    asked = list(work.requests[: len(work.labels)])
    return model.task.metric(ask(asked, model.task.scored), work.labels)


def _closeness(bundle: Bundle, variant: str) -> dict[str, float]:
    record = latest_accuracy(bundle.evidence(variant))
    return {limit.metric: record.metrics[limit.metric] for limit in bundle.manifest.budget.limits
            if record and limit.metric in record.metrics}  # fmt: skip


def _timed(ask: Mapping[str, Callable[..., Any]], work: Workload, size: int) -> dict[str, Speed]:
    """Time requests of a size; in each round all variants get the same one."""
    streams = {name: _requests(work, size) for name in ask}
    calls = {name: functools.partial(_next, call, streams[name]) for name, call in ask.items()}
    limit = work.seconds * len(calls)
    samples = interleave(calls, rounds=work.rounds, warmup=_WARMUP, seconds=limit, pause=_PAUSE)
    return {name: Speed(size, Timing.of(taken)) for name, taken in samples.items()}


def _next(call: Callable[..., Any], requests: Iterator[Any]) -> Any:
    return call(next(requests))


def _energy(model: Model, ask: Callable[..., Any], work: Workload, meters: Sequence[Meter]) -> Energy | None:
    """Measure what is used while the largest requests are answered without a break."""
    requests, answered = _requests(work, max(work.batches)), 0
    ask(next(requests))
    end = time.monotonic() + work.seconds
    with measured(meters) as spent:
        while not answered or time.monotonic() < end:
            ask(request := next(requests))
            answered += _count(model, request)
    if spent.watts is None:
        return None
    return Energy(spent.watts, spent.watts * spent.seconds / answered, tuple(spent.joules))


def _memory(bundle: Bundle, candidate: Candidate, request: Any) -> float | None:
    """Return the most memory of a process that serves a variant alone, in MiB; None where that is not known."""
    try:
        return footprint(bundle, candidate, request)
    except Exception as error:  # nothing that was measured before it is lost for this
        _log.warning("The memory of %s is not known: %s", candidate.variant, first_line(error))
        return None
