"""Weights in four bits by NVIDIA's Model Optimizer: blocks whose ends are chosen by what activations meet (AWQ)."""

from __future__ import annotations

from typing import ClassVar

from mlflow_tdeploy.build.applied import blocks
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.recipes._modelopt import Modelopt


@RECIPES.register("onnx-int4-modelopt")
class OnnxInt4Modelopt(Modelopt):
    """Weights in four bits by NVIDIA's Model Optimizer: blocks whose ends are chosen by what activations meet (AWQ)."""

    id: ClassVar[str] = "onnx-int4-modelopt"
    precision: ClassVar[str] = "int4"
    mode: ClassVar[str] = "int4"
    calibrators: ClassVar[tuple[str, ...]] = ("rtn_dq", "awq_clip")
    form: ClassVar[str] = blocks(4, 128)
    activations: ClassVar[str] = "fp32"
    one_size: ClassVar[bool] = True
