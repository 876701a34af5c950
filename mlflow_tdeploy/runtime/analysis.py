"""Variants as they serve: how good, how fast, how large, and what they use; measured alike for all of them.

One boundary for every runtime: from a request (texts, arrays on the host) to its answer in this process, through the
same code that serves. Requests go round the variants in turn.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError, SessionError, TDeployError
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.measure import Timing, interleave
from mlflow_tdeploy.runtime.decision import Candidate
from mlflow_tdeploy.runtime.model import Model, open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.runtime.power import Meter, measured
from mlflow_tdeploy.runtime.probe import run_child
from mlflow_tdeploy.store.bundle import Bundle

_log = logging.getLogger("mlflow_tdeploy")
#: Uncounted requests: some runtimes choose in their first ones how they go on.
_WARMUP = 12
#: Seconds of rest before each timed request: threads of the one before may spin for some milliseconds.
_PAUSE = 0.02
#: Opens a variant in a process of its own and says how much memory that takes. ``VmHWM`` and not ``ru_maxrss``, which
#: a child begins with as its parent's.
_MEMORY = """
import sys
from mlflow_tdeploy.runtime.analysis import serve_alone
serve_alone(*sys.argv[1:])
"""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        requests: What is asked: texts, or name → array.
        labels: The right answers to the first of them; None where there are none.
        batches: How many items a request has. Of ``tensors``, requests are asked as they are.
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
class Requests:
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
class Analysed:
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
        memory_mib: Most memory of a process that serves it alone; None where that is not known.
        energy: None where nothing is counted.
    """

    name: str
    variant: str
    runtime: str
    precision: str
    quality: Mapping[str, float]
    closeness: Mapping[str, float]
    speed: tuple[Requests, ...]
    megabytes: float
    memory_mib: float | None = None
    energy: Energy | None = None

    def metrics(self) -> dict[str, float]:
        """Return all figures by name; those of requests end in their size."""
        found = {**self.quality, "size_mb": self.megabytes}
        for one in self.speed:
            figures = {key: getattr(one.timing, key) for key in ("p50_ms", "p95_ms", "p99_ms", "mean_ms")}
            found |= {f"{key}_of_{one.items}": value for key, value in figures.items()}
            found[f"items_per_s_of_{one.items}"] = one.per_second
        if self.memory_mib is not None:
            found["memory_mib"] = self.memory_mib
        if self.energy is not None:
            found |= {"power_w": self.energy.watts, "energy_j_per_item": self.energy.joules_per_item}
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            **{key: value for key, value in asdict(self).items() if key != "speed"},
            "speed": [
                {"items": one.items, "per_second": one.per_second, **one.timing.as_metrics()} for one in self.speed
            ],
        }


def analyse(
    model: Model,
    candidates: Sequence[Candidate],
    plan: Plan,
    meters: Sequence[Meter] = (),
    told: Callable[[str, float], None] = lambda what, seconds: None,
) -> list[Analysed]:
    """Measure variants of an opened model.

    Args:
        model: The model; its files of these variants are brought here.
        candidates: Which variants on which runtimes.
        plan: What is measured.
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
            step(f"open {name}", ask[name], _first(plan, 1))
        except TDeployError as error:
            if len(ask) == 1:
                raise
            _log.warning("%s is left out, as it does not serve here: %s", name, error)
            del named[name], ask[name]
    asked = ask if plan.labels is not None else {}
    quality = {name: step(f"ask {name} everything", _quality, model, call, plan) for name, call in asked.items()}
    speed = [step(f"time requests of {size}", _timed, ask, plan, size) for size in _sizes(model, plan)]
    counted = ask if meters else {}
    energy = {name: step(f"energy of {name}", _energy, model, call, plan, meters) for name, call in counted.items()}
    first = _first(plan, 1)
    memory = {name: step(f"memory of {name}", _memory, model.bundle, one, first) for name, one in named.items()}
    return [
        Analysed(
            name=name, variant=one.variant, runtime=one.runtime, precision=one.precision, quality=quality.get(name, {}),
            closeness=_closeness(model.bundle, one.variant), speed=tuple(timed[name] for timed in speed),
            megabytes=one.size / 1e6, memory_mib=memory[name], energy=energy.get(name),
        )
        for name, one in named.items()
    ]  # fmt: skip


def serve_alone(root: str, variant: str, runtime: str, request: str) -> None:
    """Open a variant in this process, answer one request, and print the most memory that this took, in KiB."""
    given = json.loads(request)
    if isinstance(given, dict):
        with np.load(given["arrays"], allow_pickle=False) as arrays:
            given = dict(arrays)
    with open_model(root, policy=Policy(variant, runtime, True)) as model:
        model.predict(given)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))  # noqa: T201


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
    return model.predict(request, {**(params or {}), **forced})


def _first(plan: Plan, size: int) -> Any:
    return next(_requests(plan, size))


def _requests(plan: Plan, size: int) -> Iterator[Any]:
    """Yield requests of a size without end, arrays as they are; in the order of a draw, as files are often sorted."""
    order = np.random.default_rng(0).permutation(len(plan.requests))
    items = itertools.cycle([plan.requests[index] for index in order])
    if not isinstance(plan.requests[0], str):
        yield from items
    while True:
        yield list(itertools.islice(items, size))


def _sizes(model: Model, plan: Plan) -> tuple[int, ...]:
    """Return how many items requests have; those of arrays as many as the first one."""
    if isinstance(plan.requests[0], str):
        return plan.batches
    return (_count(model, plan.requests[0]),)


def _count(model: Model, request: Any) -> int:
    """Return how many items a request has: of arrays what the first axis of the first input has."""
    if isinstance(request, list):
        return len(request)
    spec = model.signature.inputs[0]
    return int(request[spec.name].shape[0]) if spec.shape else 1


def _quality(model: Model, ask: Callable[..., Any], plan: Plan) -> dict[str, float]:
    assert plan.labels is not None
    asked = list(plan.requests[: len(plan.labels)])
    return model.task.metric(ask(asked, model.task.scored), plan.labels)


def _closeness(bundle: Bundle, variant: str) -> dict[str, float]:
    record = latest_accuracy(bundle.evidence(variant))
    return {limit.metric: record.metrics[limit.metric] for limit in bundle.manifest.budget.limits
            if record and limit.metric in record.metrics}  # fmt: skip


def _timed(ask: Mapping[str, Callable[..., Any]], plan: Plan, size: int) -> dict[str, Requests]:
    """Time requests of a size; in each round all variants get the same one."""
    streams = {name: _requests(plan, size) for name in ask}
    calls = {name: functools.partial(_next, call, streams[name]) for name, call in ask.items()}
    limit = plan.seconds * len(calls)
    samples = interleave(calls, rounds=plan.rounds, warmup=_WARMUP, seconds=limit, pause=_PAUSE)
    return {name: Requests(size, Timing.of(taken)) for name, taken in samples.items()}


def _next(call: Callable[..., Any], requests: Iterator[Any]) -> Any:
    return call(next(requests))


def _energy(model: Model, ask: Callable[..., Any], plan: Plan, meters: Sequence[Meter]) -> Energy | None:
    """Measure what is used while the largest requests are answered without a break."""
    size = max(plan.batches)
    requests, answered = _requests(plan, size), 0
    ask(next(requests))
    end = time.monotonic() + plan.seconds
    with measured(meters) as spent:
        while not answered or time.monotonic() < end:
            ask(request := next(requests))
            answered += _count(model, request)
    if spent.watts is None:
        return None
    return Energy(spent.watts, spent.watts * spent.seconds / answered, tuple(spent.joules))


def _memory(bundle: Bundle, candidate: Candidate, request: Any) -> float | None:
    """Return the most memory of a process that serves a variant alone, in MiB; None where a host does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    with tempfile.TemporaryDirectory(prefix="tdeploy-memory-") as folder:
        given = request
        if isinstance(request, Mapping):
            given = {"arrays": str(Path(folder) / "request.npz")}
            np.savez(given["arrays"], **request)
        done = run_child(_MEMORY, str(bundle.root), candidate.variant, candidate.runtime, json.dumps(given))
    if not done.ok:
        raise SessionError(f"Variant '{candidate.variant}' does not serve in a process of its own: {done.reason}")
    return int(done.output.splitlines()[-1]) / 1024
