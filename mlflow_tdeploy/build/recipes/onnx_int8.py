"""Static int8 in standard operators: ranges from calibration data, within the budget."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from mlflow_tdeploy.build.applied import FP32, STATIC, read_back
from mlflow_tdeploy.build.calibration import Calibration
from mlflow_tdeploy.build.judge import Judge
from mlflow_tdeploy.build.qdq import APART, quantizable, quantize_static
from mlflow_tdeploy.build.quantize import prepare
from mlflow_tdeploy.build.range_cache import known_histograms
from mlflow_tdeploy.build.ranges import CALIBRATORS, ranges, ranges_known
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.smooth import Scale, choose_scales, smooth
from mlflow_tdeploy.build.sparing import spare_fewest
from mlflow_tdeploy.build.trials import Trials
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register("onnx-int8")
class OnnxInt8(Recipe):
    """Quantizes what has weights: explicit Q/DQ, which ONNX Runtime runs and TensorRT builds engines from.

    Large channels of activations go over into the weights where that pays. Of the calibrators the one is taken whose
    graph is closest to the source; where it is over the budget, as few products as it takes stay in fp32.
    """

    id: ClassVar[str] = "onnx-int8"
    precision: ClassVar[str] = "int8"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "onnx"
    device: ClassVar[str] = "any"
    default: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    calibrators: ClassVar[tuple[str, ...]] = tuple(CALIBRATORS)
    looks: ClassVar[bool] = True

    def run(self, context: RecipeContext) -> Graph:
        """Calibrate, choose, spare, write."""
        judge = context.required_judge(self.id)
        calibration = context.required_calibration(self.id)
        search = _Search(context, calibration, judge)
        found = search.run()
        settings = {
            "dynamic": False,
            "per_channel": True,
            "calibrator": found.method,
            "calibration": calibration.record,
            "smoothed": {name: round(scale.gain, 2) for name, scale in search.scales_of(found).items()},
            **context.quantize(self.id).record(),
            **search.trials.settings(found),
            **read_back(search.path, search.asked(found)),
        }
        precision = Precision("int8", "int8", recipe=self.id, kept=found.kept, settings=settings)
        return Graph(search.path, precision, session=APART)


@dataclass(frozen=True)
class _Choice:
    """What a graph is made of.

    Attributes:
        method: Its calibrator.
        kept: Products that are not quantized.
    """

    method: str
    kept: tuple[str, ...] = ()


class _Search:
    """One search: the graph that was tried last lies at :attr:`path`."""

    def __init__(self, context: RecipeContext, calibration: Calibration, judge: Judge) -> None:
        workdir = context.workdir
        self.path = workdir / "graph" / "model.onnx"
        self._plain, self._smoothed = (workdir / name / "model.onnx" for name in ("plain", "smoothed"))
        prepare(context.base().path, self._plain)
        self._nodes = tuple(quantizable(self._plain))
        if not self._nodes:
            raise BuildError("There is nothing to quantize: no matrix product or convolution has weights.")
        said = context.quantize(OnnxInt8.id)
        self._methods, self._fixed = said.methods(OnnxInt8.calibrators), said.kept(self._nodes)
        self._scales = choose_scales(self._plain, calibration.batches)
        self._smooth(self._scales)
        inputs = quantizable(self._smoothed)
        self._seen = known_histograms(self._smoothed, list(dict.fromkeys(inputs.values())), calibration.batches)
        #: Products whose input was nothing but 0, or was not there: no range is known.
        self.blind = tuple(name for name, source in inputs.items() if not ranges_known(self._seen, source))
        self.trials = Trials[_Choice](context, judge, self._made, self.said)

    def run(self) -> _Choice:
        """Return what the graph is made of that is left.

        Raises:
            BuildError: No input has a range.
            NothingWithinBudgetError: Nothing is left to quantize within the budget.
        """
        if len(self.blind) == len(self._nodes):
            raise BuildError("Nothing to quantize by: all inputs of products are 0 throughout the calibration data.")
        method = self.trials.closest({method: self._sparing(method, ()) for method in self._methods})
        open_to = [name for name in self._nodes if name not in {*self.blind, *self._fixed}]

        found = spare_fewest(self.trials, open_to, functools.partial(self._sparing, method), OnnxInt8.id)
        self._made(found, external_data=None)
        for folder in (self._plain.parent, self._smoothed.parent):
            shutil.rmtree(folder)
        return found

    def _sparing(self, method: str, names: Collection[str]) -> _Choice:
        kept = {*names, *self.blind, *self._fixed}
        return _Choice(method, tuple(name for name in self._nodes if name in kept))

    def asked(self, choice: _Choice) -> dict[str, str]:
        """Return the form that each product was to have."""
        return {name: FP32 if name in choice.kept else STATIC for name in self._nodes}

    def said(self, choice: _Choice) -> str:
        """Say what a graph is made of."""
        return f"{choice.method}, {len(choice.kept)} in fp32 of {len(self._nodes)}"

    def scales_of(self, choice: _Choice) -> dict[str, Scale]:
        """Return by what inputs of products are divided; of those that stay fp32 by nothing."""
        return {name: scale for name, scale in self._scales.items() if name not in choice.kept}

    def _smooth(self, scales: Mapping[str, Scale]) -> None:
        smooth(self._plain, self._smoothed, scales)

    def _made(self, choice: _Choice, *, external_data: bool | None = False) -> Graph:
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        self._smooth(self.scales_of(choice))
        nodes = [name for name in self._nodes if name not in choice.kept]
        limits = ranges(self._seen, choice.method)
        quantize_static(self._smoothed, self.path, limits, nodes=nodes, external_data=external_data)
        return Graph(self.path, Precision(), session=APART)
