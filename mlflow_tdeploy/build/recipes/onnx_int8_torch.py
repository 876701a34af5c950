"""Static int8 by fake quantization in torch: by layers, attention and residuals too, trained where asked."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from mlflow_tdeploy.build.applied import FP32, compared
from mlflow_tdeploy.build.explicit import finish
from mlflow_tdeploy.build.fake_quant.options import FakeQuant
from mlflow_tdeploy.build.qdq import APART
from mlflow_tdeploy.build.quantize_options import Quantize
from mlflow_tdeploy.build.ranges import CALIBRATORS
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.sparing import spare_fewest
from mlflow_tdeploy.build.trials import Trials
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register(FakeQuant.recipe)
class OnnxInt8Torch(Recipe):
    """Has layers of the torch module round, finds their ranges, trains it so if asked, and writes explicit Q/DQ.

    Where the graph is over the budget, as few layers as it takes stay in fp32.
    """

    id: ClassVar[str] = FakeQuant.recipe
    precision: ClassVar[str] = "int8"
    parent: ClassVar[str | None] = None
    format: ClassVar[Format] = "onnx"
    device: ClassVar[str] = "any"
    default: ClassVar[bool] = False
    calibrators: ClassVar[tuple[str, ...]] = tuple(CALIBRATORS)
    looks: ClassVar[bool] = True

    def run(self, context: RecipeContext) -> Graph:
        """Fake-quantize, calibrate, train, export, spare."""
        search = _Search(context, context.quantize(self.id))
        found = search.run()
        settings = {**search.settings, **search.trials.settings(found)}
        kept = (*search.rounding.blind, *found.kept)
        settings |= compared(search.asked(kept), search.forms())
        precision = Precision("int8", "int8", recipe=self.id, kept=kept, settings=settings)
        return Graph(search.path, precision, session=APART)


_MOVED = (
    "With every layer in fp32 the trained model is over the budget: training itself has moved its answers that far. "
    "Train for fewer steps, or at a lower rate"
)


@dataclass(frozen=True)
class _Choice:
    """What a graph is made of.

    Attributes:
        method: Calibrator of inputs whose rules name none.
        kept: Layers that stay fp32.
        trained: Whether the model was trained with its ranges.
    """

    method: str
    kept: tuple[str, ...] = ()
    trained: bool = False


class _Search:
    """One search: the graph that was tried last lies at :attr:`path`."""

    def __init__(self, context: RecipeContext, said: Quantize) -> None:
        from mlflow_tdeploy.build.fake_quant.model import Rounding

        judge = context.required_judge(FakeQuant.recipe)
        module = context.required_module(FakeQuant.recipe)
        options = context.options if isinstance(context.options, FakeQuant) else FakeQuant()
        self._context, self._options, self._said = context, options, said
        self._calibration = context.required_calibration(FakeQuant.recipe)
        self.path = context.workdir / "graph" / "model.onnx"
        self._whole = context.workdir / "whole" / "model.onnx"
        self._written: tuple[str, bool] | None = None
        self._example = context.task.example_feeds("opt", ragged=True, items=context.data.real)
        self.rounding = Rounding(module, options, context.task.signature, self._calibration.batches)
        self._names = tuple(layer.name for layer in self.rounding.layers)
        self._methods, self._fixed = said.methods(OnnxInt8Torch.calibrators), said.kept(self._names)
        self.trials = Trials[_Choice](context, judge, self._made, self.said)

    def run(self) -> _Choice:
        """Return what the graph is made of that is left."""
        named = all(layer.rule.input is None or layer.rule.input.calibrator for layer in self.rounding.layers)
        methods = ("max",) if named else self._methods
        method = self.trials.closest({method: self._sparing(method, (), trained=False) for method in methods})
        trained = self._options.train is not None
        if trained:
            self.rounding.calibrate(method)
            self.rounding.train()
        open_to = [name for name in self._names if name not in {*self._fixed, *self.rounding.blind}]
        sparing = functools.partial(self._sparing, method, trained=trained)
        more = {"hopeless": _MOVED} if trained else {}
        found = spare_fewest(self.trials, open_to, sparing, FakeQuant.recipe, **more)
        self._made(found, external_data=None)
        shutil.rmtree(self._whole.parent)
        return found

    def _sparing(self, method: str, names: Collection[str], *, trained: bool) -> _Choice:
        kept = {*names, *self._fixed} - {*self.rounding.blind}
        return _Choice(method, tuple(name for name in self._names if name in kept), trained)

    @property
    def settings(self) -> dict[str, Any]:
        """What the record says of how it was made."""
        return {
            "dynamic": False,
            "calibration": self._calibration.record,
            **self._options.record(),
            **self._said.record(),
        }

    def asked(self, kept: Collection[str]) -> dict[str, str]:
        """Return the form that each layer was to have."""
        return self.rounding.asked() | dict.fromkeys(kept, FP32)

    def forms(self) -> dict[str, str]:
        """Return the form that each layer has."""
        return self.rounding.forms(self.path)

    def said(self, choice: _Choice) -> str:
        """Say what a graph is made of."""
        trained = ", trained" if choice.trained else ""
        return f"{choice.method}{trained}, {len(choice.kept)} in fp32 of {len(self.rounding.layers)}"

    def _made(self, choice: _Choice, *, external_data: bool | None = False) -> Graph:
        if self._written != (choice.method, choice.trained):
            self._export(choice)
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        finish(self._whole, self.path, kept=choice.kept, external_data=external_data)
        return Graph(self.path, Precision(), session=APART)

    def _export(self, choice: _Choice) -> None:
        if not choice.trained:  # training goes on from ranges, and may have learned with them
            self.rounding.calibrate(choice.method)
        shutil.rmtree(self._whole.parent, ignore_errors=True)
        self._whole.parent.mkdir()
        self.rounding.export(self._example, self._whole, self._context.opset)
        self._written = choice.method, choice.trained
