"""Eight-bit floats by NVIDIA's Model Optimizer, for GPUs that have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mlflow_tdeploy.build.applied import STATIC_FP8
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.recipes._modelopt import Modelopt


@RECIPES.register("onnx-fp8-modelopt")
class OnnxFp8Modelopt(Modelopt):
    """Eight-bit floats by NVIDIA's Model Optimizer, for GPUs that have them.

    A CPU rounds as they do and computes in fp32: its answers can be checked there, and nothing is faster.
    """

    id: ClassVar[str] = "onnx-fp8-modelopt"
    precision: ClassVar[str] = "fp8"
    mode: ClassVar[str] = "fp8"
    calibrators: ClassVar[tuple[str, ...]] = ("max", "entropy")
    form: ClassVar[str] = STATIC_FP8
    activations: ClassVar[str] = "fp8"
    device: ClassVar[str] = "cuda"
    #: It would make integer products of them, which there are none of.
    session: ClassVar[Mapping[str, Any]] = {"disabled_optimizers": ["QDQSelectorActionTransformer"]}
