"""Dynamic int8: weights quantized per output channel, activations while running."""

from __future__ import annotations

from typing import ClassVar

from mlflow_tdeploy.build.graphs import quantize_dynamic_int8
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register("ort-cpu-int8")
class OrtCpuInt8(Recipe):
    """Quantizes the fused graph; what was measured to pay there is kept."""

    id: ClassVar[str] = "ort-cpu-int8"
    precision: ClassVar[str] = "int8"
    parent: ClassVar[str | None] = "ort-cpu-fp32"
    format: ClassVar[Format] = "ort"
    device: ClassVar[str] = "cpu"

    def run(self, context: RecipeContext) -> Graph:
        """Quantize."""
        parent = context.base()
        context.output().parent.mkdir(parents=True)
        quantize_dynamic_int8(parent.path, context.output(), per_channel=True)
        precision = Precision("int8", "int8", recipe=self.id, settings={"dynamic": True, "per_channel": True})
        return Graph(context.output(), precision, session=parent.session)
