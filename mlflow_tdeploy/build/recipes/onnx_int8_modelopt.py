"""Static int8 by NVIDIA's Model Optimizer: explicit Q/DQ, attention and residuals too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mlflow_tdeploy.build.qdq import APART
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.recipes._modelopt import Modelopt


@RECIPES.register("onnx-int8-modelopt")
class OnnxInt8Modelopt(Modelopt):
    """Static int8 by NVIDIA's Model Optimizer: explicit Q/DQ, attention and residuals too."""

    id: ClassVar[str] = "onnx-int8-modelopt"
    precision: ClassVar[str] = "int8"
    mode: ClassVar[str] = "int8"
    calibrators: ClassVar[tuple[str, ...]] = ("max", "entropy")
    activations: ClassVar[str] = "int8"
    session: ClassVar[Mapping[str, Any]] = APART
