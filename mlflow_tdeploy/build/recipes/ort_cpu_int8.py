"""Dynamic int8: weights quantized per output channel, activations while running."""

from __future__ import annotations

import functools
from typing import ClassVar

from mlflow_tdeploy.build.graphs import CPU_FUSIONS, CPU_INT8_FUSIONS
from mlflow_tdeploy.build.quantize import quantize_dynamic_int8
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.tune import Fused, choose_fusions
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register("ort-cpu-int8")
class OrtCpuInt8(Recipe):
    """Fuses the portable graph as far as a quantizer can read it, and quantizes.

    What pays in fp32 may not pay in int8, so fusions are measured again, on the quantized graph. Packed attention does
    where it takes the padding mask: it is one int8 operator then, and stays fp32 otherwise.
    """

    id: ClassVar[str] = "ort-cpu-int8"
    precision: ClassVar[str] = "int8"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "ort"
    device: ClassVar[str] = "cpu"
    tuned: ClassVar[bool] = True

    def run(self, context: RecipeContext) -> Graph:
        """Fuse, quantize, measure, keep what pays."""
        fused = fused_for_int8(context)
        settings = {"dynamic": True, "per_channel": True, **fused.settings}
        return Graph(fused.path, Precision("int8", "int8", recipe=self.id, settings=settings), session=fused.session)


def fused_for_int8(context: RecipeContext) -> Fused:
    """Return the quantized graph with the fusions that pay in int8 on this kind of host."""
    return choose_fusions(
        context.base(),
        context.workdir,
        context.measure,
        trial=context.trial,
        fusions=CPU_INT8_FUSIONS if context.measure is None else CPU_FUSIONS,
        question=("packed_qkv",),
        # Weights beside the graph are mapped into memory: less of it, and opened sooner.
        convert=functools.partial(quantize_dynamic_int8, external_data=True),
    )
