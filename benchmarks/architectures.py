"""Which architectures do which tasks: ``python -m benchmarks.architectures`` writes docs/architectures.md and JSON.

Small models with random weights, made from transformers' configs: what is logged of each task that they have a head
for, what is verified, how many attention blocks are fused, and whether int8 holds.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.report import Figure, Results, finish, say
from mlflow_tdeploy.build.graphs import op_counts
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.store.bundle import Bundle

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
#: Much of what takes time is done by one thread.
_AT_ONCE = 2
_FUSED = tuple(f"com.microsoft.{name}" for name in ("Attention", "MultiHeadAttention", "GroupQueryAttention"))
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_TEXT = {"vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 130, "initializer_range": 0.1}
_TEXT_TASKS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "sentence-embedding": "",
}
_IMAGE_TASKS = {"image-classification": "AutoModelForImageClassification", "image-feature-extraction": "AutoModel"}
_SIDE = 64
#: Variants that are asked for, the fused one, and the quantized one.
_WANTED, _FAST, _INT8 = ("fp32", "ort-cpu-int8"), "ort-cpu-fp32", "ort-cpu-int8"
_HEAD = """# Architectures and tasks

Made by `make architectures`: models of two layers with random weights, made from transformers' configs, logged for
every task that they have a head for, on a machine without a GPU. *Verified*: the exported graph answers as the
module does within the task's budget, at every corner of the shapes. *Fused*: blocks of attention that ONNX Runtime
runs as one operator, of those in the exported graph; the faster of several graphs is kept, which of models as small
as these may be one that is not fused. *int8*: dynamic int8 of such weights within the same budget, and its worst
cosine; trained weights lose something else. How fast a variant is, `tdeploy bench` says: models as small as these
would say what lies around a graph."""
#: Dynamic int8 is of matrix products: here are convolutions alone.
_NOTHING_TO_QUANTIZE = (("ResNet", "image-feature-extraction"),)
Made = Callable[[str], Mapping[str, Any]]


def _text(kind: str, **settings: Any) -> Made:
    def make(task: str) -> Mapping[str, Any]:
        import transformers

        usual = {} if kind == "xlnet" else {**_SMALL, **_TEXT}  # that one names its sizes otherwise
        config = transformers.AutoConfig.for_model(kind, **{**usual, **settings})
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(peers.MODEL), model_max_length=64)
        found = {"tokenizer": tokenizer, "task": task, "shapes": {"batch": (1, 8, 16), "sequence": (4, 32, 64)}}
        if _TEXT_TASKS[task]:
            return {**found, "model": getattr(transformers, _TEXT_TASKS[task]).from_config(config).eval()}
        return _pooled(transformers.AutoModel.from_config(config).eval(), tokenizer, found["shapes"])

    return make


def _pooled(model: Any, tokenizer: Any, shapes: Any) -> Mapping[str, Any]:
    """Return a SentenceTransformer of a model, with pooling by the mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    with tempfile.TemporaryDirectory(prefix="tdeploy-architectures-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=64)
    chain = SentenceTransformer(modules=[transformer, Pooling(model.config.hidden_size, "mean")], device="cpu")
    return {"model": chain, "shapes": shapes}


def _image(kind: str, processor: str = "ViTImageProcessorPil", **settings: Any) -> Made:
    def make(task: str) -> Mapping[str, Any]:
        import transformers

        config = transformers.AutoConfig.for_model(kind, **{"num_labels": 7, **settings})
        edge = {"shortest_edge": _SIDE} if processor.startswith("ConvNext") else {"height": _SIDE, "width": _SIDE}
        return {
            "model": getattr(transformers, _IMAGE_TASKS[task]).from_config(config).eval(),
            "image_processor": getattr(transformers, processor)(size=edge),
            "task": task,
            "shapes": {"batch": (1, 8, 16)},
        }

    return make


def _tower(kind: str) -> Made:
    def make(task: str) -> Mapping[str, Any]:
        import transformers

        if kind == "vision":
            config = transformers.CLIPVisionConfig(**_SMALL, image_size=_SIDE, patch_size=16)
            processor = transformers.ViTImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
            model = transformers.CLIPVisionModel(config).eval()
            return {"model": model, "image_processor": processor, "task": task, "shapes": {"batch": (1, 8, 16)}}
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(peers.MODEL), model_max_length=64)
        more = {"vocab_size": 30522, "max_position_embeddings": 64, "eos_token_id": tokenizer.sep_token_id}
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_SMALL, **more)).eval()
        return {
            "model": model, "tokenizer": tokenizer, "task": task,
            "shapes": {"batch": (1, 8, 16), "sequence": (4, 32, 64)},
        }  # fmt: skip

    return make


def _sound(kind: str) -> Made:
    def make(task: str) -> Mapping[str, Any]:
        import transformers

        random = np.random.default_rng(0)
        if kind == "whisper":
            config = transformers.WhisperConfig(
                d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=1,
                decoder_attention_heads=4, decoder_ffn_dim=128,
                max_source_positions=100, num_mel_bins=16,
            )  # fmt: skip
            model, name, size = transformers.WhisperModel(config).encoder.eval(), "input_features", (16, 200)
        else:
            config = transformers.Wav2Vec2Config(**_SMALL, conv_dim=[32] * 7, num_conv_pos_embeddings=16)
            model, name, size = transformers.Wav2Vec2Model(config).eval(), "input_values", (4000,)
        waves = [random.normal(size=(2, *size)).astype(np.float32) for _ in range(8)]
        return {
            "model": model, "task": task, "example": {name: waves[0]}, "verify_with": [{name: one} for one in waves],
            "shapes": {"batch": (1, 2, 4)},
        }  # fmt: skip

    return make


_XLNET = {"vocab_size": 30522, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}
_TEXTS = tuple(_TEXT_TASKS)
_NO_MASKS = tuple(task for task in _TEXTS if task != "fill-mask")
ARCHITECTURES: Mapping[str, tuple[Made, Sequence[str]]] = {
    "BERT": (_text("bert"), _TEXTS),
    "RoBERTa": (_text("roberta"), _TEXTS),
    "DistilBERT": (_text("distilbert", dim=64, hidden_dim=128, n_layers=2, n_heads=4), _TEXTS),
    "ALBERT": (_text("albert", embedding_size=32), _TEXTS),
    "ELECTRA": (_text("electra", embedding_size=32), _TEXTS),
    "DeBERTa-v2": (
        _text("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32), _TEXTS,
    ),
    "MPNet": (_text("mpnet"), _TEXTS),
    "XLM-R": (_text("xlm-roberta"), _TEXTS),
    "ModernBERT": (_text("modernbert", global_attn_every_n_layers=2, local_attention=16), _TEXTS),
    "CamemBERT": (_text("camembert"), _TEXTS),
    "XLNet": (_text("xlnet", **_XLNET), _NO_MASKS),
    "Longformer": (_text("longformer", attention_window=[16, 16]), _TEXTS),
    "BigBird": (_text("big_bird", attention_type="original_full"), _TEXTS),
    "ViT": (_image("vit", **_SMALL, image_size=_SIDE, patch_size=16), tuple(_IMAGE_TASKS)),
    "DeiT": (
        # transformers has two classifiers of it, and asks the config which
        _image("deit", **_SMALL, image_size=_SIDE, patch_size=16, architectures=["DeiTForImageClassification"]),
        tuple(_IMAGE_TASKS),
    ),
    "DINOv2": (_image("dinov2", **_SMALL, image_size=_SIDE, patch_size=16), tuple(_IMAGE_TASKS)),
    "Swin": (
        _image("swin", image_size=_SIDE, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4),
        tuple(_IMAGE_TASKS),
    ),
    "ConvNeXt": (
        _image("convnext", "ConvNextImageProcessorPil", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1]),
        tuple(_IMAGE_TASKS),
    ),
    "ResNet": (
        _image("resnet", "ConvNextImageProcessorPil", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
        tuple(_IMAGE_TASKS),
    ),
    "CLIP, of texts": (_tower("text"), ("feature-extraction",)),
    "CLIP, of images": (_tower("vision"), ("image-feature-extraction",)),
    "Whisper's encoder": (_sound("whisper"), ("tensors",)),
    "Wav2Vec2's encoder": (_sound("wav2vec2"), ("tensors",)),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Log every task of every architecture, write the page and the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(ARCHITECTURES), help="some; the others stay as they are")
    options = parser.parse_args(arguments)
    names = list(options.only or ARCHITECTURES)
    with ProcessPoolExecutor(_AT_ONCE, multiprocessing.get_context("spawn")) as pool:
        waiting = {name: {task: pool.submit(tried, name, task) for task in ARCHITECTURES[name][1]} for name in names}
        found = {name: {task: one.result() for task, one in of.items()} for name, of in waiting.items()}
    before = json.loads(RESULTS.read_text("utf-8"))["architectures"]["details"] if RESULTS.exists() else {}
    found = {name: found.get(name, before.get(name)) for name in ARCHITECTURES if name in found or name in before}
    page = table(found)
    say(f"\n{page}")
    PAGE.write_text(page)
    every = [one for of in found.values() for one in of.values()]
    verified = float(sum(one.get("verified") is True for one in every))
    results = Results()
    results.add("architectures", [Figure("tasks that are verified", verified, f"of {len(every)}")], found)
    return finish(results, RESULTS, quick=False)


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
            settings = dict(ARCHITECTURES[name][0](task))
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
        "fused": sum(counts.get(_FAST, {}).get(one, 0) for one in _FUSED),
        "int8": None if small is None else bool(small.passed),
        "int8_cosine": small.metrics.get("worst_cosine") if small else None,
        "skipped": dict(bundle.manifest.skipped),
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
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
    return "\n".join([*lines, *(["", "What was refused, and why:", "", *notes] if notes else []), ""])


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    if "why" in one:
        return ("refused", "-", "-", "-")
    small = "-" if one["int8"] is None else "within budget" if one["int8"] else "over budget"
    cosine = "" if one["int8_cosine"] is None else f" ({one['int8_cosine']:.4f})"
    return (
        "yes" if one["verified"] else "NO",
        "-" if one["worst_cosine"] is None else f"{one['worst_cosine']:.6f}",
        f"{one['fused']} of {one['blocks']}" if one["blocks"] else "none there",
        f"{small}{cosine}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
