"""MLflow flavor for transformers in production: one bundle of verified variants, the host picks the best.

Importing this module loads neither torch nor ONNX Runtime; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_tdeploy.build.calibration import CalibrationData
    from mlflow_tdeploy.build.engine_options import EngineOptions, EnginePlan
    from mlflow_tdeploy.build.fake_quant.options import FakeQuant, Layers, Quantizer
    from mlflow_tdeploy.build.quantize_options import Quantize
    from mlflow_tdeploy.flavor.analyze import analyze_model
    from mlflow_tdeploy.flavor.download import download_variant
    from mlflow_tdeploy.flavor.extend import extend_model
    from mlflow_tdeploy.flavor.load import load_model
    from mlflow_tdeploy.flavor.log import log_model
    from mlflow_tdeploy.flavor.pyfunc import _load_pyfunc
    from mlflow_tdeploy.flavor.report_model import report_model
    from mlflow_tdeploy.flavor.requirements import get_default_conda_env, get_default_pip_requirements
    from mlflow_tdeploy.flavor.save import save_model
    from mlflow_tdeploy.flavor.verify import verify_model
    from mlflow_tdeploy.promotion.api import apply, history, plan, promote, rollback, status

#: Name of the flavor in an ``MLmodel`` file.
FLAVOR_NAME = "tdeploy"

_HOMES = {
    "EngineOptions": "build.engine_options",
    "EnginePlan": "build.engine_options",
    "CalibrationData": "build.calibration",
    "Quantize": "build.quantize_options",
    **dict.fromkeys(("FakeQuant", "Layers", "Quantizer"), "build.fake_quant.options"),
    "save_model": "flavor.save",
    "log_model": "flavor.log",
    "load_model": "flavor.load",
    "_load_pyfunc": "flavor.pyfunc",
    "analyze_model": "flavor.analyze",
    "download_variant": "flavor.download",
    "extend_model": "flavor.extend",
    "report_model": "flavor.report_model",
    "verify_model": "flavor.verify",
    "get_default_pip_requirements": "flavor.requirements",
    "get_default_conda_env": "flavor.requirements",
    **dict.fromkeys(("plan", "apply", "promote", "rollback", "status", "history"), "promotion.api"),
}

__all__ = [
    "FLAVOR_NAME",
    "CalibrationData",
    "EngineOptions",
    "EnginePlan",
    "FakeQuant",
    "Layers",
    "Quantize",
    "Quantizer",
    "_load_pyfunc",
    "analyze_model",
    "apply",
    "download_variant",
    "extend_model",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "history",
    "load_model",
    "log_model",
    "plan",
    "promote",
    "report_model",
    "rollback",
    "save_model",
    "status",
    "verify_model",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
