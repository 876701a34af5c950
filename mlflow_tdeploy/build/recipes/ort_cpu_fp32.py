"""The fused graph for ONNX Runtime's CPU provider: every fusion in it earned its place by a measurement."""

from __future__ import annotations

from typing import ClassVar

from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.tune import choose_fusions
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register("ort-cpu-fp32")
class OrtCpuFp32(Recipe):
    """Fuses the portable graph."""

    id: ClassVar[str] = "ort-cpu-fp32"
    precision: ClassVar[str] = "fp32"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "ort"
    device: ClassVar[str] = "cpu"
    tuned: ClassVar[bool] = True

    def run(self, context: RecipeContext) -> Graph:
        """Fuse, measure, keep what pays."""
        fused = choose_fusions(context.base(), context.workdir, context.measure, trial=context.trial)
        precision = Precision(recipe=self.id, settings=fused.settings)
        return Graph(fused.path, precision, session=fused.session)
