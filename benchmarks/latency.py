"""Text in, vectors out: ours, the peers and the floor in one process, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import data, floor, ours, peers
from benchmarks.report import Figure, say, summarize
from mlflow_tdeploy.core.measure import interleave, ratio

#: Rest before each call; threads of the one before (OpenMP's, ONNX Runtime's) spin for a while. After 0.03 s two
#: sessions of two spinning threads, the very same floor twice, still take each other's core on two cores.
_PAUSE = 0.06
_PRECISIONS: tuple[floor.Precision, ...] = ("fp32", "int8")
SENTENCE_TRANSFORMERS = "mlflow.sentence_transformers"


@dataclass(frozen=True)
class Goal:
    """A ratio of two calls and its limit.

    Attributes:
        name: The figure's name.
        of: The call above.
        to: The call below.
        goal: The limit; None where there is none.
        direction: ``at most`` or ``at least``.
    """

    name: str
    of: str
    to: str
    goal: float | None
    direction: Literal["at most", "at least"] = "at least"

    @property
    def group(self) -> str:
        """Which measurement holds both calls."""
        return "floor" if "floor" in self.of + self.to else "peers"


@dataclass(frozen=True)
class Workload:
    """Texts and what is asked of them.

    Attributes:
        name: For the table.
        texts: The request.
        goals: The ratios.
        rounds: Rounds of ours against the floor.
        peer_rounds: Rounds of ours against the peers, some of which take many seconds per call.
        search: Rounds of the search for the best floor.
    """

    name: str
    texts: Sequence[str] = field(repr=False)
    goals: Sequence[Goal]
    rounds: int
    peer_rounds: int
    search: int


def workloads(*, quick: bool = False) -> list[Workload]:
    """Return the two workloads with their goals; ``quick`` shortens both."""
    short = [
        Goal("8 words, fp32: time over the floor's", "ours fp32", "floor fp32", 1.15, "at most"),
        Goal("8 words, int8: time over the floor's", "ours int8", "floor int8", 1.15, "at most"),
        Goal("8 words, fp32: faster than sentence_transformers", SENTENCE_TRANSFORMERS, "ours fp32", 5),
        Goal("8 words, int8: faster than sentence_transformers", SENTENCE_TRANSFORMERS, "ours int8", 13),
        Goal("8 words, fp32: faster than mlflow.transformers", "mlflow.transformers", "ours fp32", None),
        Goal("8 words, fp32: faster than mlflow.onnx", "mlflow.onnx", "ours fp32", None),
    ]
    mixed = [
        Goal("256 texts, fp32: time over the floor's", "ours fp32", "floor fp32", 1.0, "at most"),
        Goal("256 texts, int8: faster than the floor", "floor int8", "ours int8", 1.2),
        Goal("256 texts, fp32: faster than mlflow.onnx", "mlflow.onnx", "ours fp32", 7),
        Goal("256 texts, fp32: faster than sentence_transformers", SENTENCE_TRANSFORMERS, "ours fp32", None),
        Goal("256 texts, int8: faster than sentence_transformers", SENTENCE_TRANSFORMERS, "ours int8", None),
        Goal("256 texts, fp32: faster than mlflow.transformers", "mlflow.transformers", "ours fp32", None),
    ]
    texts = data.mixed_texts()
    return [
        Workload("short", [data.SHORT_TEXT], short, *((12, 5, 5) if quick else (100, 40, 40))),
        Workload("mixed", texts[:48] if quick else texts, mixed, *((3, 2, 2) if quick else (11, 4, 4))),
    ]


def measure(work: Path, model: Path, *, quick: bool = False) -> tuple[list[Figure], dict[str, Any]]:
    """Measure both workloads and how close every way is to sentence-transformers.

    Args:
        work: Where peers and floor were prepared.
        model: The logged model.
        quick: A smoke run: fewer texts and rounds.
    """
    opened: dict[str, peers.Embed] = {f"mlflow.{name}": peers.open_peer(name, work) for name in peers.PEERS}
    opened |= {f"ours {precision}": ours.open_pyfunc(model, ours.VARIANTS[precision]) for precision in _PRECISIONS}
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for workload in workloads(quick=quick):
        say(f"  {workload.name}: search for the best floor")
        floors, searched = _floors(work, workload)
        own = {name: opened[name] for name in opened if name.startswith("ours")}
        groups = {
            "floor": _timed(_in_pairs(own, floors), workload, workload.rounds),
            "peers": _timed(opened, workload, workload.peer_rounds),
        }
        ratios = {goal: ratio(groups[goal.group], goal.of, goal.to) for goal in workload.goals}
        details[workload.name] = {
            "texts": len(workload.texts), "sha256": data.digest(workload.texts),
            "ratios": {f"{goal.of} / {goal.to}": value for goal, value in ratios.items()},
            "calls": {group: summarize(samples) for group, samples in groups.items()}, "floor": searched,
        }  # fmt: skip
        figures += [Figure(goal.name, value, "x", goal.goal, goal.direction) for goal, value in ratios.items()]
        figures += _medians(workload, groups, searched)
        if workload.name == "mixed":
            found = fidelity({**opened, **floors}, workload.texts)
            details["worst_cosine_to_sentence_transformers"] = found
            figures += [Figure(f"worst cosine to sentence_transformers, {n}", v, "") for n, v in found.items()]
    return figures, details


def fidelity(calls: Mapping[str, peers.Embed], texts: Sequence[str]) -> dict[str, float]:
    """Return each call's worst cosine to sentence-transformers, text by text."""
    reference = _unit(calls[SENTENCE_TRANSFORMERS](texts))
    names = [name for name in calls if name not in (SENTENCE_TRANSFORMERS, "mlflow.transformers")]
    return {name: float((_unit(calls[name](texts)) * reference).sum(axis=1).min()) for name in names}


def _unit(vectors: Any) -> np.ndarray:
    array = np.asarray(vectors, dtype=np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def _floors(work: Path, workload: Workload) -> tuple[dict[str, peers.Embed], dict[str, Any]]:
    """Return the best floor of each precision for a workload, and what the search saw."""
    calls: dict[str, peers.Embed] = {}
    searched: dict[str, Any] = {}
    for precision in _PRECISIONS:
        best, medians = floor.best_floor(floor.graph(work, precision), workload.texts, rounds=workload.search)
        calls[f"floor {precision}"] = best
        searched[precision] = {"best": best.settings, "searched_ms": medians}
    return calls, searched


def _in_pairs(own: Mapping[str, peers.Embed], floors: Mapping[str, peers.Embed]) -> dict[str, peers.Embed]:
    """Return ours and its floor one after the other: a drift of the machine's speed hits both."""
    both = {**own, **floors}
    return {name: both[name] for precision in _PRECISIONS for name in (f"floor {precision}", f"ours {precision}")}


def _timed(calls: Mapping[str, peers.Embed], workload: Workload, rounds: int) -> dict[str, list[float]]:
    say(f"  {workload.name}: {rounds} rounds of {', '.join(calls)}")
    bound = {name: _bound(call, workload.texts) for name, call in calls.items()}
    return interleave(bound, rounds=rounds, warmup=2 if len(workload.texts) == 1 else 1, pause=_PAUSE)


def _medians(
    workload: Workload, groups: Mapping[str, Mapping[str, Sequence[float]]], searched: Mapping[str, Any]
) -> list[Figure]:
    """Return every call's median; ours twice, as each group has its own conditions."""
    found = []
    for group, samples in groups.items():
        for name, seconds in samples.items():
            best = searched[name.removeprefix("floor ")]["best"] if name.startswith("floor") else {}
            note = ", ".join(f"{key} {value}" for key, value in best.items())
            title = f"  {workload.name}, with the {group}: {name}"
            found.append(Figure(title, float(np.median(seconds)) * 1e3, "ms", note=note))
    return found


def _bound(call: peers.Embed, texts: Sequence[str]) -> Callable[[], object]:
    given = list(texts)
    return lambda: call(given)
