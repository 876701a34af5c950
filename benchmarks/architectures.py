"""Which architectures do which tasks: ``python -m benchmarks.architectures`` writes docs/architectures.md and JSON.

Small models with random weights, made from transformers' configs: what is logged of each task that they have a head
for, what is verified, how many attention blocks are fused, and whether int8 holds; of wider ones, one of each
architecture and nothing beside it, how fast the variants are.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.architecture_models import ARCHITECTURES
from benchmarks.data import glosses, photographs
from benchmarks.report import Figure, Results, finish, say
from mlflow_tdeploy.build.graphs import FUSED_OPS, fuse_for_ort, op_counts
from mlflow_tdeploy.build.plan import HF
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.measure import interleave
from mlflow_tdeploy.store.bundle import Bundle

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
#: Much of what takes time is done by one thread.
_AT_ONCE = 2
#: Variants that are asked for, the fused one, and the quantized one.
_WANTED, _FAST, _INT8 = ("fp32", "ort-cpu-int8"), "ort-cpu-fp32", "ort-cpu-int8"
_TIMED = (HF, "onnx-fp32", _FAST, _INT8)
_HEAD = """# Architectures and tasks

Made by `make architectures`: models of two layers with random weights, made from transformers' configs, logged for
every task that they have a head for, on a machine without a GPU. *Verified*: the exported graph answers as the
module does within the task's budget, at every corner of the shapes. *Fused*: blocks of attention that ONNX Runtime
runs as one operator in the variant that is kept, of those in the exported graph; where more could be fused, how many
in brackets: the faster graph is kept, which of models as small as these is now and then the other one. *int8*:
dynamic int8 of such weights within the same budget, and its worst cosine; trained weights lose something else."""
_SPEED = """## Speeds

Models of two layers and 384 units (Swin, ConvNeXt and ResNet of their own sizes; images of 224 pixels a side), one of
each architecture, one after the other with nothing beside them: from a request for 64 definitions of WordNet, or for
16 photographs as JPEG files, to its answers (hidden states), medians. PyTorch's in ms, each on all processors; and how
many times faster the same model answers by the exported graph as it is, by the one that is kept for ONNX Runtime on
CPUs (`ort-cpu-fp32`), by dynamic int8. Decoding of images is in all of them."""
#: Items of a request that is timed.
_TEXTS, _IMAGES = 64, 16
#: Dynamic int8 is of matrix products: here are convolutions alone.
_NOTHING_TO_QUANTIZE = (("ResNet", "image-feature-extraction"),)


def main(arguments: Sequence[str] | None = None) -> int:
    """Log every task of every architecture, time one of each, write the page and the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(ARCHITECTURES), help="some; the others stay as they are")
    parser.add_argument("--skip", choices=("tasks", "speeds"), help="that part stays as it is")
    options = parser.parse_args(arguments)
    names = list(options.only or ARCHITECTURES)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    before = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    tasks = {} if options.skip == "tasks" else _tasks(names)
    times = {} if options.skip == "speeds" else {name: speeds(name) for name in names}
    tasks, times = _kept(tasks, before, "architectures"), _kept(times, before, "speeds")
    page = table(tasks, times)
    say(f"\n{page}")
    PAGE.write_text(page)
    every = [one for of in tasks.values() for one in of.values()]
    verified = float(sum(one.get("verified") is True for one in every))
    timed = float(sum("why" not in one for one in times.values()))
    results = Results()
    results.add("architectures", [Figure("tasks that are verified", verified, f"of {len(every)}")], tasks)
    results.add("speeds", [Figure("architectures that are timed", timed, f"of {len(times)}")], times)
    return finish(results, RESULTS, quick=False)


def _tasks(names: Sequence[str]) -> dict[str, Any]:
    with ProcessPoolExecutor(_AT_ONCE, multiprocessing.get_context("spawn")) as pool:
        waiting = {name: {task: pool.submit(tried, name, task) for task in ARCHITECTURES[name][1]} for name in names}
        return {name: {task: one.result() for task, one in of.items()} for name, of in waiting.items()}


def _kept(found: Mapping[str, Any], before: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return what was found, and for the other architectures what was there."""
    old = before.get(part, {}).get("details", {})
    return {name: found.get(name, old.get(name)) for name in ARCHITECTURES if name in found or name in old}


def tried(name: str, task: str) -> dict[str, Any]:
    """Return what becomes of a task of an architecture; ``why`` where nothing does."""
    import torch

    import mlflow_tdeploy

    say(f"  {name}: {task}")
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tdeploy-architectures-") as folder:
        begin = time.monotonic()
        try:
            settings = dict(ARCHITECTURES[name][0](task, False))
            wanted = [one for one in _WANTED if one != _INT8 or (name, task) not in _NOTHING_TO_QUANTIZE]
            mlflow_tdeploy.save_model(settings.pop("model"), Path(folder) / "model", precisions=wanted, **settings)
        except Exception as error:
            return {"why": " ".join(str(error).split())[:300], "seconds": round(time.monotonic() - begin, 1)}
        return _state(Bundle.open(Path(folder) / "model"))


def _state(bundle: Bundle) -> dict[str, Any]:
    verdicts = {name: latest_accuracy(bundle.evidence(name)) for name in bundle.variants}
    portable, fast, small = (verdicts.get(one) for one in ("onnx-fp32", _FAST, _INT8))
    counts = {
        name: op_counts(bundle.path(variant.entry))
        for name, variant in bundle.variants.items()
        if variant.format in ("onnx", "ort") and variant.files
    }
    return {
        "verified": bool(portable and portable.passed),
        "worst_cosine": fast.metrics.get("worst_cosine") if fast else None,
        "blocks": counts.get("onnx-fp32", {}).get("Softmax", 0),
        "fused": sum(counts.get(_FAST, {}).get(one, 0) for one in FUSED_OPS["attention"]),
        "could_be_fused": _fusible(bundle),
        "int8": None if small is None else bool(small.passed),
        "int8_cosine": small.metrics.get("worst_cosine") if small else None,
        "skipped": dict(bundle.manifest.skipped),
    }


def _fusible(bundle: Bundle) -> int:
    """Return how many blocks of attention the fusers know, whether or not it pays to fuse them."""
    if (portable := bundle.variants.get("onnx-fp32")) is None or not portable.files:
        return 0
    with tempfile.TemporaryDirectory(prefix="tdeploy-architectures-") as folder:
        return fuse_for_ort(bundle.path(portable.entry), Path(folder) / "model.onnx").get("attention", 0)


def speeds(name: str) -> dict[str, Any]:
    """Return how long the variants of a wide model take, in ms; ``why`` where none is held against the module."""
    import torch

    import mlflow_tdeploy

    say(f"  {name}: speeds")
    torch.manual_seed(0)
    make, (task, *_) = ARCHITECTURES[name]
    with tempfile.TemporaryDirectory(prefix="tdeploy-architectures-") as folder:
        settings = dict(make(task, True))
        settings["budget"] = "worst_cosine >= 0"  # what is measured is speed: of random weights, int8 is as it comes
        try:
            mlflow_tdeploy.save_model(settings.pop("model"), Path(folder) / "model", precisions=_WANTED, **settings)
        except Exception as error:
            return {"why": " ".join(str(error).split())[:300]}
        return _timed(Path(folder) / "model")


def _timed(model: Path) -> dict[str, Any]:
    """Return medians in ms by variant, from a request to its answers; or ``why``."""
    import mlflow_tdeploy

    bundle = Bundle.open(model)
    task = bundle.task()
    there = [one for one in _TIMED if one in bundle.variants and bundle.variants[one].files]
    if HF not in there or _FAST not in there or not task.columns:
        return {"why": f"kept are {', '.join(there) or 'no variants'}: nothing is held against the module"}
    items: list[Any] = photographs(_IMAGES) if task.input_kind == "image" else list(glosses()[:_TEXTS])
    with mlflow_tdeploy.load_model(str(model)) as loaded:
        calls = {one: functools.partial(loaded.predict, items, variant=one) for one in there}
        samples = interleave(calls, rounds=20, warmup=3, seconds=20, pause=0.02, lead=1)
    return {one: 1e3 * float(np.median(seconds)) for one, seconds in samples.items()}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], times: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page."""
    lines = [
        *_HEAD.splitlines(),
        "",
        "| architecture | task | verified | worst cosine of `ort-cpu-fp32` | attention fused | int8 |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for name, of in found.items():
        for task, one in of.items():
            lines.append(f"| {name} | `{task}` | {' | '.join(_cells(one))} |")
            why = [one["why"]] if "why" in one else [f"{what}: {told}" for what, told in one["skipped"].items()]
            notes += [f"- {name}, `{task}`: {told}" for told in why]
    notes += [f"- {name}, speeds: {one['why']}" for name, one in times.items() if "why" in one]
    lines += ["", *_SPEED.splitlines(), "", *_speed_lines(times)] if times else []
    return "\n".join([*lines, *(["", "What was refused, and why:", "", *notes] if notes else []), ""])


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    if "why" in one:
        return ("refused", "-", "-", "-")
    small = "-" if one["int8"] is None else "within budget" if one["int8"] else "over budget"
    cosine = "" if one["int8_cosine"] is None else f" ({one['int8_cosine']:.4f})"
    most = one.get("could_be_fused", 0)
    more = f" ({most})" if most > one["fused"] else ""
    return (
        "yes" if one["verified"] else "NO",
        "-" if one["worst_cosine"] is None else f"{one['worst_cosine']:.6f}",
        f"{one['fused']}{more} of {one['blocks']}" if one["blocks"] else "none there",
        f"{small}{cosine}",
    )


def _speed_lines(times: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| architecture | PyTorch, ms | exported | fp32 | int8 |", "|---|---|---|---|---|"]
    for name, of in times.items():
        if HF in of:
            faster = (f"{of[HF] / of[one]:.2f} x" if one in of else "-" for one in ("onnx-fp32", _FAST, _INT8))
            lines.append(f"| {name} | {of[HF]:.2f} | {' | '.join(faster)} |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
