"""What recipes that quantize by NVIDIA's Model Optimizer share."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.build import modelopt
from mlflow_tdeploy.build.explicit import finish, rounded
from mlflow_tdeploy.build.quantize import prepare
from mlflow_tdeploy.build.recipes import Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.sparing import spare_fewest
from mlflow_tdeploy.build.trials import Trials
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


class Modelopt(Recipe):
    """Quantizes the portable graph by the method that is closest, and spares as few nodes as the budget needs."""

    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "onnx"
    device: ClassVar[str] = "any"
    default: ClassVar[bool] = False
    #: As Model Optimizer calls it.
    mode: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    #: What activations are computed in.
    activations: ClassVar[str]
    #: Hints for a session.
    session: ClassVar[Mapping[str, Any]] = {}
    #: Whether it takes batches of one size only.
    one_size: ClassVar[bool] = False

    def run(self, context: RecipeContext) -> Graph:
        """Quantize by each method, spare, write."""
        search = _Search(self, context)
        found = search.run()
        settings = {
            "method": found.method,
            "calibration": search.calibration,
            "searched": search.said(found),
            "trials": [one.record() for one in search.trials.all],
        }
        precision = Precision(self.precision, self.activations, recipe=self.id, kept=found.kept, settings=settings)
        return Graph(search.path, precision, session=dict(self.session))


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
        self.path, self._plain = context.workdir / "graph" / "model.onnx", context.workdir / "plain" / "model.onnx"
        batches = list(calibration.batches)
        self._batches = modelopt.of_one_size(batches) if recipe.one_size else batches
        self.calibration = {**calibration.record, "batches": len(self._batches)}
        prepare(context.base().path, self._plain)
        self._rounded: dict[str, tuple[str, ...]] = {}
        self._without = modelopt.beyond_reason(self._plain, batches)
        self.trials = Trials[_Choice](context, judge, self._made, self.said)

    def run(self) -> _Choice:
        """Return what the graph is made of that is left."""
        distances = {method: self.trials.distance(_Choice(method)) for method in self._recipe.methods}
        method = min(distances, key=distances.__getitem__)
        names = self._rounded[method]
        if not names:
            raise BuildError(f"Model Optimizer has quantized nothing of this graph in {self._recipe.mode}.")

        def sparing(spared: Collection[str]) -> _Choice:
            return _Choice(method, tuple(name for name in names if name in spared))

        found = spare_fewest(self.trials, names, sparing, self._recipe.id)
        self._made(found, external_data=None)
        for folder in (self._plain.parent, *(self._whole(one).parent for one in self._recipe.methods)):
            shutil.rmtree(folder, ignore_errors=True)  # the library removes what it has put there, in its own time
        return found

    def said(self, choice: _Choice) -> str:
        """Say what a graph is made of."""
        self._whole(choice.method)
        return f"{choice.method}, {len(choice.kept)} in fp32 of {len(self._rounded[choice.method])}"

    def _whole(self, method: str) -> Path:
        """Return the graph that a method makes, made once."""
        path = self._folder / method / "model.onnx"
        if method not in self._rounded:
            path.parent.mkdir()
            modelopt.quantize(
                self._plain, path, mode=self._recipe.mode, method=method, batches=self._batches, without=self._without
            )
            self._rounded[method] = rounded(path)
        return path

    def _made(self, choice: _Choice, *, external_data: bool | None = False) -> Graph:
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        finish(
            self._whole(choice.method), self.path, kept=choice.kept, originals=self._plain, external_data=external_data
        )
        return Graph(self.path, Precision(), session=dict(self._recipe.session))
