"""What recipes that quantize by NVIDIA's Model Optimizer share."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.build import modelopt
from mlflow_tdeploy.build.applied import FP32, STATIC, applied, read_back
from mlflow_tdeploy.build.explicit import finish, rounded
from mlflow_tdeploy.build.quantize import prepare
from mlflow_tdeploy.build.recipes import Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.sparing import spare_fewest
from mlflow_tdeploy.build.trials import Trials
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.core.variant import Format


class Modelopt(Recipe):
    """Quantizes the portable graph by the method that is closest, and spares as few nodes as the budget needs."""

    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "onnx"
    device: ClassVar[str] = "any"
    default: ClassVar[bool] = False
    looks: ClassVar[bool] = True
    #: As Model Optimizer calls it.
    mode: ClassVar[str]
    #: Form of a product that is quantized, see ``build.applied``.
    form: ClassVar[str] = STATIC
    #: What activations are computed in.
    activations: ClassVar[str]
    #: Hints for a session.
    session: ClassVar[Mapping[str, Any]] = {}
    #: Whether it takes batches of one size only.
    one_size: ClassVar[bool] = False

    def run(self, context: RecipeContext) -> Graph:
        """Quantize by each method, spare, write."""
        search = _Search(self, context)
        try:
            found = search.run()
        finally:
            search.maker.close()
        settings = {
            "method": found.method,
            "calibration": search.calibration,
            **context.quantize(self.id).record(),
            **search.trials.settings(found),
            **read_back(search.path, search.asked(found)),
        }
        precision = Precision(self.precision, self.activations, recipe=self.id, kept=found.kept, settings=settings)
        return Graph(search.path, precision, session=dict(self.session))

    def maker(self, context: RecipeContext, batches: Sequence[Arrays]) -> Maker:
        """Return what writes the graph that a method makes.

        Args:
            context: What the recipe works with.
            batches: What ranges are found on.
        """
        return OfGraph(context, batches, self.mode)


class Maker(ABC):
    """Writes the graphs that methods make, see :meth:`Modelopt.maker`."""

    #: The graph that they are made of, whose nodes have the same names; None where their weights are as they were.
    originals: Path | None = None

    @abstractmethod
    def write(self, method: str, path: Path) -> None:
        """Write the graph."""

    def spared(self, path: Path) -> tuple[str, ...]:
        """Return the nodes of such a graph that can be spared."""
        return rounded(path)

    def close(self) -> None:
        """Remove what is not needed any more."""
        return


class OfGraph(Maker):
    """Of the portable graph.

    Args:
        context: What the recipe works with.
        batches: What ranges are found on.
        mode: As Model Optimizer calls it.
    """

    def __init__(self, context: RecipeContext, batches: Sequence[Arrays], mode: str) -> None:
        self.originals = context.workdir / "plain" / "model.onnx"
        prepare(context.base().path, self.originals)
        self._batches, self._mode = batches, mode
        self._without = modelopt.beyond_reason(self.originals, batches)

    def write(self, method: str, path: Path) -> None:
        """Write the graph."""
        assert self.originals is not None
        modelopt.quantize(
            self.originals, path, mode=self._mode, method=method, batches=self._batches, without=self._without
        )

    def close(self) -> None:
        """Remove the graph that others are made of."""
        assert self.originals is not None
        shutil.rmtree(self.originals.parent, ignore_errors=True)


@dataclass(frozen=True)
class _Choice:
    """What a graph is made of.

    Attributes:
        method: How ranges, or weights, are found.
        kept: Nodes that stay fp32.
    """

    method: str
    kept: tuple[str, ...] = ()


class _Search:
    """One search: the graph that was tried last lies at :attr:`path`."""

    def __init__(self, recipe: Modelopt, context: RecipeContext) -> None:
        judge = context.required_judge(recipe.id)
        calibration = context.required_calibration(recipe.id)
        self._recipe, self._folder = recipe, context.workdir
        self.path = context.workdir / "graph" / "model.onnx"
        batches = list(calibration.batches)
        batches = modelopt.of_one_size(batches) if recipe.one_size else batches
        self.calibration = {**calibration.record, "batches": len(batches)}
        self._said = context.quantize(recipe.id)
        self._methods = self._said.methods(recipe.calibrators)
        self._rounded: dict[str, tuple[str, ...]] = {}
        self.maker = recipe.maker(context, batches)
        self.trials = Trials[_Choice](context, judge, self._made, self.said)

    def run(self) -> _Choice:
        """Return what the graph is made of that is left."""
        method = self.trials.closest({method: _Choice(method) for method in self._methods})
        names = self._rounded[method]
        if not names:
            raise BuildError(f"Model Optimizer has quantized nothing of this graph in {self._recipe.mode}.")

        fixed = self._said.kept(names)

        def sparing(spared: Collection[str]) -> _Choice:
            return _Choice(method, tuple(name for name in names if name in {*spared, *fixed}))

        open_to = [name for name in names if name not in fixed]
        found = spare_fewest(self.trials, open_to, sparing, self._recipe.id)
        self._made(found, external_data=None)
        for method in self._methods:  # the library removes what it has put there, in its own time
            shutil.rmtree(self._whole(method).parent, ignore_errors=True)
        return found

    def asked(self, choice: _Choice) -> dict[str, str]:
        """Return the form that each product with weights was to have; what Model Optimizer leaves alone is fp32."""
        quantized = set(self._rounded[choice.method]) - set(choice.kept)
        return {name: self._recipe.form if name in quantized else FP32 for name in applied(self.path)}

    def said(self, choice: _Choice) -> str:
        """Say what a graph is made of."""
        self._whole(choice.method)
        return f"{choice.method}, {len(choice.kept)} in fp32 of {len(self._rounded[choice.method])}"

    def _whole(self, method: str) -> Path:
        """Return the graph that a method makes, made once."""
        path = self._folder / method / "model.onnx"
        if method not in self._rounded:
            path.parent.mkdir()
            self.maker.write(method, path)
            self._rounded[method] = self.maker.spared(path)
        return path

    def _made(self, choice: _Choice, *, external_data: bool | None = False) -> Graph:
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        whole = self._whole(choice.method)
        finish(whole, self.path, kept=choice.kept, originals=self.maker.originals, external_data=external_data)
        return Graph(self.path, Precision(), session=dict(self._recipe.session))
