"""Strongly typed half precision by NVIDIA's Model Optimizer (AutoCast), which TensorRT 10 and 11 take as it is."""

from __future__ import annotations

from typing import ClassVar

from mlflow_tdeploy.build import modelopt
from mlflow_tdeploy.build.half import NOT_IN_HALF
from mlflow_tdeploy.build.quantize import prepare
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


class _Half(Recipe):
    """Converts the portable graph; what leaves the range of half precision on real data stays fp32."""

    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "onnx"
    device: ClassVar[str] = "any"
    default: ClassVar[bool] = False

    def run(self, context: RecipeContext) -> Graph:
        """Look at a batch, convert."""
        feeds = context.task.example_feeds("opt", ragged=True, items=context.data.real)
        plain = context.workdir / "plain" / "model.onnx"
        prepare(context.base().path, plain)
        context.output().parent.mkdir(parents=True)
        modelopt.to_half(plain, context.output(), self.precision, feeds)
        precision = Precision(self.precision, self.precision, recipe=self.id, settings={"keep_io_types": True})
        return Graph(context.output(), precision, session={"disabled_optimizers": list(NOT_IN_HALF)})


@RECIPES.register("onnx-fp16-modelopt")
class OnnxFp16Modelopt(_Half):
    """Half precision."""

    id: ClassVar[str] = "onnx-fp16-modelopt"
    precision: ClassVar[str] = "fp16"


@RECIPES.register("onnx-bf16-modelopt")
class OnnxBf16Modelopt(_Half):
    """Brain floats, for GPUs: ONNX Runtime's CPU provider has no operators for them, so nothing is checked there."""

    id: ClassVar[str] = "onnx-bf16-modelopt"
    precision: ClassVar[str] = "bf16"
    device: ClassVar[str] = "cuda"
    runs_on_cpu: ClassVar[bool] = False
