"""Builds and recipes that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.pipeline import build_bundle
from mlflow_tdeploy.build.recipes import Graph, Recipe
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.staging import staged_directory
from mlflow_tdeploy.store.writer import BundleDraft

ALL = {"hf", "onnx-fp32", "onnx-fp16", "ort-cpu-fp32", "ort-cpu-int8"}


QUICK = BuildOptions(measure=False)


FP32 = BuildOptions(measure=False, precisions=("onnx-fp32",))


def build(source, target: Path, options=QUICK, progress=None):
    with staged_directory(target) as folder:
        report = build_bundle(source, BundleDraft(folder / "tdeploy"), options, progress)
    return report, Bundle.open(target)


def accuracy(bundle: Bundle, variant_id: str):
    return latest_accuracy(bundle.evidence(variant_id))


class Perturbed(Recipe):
    """The portable graph with other weights: what a broken step would give."""

    id: ClassVar[str] = "onnx-broken"
    precision: ClassVar[str] = "broken"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar = "onnx"
    device: ClassVar[str] = "any"
    factor: ClassVar[float] = -1.0

    def run(self, context):
        model = onnx.load(context.base().path)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                weights = np.roll(numpy_helper.to_array(tensor), 1, axis=0) * self.factor
                tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
        context.output().parent.mkdir(parents=True)
        onnx.save(model, context.output())
        return Graph(context.output(), Precision(recipe=self.id))


class NotANumber(Perturbed):
    id: ClassVar[str] = "onnx-nan"
    factor: ClassVar[float] = float("nan")


class Unopenable(Perturbed):
    """The portable graph with an operator that no runtime has."""

    id: ClassVar[str] = "onnx-unopenable"

    def run(self, context):
        graph = super().run(context)
        model = onnx.load(graph.path)
        model.graph.node[0].op_type = "NoSuchOperator"
        onnx.save(model, graph.path)
        return graph


class Outlier(torch.nn.Module):
    """One input channel is thousands of times larger than the others, which carry the answer: int8 rounds them off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 64)
        self.last = torch.nn.Linear(64, 3, bias=False)
        with torch.no_grad():
            self.first.bias[0] += 2e4
            self.last.weight[:, 0] = 0

    def forward(self, x):
        return {"y": self.last(self.first(x))}
