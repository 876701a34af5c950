"""The WordNet classifier within a budget of cosine and accuracy, measured on definitions that no search has seen."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np

import mlflow_tdeploy
from benchmarks import floor
from benchmarks.report import Figure, say, summarize
from mlflow_tdeploy.core.labelled import Labelled
from mlflow_tdeploy.core.measure import interleave, ratio
from mlflow_tdeploy.core.quality import classified

_EXAMPLE = Path(__file__).parents[1] / "examples" / "wordnet"
#: Eight words, as the other short text.
_SHORT = "a large motorboat that has a cabin aboard"
#: The search looks at so many of the training definitions: what is held out is for the figures alone.
_LOOKED_AT = 512
#: Points of accuracy that may be lost.
POINTS = 0.3
MIXED, STATIC, ALONE, NAIVE = "int8, mixed", "int8, static", "int8, mixed, by accuracy alone", "naive dynamic int8"
_VARIANTS = {"fp32": "ort-cpu-fp32", MIXED: "ort-cpu-int8-mixed", STATIC: "onnx-int8", ALONE: "ort-cpu-int8-mixed"}
Ask = Callable[[Sequence[str]], Any]


def measure(work: Path, budget: str, *, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Train it, look for int8 within the budget, and with accuracy as the only one, and measure accuracy and speed.

    Args:
        work: A new folder.
        budget: Besides at most :data:`POINTS` of accuracy lost.
        quick: A smoke run.
    """
    source = _trained(work, steps=30 if quick else 650)
    held_out = Labelled.read(_EXAMPLE / "data" / "test.tsv")
    points = f"accuracy_drop <= {POINTS / 100:g}"
    model, alone = work / "bundle", work / "alone"
    looked_at = _logged(source, model)
    shutil.copytree(model, alone)
    figures, searches = list[Figure](), dict[str, Any]()
    for name, where, within in (
        (MIXED, model, f"{budget}, {points}"), (STATIC, model, f"{budget}, {points}"), (ALONE, alone, points)
    ):  # fmt: skip
        figure, searches[name] = _searched(where, name, within, looked_at)
        figures.append(figure)
    floor.make(work / "floor", source=source, auto="AutoModelForSequenceClassification", output="logits")
    graph = work / "floor" / "int8.onnx"
    opened: dict[str, Ask] = {
        name: mlflow.pyfunc.load_model(
            str(alone if name == ALONE else model), model_config={"variant": variant}
        ).predict
        for name, variant in _VARIANTS.items()
    }
    accuracy = _accuracy(opened, graph, held_out)
    figures += [
        Figure(f"accuracy on {len(held_out.texts)} held-out definitions, {name}", 100 * value, "%")
        for name, value in accuracy.items()
    ]
    figures += [
        Figure(f"  points lost, {name}", 100 * (accuracy["fp32"] - accuracy[name]), "", goal, "at most")
        for name, goal in ((MIXED, POINTS), (STATIC, POINTS), (ALONE, POINTS), (NAIVE, None))
    ]
    speed, details = _speed(opened, graph, held_out.texts, quick=quick)
    return figures + speed, {"searches": searches, "accuracy": accuracy, **details}


def _trained(work: Path, steps: int) -> Path:
    say(f"  training, {steps} steps")
    out = work / "trained"
    arguments = ["--out", str(out), "--max-steps", str(steps), "--test-texts", "50"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{work / 'mlflow.db'}"}
    work.mkdir(parents=True)
    subprocess.run(
        [sys.executable, str(_EXAMPLE / "train.py"), *arguments], check=True, env=environment, cwd=work,
        capture_output=True,
    )  # fmt: skip
    return out


def _logged(source: Path, model: Path) -> dict[str, list[Any]]:
    """Log it in fp32, and return what searches look at."""
    train = Labelled.read(_EXAMPLE / "data" / "train.tsv")
    chosen = np.random.default_rng(0).permutation(len(train.texts))[:_LOOKED_AT]
    looked_at = {
        "text": [train.texts[index] for index in chosen],
        "label": [train.labels[index] for index in chosen],
    }
    mlflow_tdeploy.save_model(
        str(source), model, task="text-classification", precisions=["fp32"], shapes={"sequence": (2, 16, 64)},
        budget="worst_cosine >= 0.9, accuracy_drop <= 0.05", verify_with=looked_at,
    )  # fmt: skip
    return looked_at


def _searched(model: Path, name: str, budget: str, looked_at: Any) -> tuple[Figure, dict[str, Any]]:
    say(f"  the search for {name} within {budget}")
    started = time.perf_counter()
    (made,) = mlflow_tdeploy.extend_model(
        str(model), precisions=[_VARIANTS[name]], budget=budget, on_budget="raise", verify_with=looked_at
    )
    settings, seconds = dict(made.precision.settings), time.perf_counter() - started
    return Figure(f"search for {name} within {budget}", seconds, "s", note=str(settings["searched"])), settings


def _accuracy(opened: Mapping[str, Ask], graph: Path, held_out: Labelled) -> dict[str, float]:
    texts, labels = list(held_out.texts), list(held_out.labels)
    naive, _ = floor.best_floor(graph, texts[:64], rounds=1, finish=_as_it_is)
    names = sorted(set(labels))
    answers = {name: [one["label"] for one in _records(ask(texts))] for name, ask in opened.items()}
    answers[NAIVE] = [names[index] for index in naive(texts).argmax(axis=1)]
    return {name: classified(found, labels)["accuracy"] for name, found in answers.items()}


def _records(answer: Any) -> list[Mapping[str, Any]]:
    return list(answer.to_dict("records") if hasattr(answer, "to_dict") else answer)


def _speed(
    opened: Mapping[str, Ask], graph: Path, texts: Sequence[str], *, quick: bool
) -> tuple[list[Figure], dict[str, Any]]:
    figures, details = list[Figure](), dict[str, Any]()
    drawn = [texts[index] for index in np.random.default_rng(1).permutation(len(texts))[:256]]
    for title, asked, rounds in (
        ("8 words", [_SHORT], 10 if quick else 100),
        ("256 definitions", drawn, 3 if quick else 11),
    ):
        best, _ = floor.best_floor(graph, asked, rounds=2 if quick else 5, finish=_as_it_is)
        calls: dict[str, Ask] = {**opened, NAIVE: best}
        lone = len(asked) == 1
        goals = {"fp32": 2.5 if lone else None, NAIVE: None if lone else 1.3}
        for ours, (name, goal) in itertools.product((MIXED, ALONE), goals.items()):
            pair = {one: lambda call=calls[one], given=asked: call(given) for one in (name, ours)}  # type: ignore[misc]
            found = interleave(pair, rounds=rounds, pause=0.03)
            details[f"{title}, {ours}, {name}"] = summarize(found)
            within = "accuracy alone" if ours == ALONE else "the budget"
            figures.append(
                Figure(f"classifier, {title}, int8 within {within} (mixed): faster than {name}",
                       ratio(found, name, ours), "x", goal, "at least")
            )  # fmt: skip
    return figures, details


def _as_it_is(answer: np.ndarray, mask: np.ndarray) -> np.ndarray:
    del mask
    return answer
