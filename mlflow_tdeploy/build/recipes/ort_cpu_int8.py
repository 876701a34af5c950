"""Dynamic int8: weights quantized per output channel, activations while running."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.build.applied import CHANNELS, read_back
from mlflow_tdeploy.build.graphs import CPU_FUSIONS, CPU_INT8_FUSIONS, fuse_for_ort
from mlflow_tdeploy.build.quantize import prepare, products, quantize_dynamic_int8
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.smooth import Scale, choose_scales, smooth
from mlflow_tdeploy.build.tune import Fused, choose_fusions
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format


@RECIPES.register("ort-cpu-int8")
class OrtCpuInt8(Recipe):
    """Fuses the portable graph as far as a quantizer can read it, takes large channels into weights, and quantizes.

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
        """Fuse, quantize, measure, keep what pays, smooth."""
        whole = whole_for_int8(context)
        settings = {"dynamic": True, "per_channel": True, **whole.fused.settings}
        if whole.scales:
            smoothed = whole.path.parent / "smoothed.onnx"
            smooth(whole.path, smoothed, whole.scales)
            quantize_dynamic_int8(smoothed, whole.fused.path, external_data=True)
            settings |= whole.smoothed(whole.scales)
        asked = dict.fromkeys(products(whole.path), CHANNELS)
        shutil.rmtree(whole.path.parent)
        settings |= read_back(whole.fused.path, asked)
        precision = Precision("int8", "int8", recipe=self.id, settings=settings)
        return Graph(whole.fused.path, precision, session=whole.fused.session)


@dataclass(frozen=True)
class Whole:
    """An fp32 graph with the fusions that pay in int8, its products with names of their own.

    Attributes:
        path: The graph; nothing else lies in its folder.
        fused: It quantized as it is.
        scales: What inputs of products are best divided by, see ``build.smooth``.
        calibration: What they were chosen on, for records.
    """

    path: Path
    fused: Fused
    scales: Mapping[str, Scale] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def smoothed(self, scales: Mapping[str, Scale]) -> dict[str, Any]:
        """Return what a record says of products that are smoothed: how many times smaller the error of each is."""
        gains = {name: round(scale.gain, 2) for name, scale in scales.items()}
        return {"smoothed": gains, "calibration": dict(self.calibration)} if gains else {}


def whole_for_int8(context: RecipeContext) -> Whole:
    """Return the graph to quantize on this kind of host."""
    fused = fused_for_int8(context)
    whole, plain = (context.workdir / name / "model.onnx" for name in ("whole", "plain"))
    fuse_for_ort(context.base().path, whole, fusions=fused.fusions)
    prepare(whole, plain)
    shutil.rmtree(whole.parent)
    found = Whole(plain, fused)
    if (calibration := context.calibration) is None:
        return found
    return replace(found, scales=choose_scales(plain, calibration.batches), calibration=calibration.record)


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
