"""Text in, vectors out: ours, the peers and the floor in one process, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data, floor, ours, peers
from benchmarks.report import Figure, summarize
from mlflow_tdeploy.core.measure import interleave, ratio

#: Rest before each call; the threads of the one before (OpenMP's, ONNX Runtime's) spin for some milliseconds.
_PAUSE = 0.03
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
    direction: Any = "at least"


@dataclass(frozen=True)
class Workload:
    """Texts and what is asked of them.

    Attributes:
        name: For the table.
        texts: The request.
        goals: The ratios.
        rounds: Rounds of the measurement.
        search: Rounds of the search for the best floor.
    """

    name: str
    texts: Sequence[str] = field(repr=False)
    goals: Sequence[Goal]
    rounds: int
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
        Workload("short", [data.SHORT_TEXT], short, 12 if quick else 60, 5 if quick else 40),
        Workload("mixed", texts[:48] if quick else texts, mixed, 3 if quick else 9, 2 if quick else 5),
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
        calls, searched = _with_floor(work, opened, workload)
        samples = interleave(
            {name: _bound(call, workload.texts) for name, call in calls.items()},
            rounds=workload.rounds, warmup=2 if workload.name == "short" else 1, pause=_PAUSE,
        )  # fmt: skip
        ratios = {f"{goal.of} / {goal.to}": ratio(samples, goal.of, goal.to) for goal in workload.goals}
        details[workload.name] = {
            "texts": len(workload.texts), "sha256": data.digest(workload.texts), "calls": summarize(samples),
            "ratios": ratios, "floor": searched,
        }  # fmt: skip
        figures += _figures(workload, ratios, samples, searched)
        if workload.name == "mixed":
            found = fidelity(calls, workload.texts)
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


def _with_floor(
    work: Path, opened: Mapping[str, peers.Embed], workload: Workload
) -> tuple[dict[str, peers.Embed], dict[str, Any]]:
    calls = dict(opened)
    searched: dict[str, Any] = {}
    for precision in _PRECISIONS:
        best, medians = floor.best_floor(work, precision, workload.texts, rounds=workload.search)
        calls[f"floor {precision}"] = best
        searched[precision] = {"best": best.settings, "searched_ms": medians}
    # Ours and its floor one after the other: a drift of the machine's speed hits both.
    order = [f"{who} {precision}" for precision in _PRECISIONS for who in ("floor", "ours")]
    return {name: calls[name] for name in (*order, *(name for name in calls if name not in order))}, searched


def _figures(
    workload: Workload,
    ratios: Mapping[str, float],
    samples: Mapping[str, Sequence[float]],
    searched: Mapping[str, Any],
) -> list[Figure]:
    found = [
        Figure(goal.name, ratios[f"{goal.of} / {goal.to}"], "x", goal.goal, goal.direction) for goal in workload.goals
    ]
    for name, seconds in samples.items():
        precision = name.removeprefix("floor ")
        note = str(searched[precision]["best"]).strip("{}").replace("'", "") if name.startswith("floor") else ""
        found.append(Figure(f"  {workload.name}: {name}", float(np.median(seconds)) * 1e3, "ms", note=note))
    return found


def _bound(call: peers.Embed, texts: Sequence[str]) -> Callable[[], object]:
    given = list(texts)
    return lambda: call(given)
