"""The fused half-precision graph for ONNX Runtime's CUDA provider."""

from __future__ import annotations

from typing import ClassVar

from mlflow_tdeploy.build.graphs import FUSIONS, fuse_for_ort
from mlflow_tdeploy.build.half import FP32_OPS, NOT_IN_HALF, to_fp16
from mlflow_tdeploy.build.half_range import Beyond, beyond_half
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register("ort-cuda-fp16")
class OrtCudaFp16(Recipe):
    """Fuses the portable graph and converts what comes of it.

    Every fusion is taken, without a measurement: CUDA's fused kernels save launches and trips through memory, whatever
    the host. A CPU computes the graph in fp32 with casts around each operator, so that its answers can be checked
    there, but not what a GPU makes of them.
    """

    id: ClassVar[str] = "ort-cuda-fp16"
    precision: ClassVar[str] = "fp16"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "ort"
    device: ClassVar[str] = "cuda"
    default: ClassVar[bool] = False
    default_on_gpu: ClassVar[bool] = True

    def run(self, context: RecipeContext) -> Graph:
        """Fuse, then convert."""
        fused = context.workdir / "fused" / "model.onnx"
        fused.parent.mkdir(parents=True)
        counts = fuse_for_ort(context.base().path, fused, fusions=FUSIONS)
        if not set(counts) - {"layer_norm"}:  # that one is in the portable graph already
            raise BuildError("Nothing in this graph can be fused for CUDA: onnx-fp16 serves it as well there.")
        context.output().parent.mkdir(parents=True)
        beyond = beyond_half(fused, context.calibration.batches) if context.calibration else Beyond()
        to_fp16(fused, context.output(), keep_nodes=beyond.nodes)
        settings = {
            "fused": counts,
            "fp32_operators": list(FP32_OPS),
            "keep_io_types": True,
            "beyond_fp16": dict(beyond.tensors),
        }
        precision = Precision("fp16", "fp16", recipe=self.id, kept=beyond.nodes, settings=settings)
        return Graph(context.output(), precision, session={"disabled_optimizers": list(NOT_IN_HALF)})
