"""Hand-made bundles around a graph of one matrix product: real records, real files, made in milliseconds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.manifest import SCHEMA_VERSION, Manifest, SourceRecord
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.store.writer import BundleDraft

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
SIGNATURE = Signature(
    dims=(Dim("batch", 1, 2, 8),),
    inputs=(TensorSpec("x", "float32", ("batch", 4)),),
    outputs=(TensorSpec("y", "float32", ("batch", 3)),),
)


def linear_graph(path: Path, weights: np.ndarray = WEIGHTS) -> None:
    """Write y = x @ weights; weights of float16 make a graph with float16 inputs and outputs."""
    kind = TensorProto.FLOAT16 if weights.dtype == np.float16 else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", kind, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, ["batch", 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def make_bundle(
    root: Path,
    variants: Mapping[str, np.ndarray] | None = None,
    *,
    evidence: Mapping[str, list[Evidence]] | None = None,
    changes: Mapping[str, dict[str, object]] | None = None,
) -> Path:
    """Write a bundle of the task ``tensors``.

    Args:
        root: The model directory; the bundle is its ``tdeploy`` folder.
        variants: Weights of each variant's graph by id; the first is the reference.
        evidence: Evidence by variant id; passing accuracy for all when None.
        changes: Fields to replace in a variant's record, by id.
    """
    variants = variants or {"onnx-fp32": WEIGHTS}
    draft = BundleDraft(root / "tdeploy")
    x = np.array([[1, 2, 3, 4]], np.float32)
    request = GoldenRequest({"x": x}, {"x": x}, {"y": x @ WEIGHTS}, {"y": x @ WEIGHTS})
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        task="tensors",
        task_config={},
        source=SourceRecord("onnx", "linear"),
        signature=SIGNATURE,
        budget=Budget.of("worst_cosine >= 0.99"),
        reference=next(iter(variants)),
        golden=draft.write_golden((request,)),
    )
    draft.write_manifest(manifest)
    for variant_id, weights in variants.items():
        linear_graph(draft.root / "files" / variant_id / "model.onnx", weights)
        precision = "fp16" if weights.dtype == np.float16 else "fp32"
        variant = Variant(
            id=variant_id,
            format="ort" if variant_id.startswith("ort") else "onnx",
            precision=Precision(precision, precision),
            device="cpu" if variant_id.startswith("ort") else "any",
            entry=f"files/{variant_id}/model.onnx",
            files=draft.add_tree(f"files/{variant_id}"),
            dtypes={"x": "float16", "y": "float16"} if weights.dtype == np.float16 else {},
        )
        for record in (evidence or {}).get(variant_id, [accuracy(variant_id)] if evidence is None else []):
            draft.write_evidence(record)
        draft.write_variant(dataclasses.replace(variant, **(changes or {}).get(variant_id, {})))
    return root


def accuracy(variant_id: str, *, passed: bool = True, created: str = "2026-01-01T00:00:00Z") -> Evidence:
    """Return an accuracy record."""
    violations = () if passed else ("worst_cosine is 0.9 (budget worst_cosine >= 0.99)",)
    cosine = 1.0 if passed else 0.9
    return Evidence(
        variant_id, "accuracy", {"worst_cosine": cosine}, passed=passed, violations=violations, created=created
    )


def fill(path: Path) -> None:
    """Write a file until its disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
