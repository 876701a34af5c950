"""Half precision for GPUs; inputs and outputs stay as the signature says."""

from __future__ import annotations

from typing import ClassVar

from mlflow_tdeploy.build.applied import FP16, FP32, applied, read_back
from mlflow_tdeploy.build.half import FP32_OPS, NOT_IN_HALF, to_fp16
from mlflow_tdeploy.build.half_range import Beyond, beyond_half
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register("onnx-fp16")
class OnnxFp16(Recipe):
    """Converts the portable graph."""

    id: ClassVar[str] = "onnx-fp16"
    precision: ClassVar[str] = "fp16"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "onnx"
    device: ClassVar[str] = "any"

    def run(self, context: RecipeContext) -> Graph:
        """Convert."""
        context.output().parent.mkdir(parents=True)
        beyond = beyond_half(context.base().path, context.calibration.batches) if context.calibration else Beyond()
        to_fp16(context.base().path, context.output(), keep_nodes=beyond.nodes)
        asked = {name: FP32 if name in beyond.nodes else FP16 for name in applied(context.base().path) if name}
        settings = {
            "fp32_operators": list(FP32_OPS),
            "keep_io_types": True,
            "beyond_fp16": dict(beyond.tensors),
            **read_back(context.output(), asked),
        }
        precision = Precision("fp16", "fp16", recipe=self.id, kept=beyond.nodes, settings=settings)
        return Graph(context.output(), precision, session={"disabled_optimizers": list(NOT_IN_HALF)})
