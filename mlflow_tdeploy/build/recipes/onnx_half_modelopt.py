"""Strongly typed half precision by NVIDIA's Model Optimizer (AutoCast), which TensorRT 10 and 11 take as it is."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mlflow_tdeploy.build import modelopt
from mlflow_tdeploy.build.applied import FP32, applied, read_back
from mlflow_tdeploy.build.half import NOT_IN_HALF
from mlflow_tdeploy.build.half_range import Beyond, beyond_half
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
        """Look at real inputs, convert."""
        feeds = context.task.example_feeds("opt", ragged=True, items=context.data.real)
        plain = context.workdir / "plain" / "model.onnx"
        prepare(context.base().path, plain)
        context.output().parent.mkdir(parents=True)
        beyond = self.beyond(plain, context)
        modelopt.to_half(plain, context.output(), self.precision, feeds, without=beyond.nodes)
        asked = {name: FP32 if name in beyond.nodes else self.precision for name in applied(plain)}
        settings = {"keep_io_types": True, "beyond_fp16": dict(beyond.tensors), **read_back(context.output(), asked)}
        precision = Precision(self.precision, self.precision, recipe=self.id, kept=beyond.nodes, settings=settings)
        return Graph(context.output(), precision, session={"disabled_optimizers": list(NOT_IN_HALF)})

    def beyond(self, plain: Path, context: RecipeContext) -> Beyond:
        """Return what this precision does not hold of real inputs; brain floats have the range of fp32."""
        return Beyond()


@RECIPES.register("onnx-fp16-modelopt")
class OnnxFp16Modelopt(_Half):
    """Half precision."""

    id: ClassVar[str] = "onnx-fp16-modelopt"
    precision: ClassVar[str] = "fp16"

    def beyond(self, plain: Path, context: RecipeContext) -> Beyond:
        """Return what half precision does not hold."""
        return beyond_half(plain, context.calibration.batches) if context.calibration else Beyond()


@RECIPES.register("onnx-bf16-modelopt")
class OnnxBf16Modelopt(_Half):
    """Brain floats, for GPUs: ONNX Runtime's CPU provider has no operators for them, so nothing is checked there."""

    id: ClassVar[str] = "onnx-bf16-modelopt"
    precision: ClassVar[str] = "bf16"
    device: ClassVar[str] = "cuda"
    runs_on_cpu: ClassVar[bool] = False
