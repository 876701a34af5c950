"""Which recipes hold on which architectures: ``python -m benchmarks.support`` writes docs/support.md and JSON.

Small models with random weights, each recipe for each of them: that graphs are made, opened here, and answer as the
module does within the budget. What a trained model loses is another matter: that is measured when it is logged.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.report import Figure, Results, finish, say
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.store.bundle import Bundle

RESULTS = Path(__file__).parent / "results" / "support.json"
PAGE = Path(__file__).parent.parent / "docs" / "support.md"
BUDGET = "worst_cosine >= 0.98"
RECIPES = (
    "onnx-fp32", "onnx-fp16", "ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int8-mixed", "ort-cpu-int4", "onnx-int8",
    "onnx-int8-torch", "onnx-int8-modelopt", "onnx-int8-smoothquant-modelopt", "onnx-fp8-modelopt",
    "onnx-int4-modelopt", "onnx-fp16-modelopt",
)  # fmt: skip
#: Much of what takes time is done by one thread.
_AT_ONCE = 2
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {"vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 130}


def _text(kind: str, **settings: Any) -> Callable[[], Mapping[str, Any]]:
    def make() -> Mapping[str, Any]:
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.for_model(kind, **{**_SMALL, **_TEXT, **settings})
        tokenizer = AutoTokenizer.from_pretrained(str(peers.MODEL))
        shapes = {"sequence": (2, 16, 64)}
        model = AutoModel.from_config(config).eval()
        return {"model": model, "tokenizer": tokenizer, "task": "feature-extraction", "shapes": shapes}

    return make


def _pictures(kind: str, **settings: Any) -> Callable[[], Mapping[str, Any]]:
    def make() -> Mapping[str, Any]:
        from transformers import AutoConfig, AutoModel

        random = np.random.default_rng(0)
        pictures = [random.normal(size=(2, 3, 32, 32)).astype(np.float32) for _ in range(8)]
        return {
            "model": AutoModel.from_config(AutoConfig.for_model(kind, **settings)).eval(),
            "task": "tensors",
            "example": {"pixel_values": pictures[0]},
            "verify_with": [{"pixel_values": one} for one in pictures],
        }

    return make


ARCHITECTURES: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "BERT": _text("bert"),
    "RoBERTa": _text("roberta"),
    "DistilBERT": _text("distilbert", dim=64, hidden_dim=128, n_layers=2, n_heads=4),
    "ALBERT": _text("albert", embedding_size=32),
    "ELECTRA": _text("electra", embedding_size=32),
    "DeBERTa-v2": _text("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32),
    "MPNet": _text("mpnet"),
    "ModernBERT": _text("modernbert", global_attn_every_n_layers=2, local_attention=16),
    "ViT": _pictures("vit", **_SMALL, image_size=32, patch_size=8),
    "ConvNeXt": _pictures("convnext", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make every recipe of every architecture, write the page and the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(ARCHITECTURES), help="some; the others stay as they are")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="some; the others stay as they are")
    options = parser.parse_args(arguments)
    names, recipes = list(options.only or ARCHITECTURES), list(options.recipes or RECIPES)
    with ProcessPoolExecutor(_AT_ONCE, multiprocessing.get_context("spawn")) as pool:
        waiting = {name: {recipe: pool.submit(tried, name, recipe) for recipe in recipes} for name in names}
        found = {name: {recipe: one.result() for recipe, one in of.items()} for name, of in waiting.items()}
    found = _joined(found)
    page = table(found)
    say(f"\n{page}")
    PAGE.write_text(page)
    made = [one["state"] == "made" for of in found.values() for one in of.values()]
    results = Results()
    results.add(
        "recipes", [Figure("recipes that are made within the budget", float(sum(made)), f"of {len(made)}")], found
    )
    return finish(results, RESULTS, quick=False)


def _joined(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what was found beside what an earlier run has found of the others."""
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["recipes"]["details"] if RESULTS.exists() else {}
    return {
        name: {
            recipe: one
            for recipe in RECIPES
            if (one := found.get(name, {}).get(recipe, before.get(name, {}).get(recipe))) is not None
        }
        for name in ARCHITECTURES
        if name in before or name in found
    }


def tried(name: str, recipe: str) -> dict[str, Any]:
    """Return what becomes of a recipe on an architecture: ``state`` is ``made``, ``over``, ``none`` or ``failed``."""
    import torch

    import mlflow_tdeploy

    say(f"  {name}: {recipe}")
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tdeploy-support-") as folder:
        settings = dict(ARCHITECTURES[name]())
        try:
            mlflow_tdeploy.save_model(
                settings.pop("model"),
                Path(folder) / "model",
                precisions=["onnx-fp32", recipe],
                budget=BUDGET,
                **settings,
            )
        except Exception as error:
            return {"state": "failed", "why": " ".join(str(error).split())[:300]}
        return _state(Bundle.open(Path(folder) / "model"), recipe)


def _state(bundle: Bundle, recipe: str) -> dict[str, Any]:
    variant = bundle.variants.get(recipe)
    if variant is None:
        return {"state": "none", "why": bundle.manifest.skipped.get(recipe, "")}
    verdict = latest_accuracy(bundle.evidence(recipe))
    if verdict is not None and "worst_cosine" not in verdict.metrics:  # it answers, and not as the module does at all
        return {"state": "failed", "why": "its answers cannot be compared with the module's"}
    cosine = verdict.metrics["worst_cosine"] if verdict else None
    kept = len(variant.precision.kept)
    return {"state": "over" if variant.dropped else "made", "worst_cosine": cosine, "kept": kept}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the page."""
    names = list(found)
    lines = [
        "# Architectures and recipes",
        "",
        f"Made by `make support` on models of two layers with random weights, within `{BUDGET}`: the worst cosine of",
        "the hidden states beside the module's, on a machine without a GPU, and how many products or layers stayed in",
        "higher precision for it. Random weights show that a recipe works on an architecture, not what a trained model",
        "loses.",
        "",
        f"| recipe | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    recipes = next(iter(found.values()))
    lines += [f"| `{recipe}` | {' | '.join(cell(found[name][recipe]) for name in names)} |" for recipe in recipes]
    told = ((name, recipe, one) for name, of in found.items() for recipe, one in of.items() if one.get("why"))
    notes = [f"- {name}, `{recipe}`: {one['why']}" for name, recipe, one in told]
    return "\n".join([*lines, *(["", "Where there is none:", "", *notes] if notes else []), ""])


def cell(one: Mapping[str, Any]) -> str:
    """Return what a cell says."""
    if one["state"] in ("none", "failed"):
        return {"none": "none", "failed": "FAILED"}[one["state"]]
    cosine = "made, not checked" if one["worst_cosine"] is None else f"{one['worst_cosine']:.4f}"
    kept = f" ({one['kept']})" if one["kept"] else ""
    return f"over: {cosine}" if one["state"] == "over" else f"{cosine}{kept}"


if __name__ == "__main__":
    raise SystemExit(main())
