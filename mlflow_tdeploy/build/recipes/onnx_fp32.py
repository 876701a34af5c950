"""The portable graph: standard operators, full precision, the parent of every other one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from mlflow_tdeploy.build.export import Exporter, export_module
from mlflow_tdeploy.build.graphs import simplify
from mlflow_tdeploy.build.inspect_graph import differing_dtypes
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format

if TYPE_CHECKING:
    import torch


@RECIPES.register("onnx-fp32")
class OnnxFp32(Recipe):
    """Exports the source's module, or takes the source's portable graph, and simplifies it."""

    id: ClassVar[str] = "onnx-fp32"
    precision: ClassVar[str] = "fp32"
    parent: ClassVar[str | None] = None
    format: ClassVar[Format] = "onnx"
    device: ClassVar[str] = "any"

    def run(self, context: RecipeContext) -> Graph:
        """Export or copy, then simplify."""
        source = context.source
        if source is not None and source.module is not None:
            return _exported(source.module, context)
        if source is not None and self.id in source.graphs:
            path = source.graphs[self.id]
            simplified = _simplify(path, context.output())
            return Graph(
                context.output(),
                Precision(recipe=self.id, settings={"simplified": simplified}),
                dtypes=differing_dtypes(path, context.task.signature),
            )
        raise BuildError(
            "The portable graph 'onnx-fp32' is exported from a torch module or copied from an ONNX graph, and the "
            "source is neither here. Build it where the model is logged."
        )


def _exported(module: torch.nn.Module, context: RecipeContext) -> Graph:
    path = context.workdir / "exported" / "model.onnx"
    path.parent.mkdir()
    result = export_module(
        module,
        context.task.example_feeds("opt", ragged=True, items=context.data.texts or None),
        context.task.signature,
        path,
        opset=context.opset,
        exporter=cast(Exporter, context.exporter),
    )
    simplified = _simplify(path, context.output())
    shutil.rmtree(path.parent)
    settings = {"exporter": result.exporter, "opset": result.opset, "simplified": simplified}
    return Graph(context.output(), Precision(recipe=OnnxFp32.id, settings=settings), notes=result.notes)


def _simplify(path: Path, output: Path) -> bool:
    output.parent.mkdir()
    return simplify(path, output)
