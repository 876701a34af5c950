"""int8 within a budget, measured here: ``python -m benchmarks.precision`` prints a table and writes JSON.

Ours are opened through ``mlflow.pyfunc``; naive dynamic int8 is the floor of ``benchmarks.text``: ONNX Runtime's
quantizer with its defaults, per channel, in a bare loop with the best thread count and batch size. All in one process,
in turn; ratios of two at a time.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow_tdeploy
from benchmarks import classifier, data, floor, operators, optimum_defaults, ours, peers
from benchmarks.latency import fidelity
from benchmarks.report import Figure, Results, finish, say, summarize
from mlflow_tdeploy.build.calibration import Calibration
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.measure import interleave, ratio
from mlflow_tdeploy.store.bundle import Bundle

RESULTS = Path(__file__).parent / "results" / "precision.json"
#: What may be lost, and of which figures that is a condition.
BUDGET = "worst_cosine >= 0.995"
MIXED, STATIC, INT4, NAIVE = "ours int8, mixed", "ours int8, static", "ours int4", "naive dynamic int8"
TORCH, MODELOPT = "ours int8, of the torch module", "Model Optimizer's int8, its defaults"
OPTIMUM = "optimum-onnx's dynamic int8, its defaults, in a bare loop"
_VARIANTS = {
    "ours fp32": "ort-cpu-fp32",
    "ours int8, plain": "ort-cpu-int8",
    MIXED: "ort-cpu-int8-mixed",
    STATIC: "onnx-int8",
    TORCH: "onnx-int8-torch",
    INT4: "ort-cpu-int4",
}
#: What is looked for, and within which budget.
_SEARCHED = {MIXED: BUDGET, STATIC: BUDGET, TORCH: BUDGET, INT4: "worst_cosine >= 0.98"}
#: A budget that spares nothing: what Model Optimizer makes of the graph by itself.
_NONE = "worst_cosine >= 0"
_MODELOPT = "onnx-int8-modelopt"


@dataclass(frozen=True)
class Asked:
    """Texts, and how often they are asked.

    Attributes:
        name: For the table.
        texts: The request.
        rounds: Of all ways.
        search: Of each way of the naive one.
    """

    name: str
    texts: Sequence[str]
    rounds: int
    search: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few texts and rounds; writes no JSON")
    parser.add_argument("--only", choices=("embeddings", "classifier"), help="this model; both by default")
    options = parser.parse_args(arguments)
    results = Results()
    with tempfile.TemporaryDirectory(prefix="tdeploy-precision-") as folder:
        work = Path(folder)
        if options.only != "classifier":
            _embeddings(work, results, quick=options.quick)
        if options.only != "embeddings":
            say("the WordNet classifier")
            results.add("classifier", *classifier.measure(work / "classifier", BUDGET, quick=options.quick))
    return finish(results, options.out, quick=options.quick)


def _embeddings(work: Path, results: Results, *, quick: bool) -> None:
    say("peers and floor: saving and exporting")
    peers.prepare(work)
    floor.prepare(work)
    results.add("search", *_searched(model := work / "model"))
    say("Model Optimizer")
    mlflow_tdeploy.save_model(
        str(peers.MODEL), work / "modelopt", task="sentence-embedding", precisions=["fp32", _MODELOPT], budget=_NONE
    )
    say("optimum-onnx, in an environment of its own")
    optimum = optimum_defaults.make(work / "optimum")
    results.add("speed", *_speed(work, model, optimum, quick=quick))
    results.add("operators", *_operators(model, quick=quick))


def _searched(model: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Log the model with fp32 and plain int8, add what is within budgets, and return what that took."""
    say("save_model")
    mlflow_tdeploy.save_model(
        str(peers.MODEL), model, task="sentence-embedding", precisions=["fp32", "int8"], budget=ours.BUDGET
    )
    figures, details = list[Figure](), dict[str, Any]()
    fp32 = Bundle.open(model).variants["ort-cpu-fp32"]
    for name, budget in _SEARCHED.items():
        say(f"  the search for {name} within {budget}")
        started = time.perf_counter()
        (made,) = mlflow_tdeploy.extend_model(
            str(model), precisions=[_VARIANTS[name]], budget=budget, on_budget="raise"
        )
        seconds, settings = time.perf_counter() - started, dict(made.precision.settings)
        figures += [
            Figure(f"search for {name} within {budget}", seconds, "s", note=str(settings["searched"])),
            Figure("  graphs tried", float(len(settings["trials"])), ""),
            Figure(
                "  size beside fp32", made.size / fp32.size, "x", 0.3 if name == INT4 else None, "at most",
                note=f"{made.size / 1e6:.0f} MB",
            ),
        ]  # fmt: skip
        details[name] = {"settings": settings, "kept": list(made.precision.kept)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures.append(Figure("memory at most, of all this in one process", peak, "MiB"))
    return figures, details


def _operators(model: Path, *, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Return how much faster the products are in eight bits, and where the rest of the time goes."""
    say("  operators")
    bundle = Bundle.open(model)
    task, texts = bundle.task(), data.mixed_texts()
    batches = Calibration(task, VerifyData.of(texts[:16] if quick else texts)).batches
    times = {
        name: operators.profile(bundle.path(variant.entry), variant, batches, 2 if quick else 5)
        for name in ("ours fp32", MIXED)
        for variant in [bundle.variants[_VARIANTS[name]]]
    }
    products = {name: sum(found[kind] for kind in operators.PRODUCTS) for name, found in times.items()}
    total = {name: sum(found.values()) for name, found in times.items()}
    figures = [
        Figure(
            "products and attention, one thread: fp32 over int8 (mixed)", products["ours fp32"] / products[MIXED],
            "x", note="a plain int8 product alone: about 7 x",
        ),
        Figure("all operators, one thread: fp32 over int8 (mixed)", total["ours fp32"] / total[MIXED], "x"),
    ]  # fmt: skip
    figures += [
        Figure(f"  int8 (mixed): {kind}", 100 * spent / total[MIXED], "% of the time")
        for kind, spent in times[MIXED].most_common(6)
    ]
    return figures, {name: dict(found) for name, found in times.items()}


def _timed(calls: dict[str, peers.Embed], asked: Asked, rounds: int) -> dict[str, list[float]]:
    """Time calls in turn.

    Ratios are of two at a time: threads of many others, whose sessions let them spin, take a core from who has two.
    """
    named = {name: lambda call=call, given=list(asked.texts): call(given) for name, call in calls.items()}  # type: ignore[misc]
    return interleave(named, rounds=rounds, pause=0.03)


def _speed(work: Path, model: Path, optimum: Path | None, *, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    opened: dict[str, peers.Embed] = {name: ours.open_pyfunc(model, variant) for name, variant in _VARIANTS.items()}
    opened[MODELOPT] = ours.open_pyfunc(work / "modelopt", _MODELOPT)
    figures, details = list[Figure](), dict[str, Any]()
    texts = data.mixed_texts()
    for asked in (
        Asked("8 words", [data.SHORT_TEXT], *((12, 5) if quick else (100, 40))),
        Asked("256 texts", texts[:48] if quick else texts, *((3, 2) if quick else (11, 4))),
    ):
        say(f"  {asked.name}: search for the best naive one, then {asked.rounds} rounds")
        best, _ = floor.best_floor(floor.graph(work, "int8"), asked.texts, rounds=asked.search)
        calls: dict[str, peers.Embed] = {**opened, NAIVE: best}
        if optimum is not None:
            calls[OPTIMUM], _ = floor.best_floor(optimum, asked.texts, rounds=asked.search)
        lone = len(asked.texts) == 1
        beside = {"ours fp32": 2.5 if lone else None, NAIVE: None if lone else 1.3, "ours int8, plain": None}
        title, pairs = f"{asked.name}, int8 within the budget (mixed): faster than", dict[str, Any]()
        for name, goal in beside.items():
            found = _timed({name: calls[name], MIXED: calls[MIXED]}, asked, asked.rounds)
            figures.append(Figure(f"{title} {name}", ratio(found, name, MIXED), "x", goal, "at least"))
            pairs[name] = summarize(found)
        samples = _timed(calls, asked, max(3, asked.rounds // 2))
        details[asked.name] = {"pairs": pairs, "calls": summarize(samples), "naive": best.settings}
        figures += [
            Figure(f"  {asked.name}: {name}", details[asked.name]["calls"][name]["median_ms"], "ms") for name in calls
        ]
    found = fidelity({**calls, "mlflow.sentence_transformers": peers.open_peer("sentence_transformers", work)}, texts)
    goals = {MIXED: 0.995, STATIC: 0.995, TORCH: 0.995, INT4: 0.98}
    figures += [
        Figure(f"worst cosine to sentence_transformers, {name}", value, "", goals.get(name), "at least")
        for name, value in found.items()
    ]
    return figures, {**details, "worst_cosine_to_sentence_transformers": found}


if __name__ == "__main__":
    raise SystemExit(main())
