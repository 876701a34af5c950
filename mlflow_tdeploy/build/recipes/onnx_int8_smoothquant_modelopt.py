"""Static int8 of the torch module by NVIDIA's Model Optimizer: SmoothQuant, explicit Q/DQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.build.qdq import APART
from mlflow_tdeploy.build.recipes import RECIPES, RecipeContext
from mlflow_tdeploy.build.recipes._modelopt import Maker, Modelopt
from mlflow_tdeploy.core.tensors import Arrays


@RECIPES.register("onnx-int8-smoothquant-modelopt")
class OnnxInt8SmoothquantModelopt(Modelopt):
    """Static int8 of the torch module by NVIDIA's Model Optimizer: SmoothQuant where that is closer, explicit Q/DQ."""

    id: ClassVar[str] = "onnx-int8-smoothquant-modelopt"
    precision: ClassVar[str] = "int8"
    parent: ClassVar[str | None] = None
    mode: ClassVar[str] = "int8"
    calibrators: ClassVar[tuple[str, ...]] = ("smoothquant", "max")
    activations: ClassVar[str] = "int8"
    session: ClassVar[Mapping[str, Any]] = APART

    def maker(self, context: RecipeContext, batches: Sequence[Arrays]) -> Maker:
        """Return what writes the graph of the module, rounded by a method."""
        return _OfModule(context, batches, self.id)


class _OfModule(Maker):
    def __init__(self, context: RecipeContext, batches: Sequence[Arrays], recipe: str) -> None:
        self._module = context.required_module(recipe)
        self._context, self._batches = context, batches
        self._example = context.task.example_feeds("opt", ragged=True, items=context.data.real)

    def write(self, method: str, path: Path) -> None:
        """Write the graph."""
        from mlflow_tdeploy.build import modelopt_torch  # imports torch

        signature = self._context.task.signature
        module = modelopt_torch.quantized(self._module, method, signature, self._batches)
        modelopt_torch.export(module, self._example, signature, path, self._context.opset)

    def spared(self, path: Path) -> tuple[str, ...]:
        """Return the products that can be spared."""
        from mlflow_tdeploy.build import modelopt_torch

        return modelopt_torch.products(path)
