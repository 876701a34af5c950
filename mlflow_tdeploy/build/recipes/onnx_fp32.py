"""The portable graph: standard operators, full precision, the parent of every other one."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

from mlflow_tdeploy.build.export import Exporter, ExportResult, export_module, not_exported
from mlflow_tdeploy.build.graphs import simplify
from mlflow_tdeploy.build.inspect_graph import differing_dtypes, precision_of
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.core.errors import BuildError, ExportError
from mlflow_tdeploy.core.variant import Format
from mlflow_tdeploy.source.base import Source

_log = logging.getLogger("mlflow_tdeploy")


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
            return _exported(source, context)
        if source is not None and self.id in source.graphs:
            path = source.graphs[self.id]
            simplified = _simplify(path, context.output())
            return Graph(
                context.output(),
                replace(precision_of(path), recipe=self.id, settings={"simplified": simplified}),
                dtypes=differing_dtypes(path, context.task.signature),
            )
        raise BuildError(
            "The portable graph 'onnx-fp32' is exported from a torch module or copied from an ONNX graph, and the "
            "source is neither here. Build it where the model is logged."
        )


def _exported(source: Source, context: RecipeContext) -> Graph:
    path = context.workdir / "exported" / "model.onnx"
    path.parent.mkdir()
    result = _export(source, context, path)
    simplified = _simplify(path, context.output())
    shutil.rmtree(path.parent)
    if result.decided:
        _log.warning(
            "The forward of %s decides by values of its inputs, and a graph has only the way that the example takes, "
            "and no check: %s. Write it with torch.where, or make sure with verify_with=… that values of every way are "
            "asked.",
            source.record.name, "; ".join(result.decided),
        )  # fmt: skip
    settings = {"exporter": result.exporter, "opset": result.opset, "simplified": simplified}
    precision = replace(precision_of(context.output()), recipe=OnnxFp32.id, settings=settings)
    return Graph(context.output(), precision, notes=result.notes)


def _export(source: Source, context: RecipeContext, path: Path) -> ExportResult:
    """Export with ``torch.export`` and, where that fails, TorchScript, which reads plain attention best."""
    example = context.task.example_feeds("opt", ragged=True, items=context.data.real)

    def attempt(exporter: Exporter) -> ExportResult:
        if exporter == "dynamo" and source.unnoticed_writes:
            names = ", ".join(one.removeprefix("inner.") for one in source.unnoticed_writes)
            why = f"the forward writes to {names} through .data, and torch.export would end the process"
            raise ExportError(f"{source.record.name} cannot be exported: {why}.", (f"dynamo: {why}",))
        module = source.module if exporter == "dynamo" else source.module_for("eager")
        assert module is not None
        return export_module(module, example, context.task.signature, path, opset=context.opset, exporter=exporter)

    if context.exporter != "auto":
        return attempt(cast(Exporter, context.exporter))
    try:
        return attempt("dynamo")
    except ExportError as first:
        try:
            result = attempt("torchscript")
        except ExportError as second:
            if not (first.said and second.said):
                raise
            assert source.module is not None
            raise not_exported(source.module, context.opset, (*first.said, *second.said)) from second
        said = first.said or (f"dynamo: {first}",)
        return replace(result, notes=(*result.notes, *(f"not exported by {one}" for one in said)))


def _simplify(path: Path, output: Path) -> bool:
    output.parent.mkdir()
    return simplify(path, output)
