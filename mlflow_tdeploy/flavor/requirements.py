"""What a serving environment installs: no torch, no transformers, unless nothing else can serve."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlflow.utils.environment import (
    _mlflow_conda_env,
    _parse_pip_requirements,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from mlflow.utils.requirements_utils import _get_pinned_requirement

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError
from mlflow_tdeploy.core.hardware import installed_version
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.store.bundle import Bundle

#: A distribution, with extras.
_PLAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:\[[A-Za-z0-9._,-]+\])?")
_log = logging.getLogger("mlflow_tdeploy")

CONDA_FILE = "conda.yaml"
PYTHON_FILE = "python_env.yaml"
REQUIREMENTS_FILE = "requirements.txt"
CONSTRAINTS_FILE = "constraints.txt"
#: Path of a wheel of this package to put into the model, for hosts whose index does not have it.
WHEEL_VARIABLE = "TDEPLOY_WHEEL"
_WHEELS = "wheels"
#: The extra of this package that installs ONNX Runtime as that distribution.
_EXTRAS = {"onnxruntime": "[cpu]", "onnxruntime-gpu": "[gpu]"}


def get_default_pip_requirements(variants: Iterable[Variant] | None = None, packages: Iterable[str] = ()) -> list[str]:
    """Return the requirements of a model that is logged without any of its own.

    Args:
        variants: The model's variants; torch and transformers are added when only ``hf`` can serve.
        packages: What its task needs besides, such as Pillow.

    Returns:
        Pinned requirement lines: MLflow, this package, ONNX Runtime, numpy, tokenizers, and these.
    """
    providers = RUNTIMES.get("ort-cpu").distributions
    runtime = next((name for name in providers if installed_version(name)), providers[0])
    names = ["mlflow", f"mlflow-tdeploy{_EXTRAS.get(runtime, '')}", runtime, "numpy", "tokenizers", *packages]
    kept = [variant for variant in variants or () if not variant.dropped]
    if variants is not None and all(variant.format == "hf" for variant in kept):
        own = [name for variant in kept for name in variant.requires]
        names = [*(name for name in names if name != runtime), "torch", "transformers", "safetensors", *own]
    if odd := [name for name in names if not _PLAIN.fullmatch(name)]:  # of a bundle that somebody else wrote
        raise InvalidInputError(f"A model can need packages by their names; {odd[0]!r} is none.")
    return [_get_pinned_requirement(name) if installed_version(name.split("[")[0]) else name for name in names]


def get_default_conda_env() -> dict[str, Any]:
    """Return the default Conda environment of models of this flavor."""
    environment: dict[str, Any] = _mlflow_conda_env(additional_pip_deps=get_default_pip_requirements())
    return environment


def check_environment(conda_env: Any, pip_requirements: Any, extra_pip_requirements: Any) -> None:
    """Refuse requirement parameters that exclude each other, before anything is built."""
    _validate_env_arguments(conda_env, pip_requirements, extra_pip_requirements)
    for given in (pip_requirements, extra_pip_requirements):
        if given is not None:
            try:
                _parse_pip_requirements(given)
            except FileNotFoundError as error:
                raise NotFoundError(f"The requirements name a file that is not there: '{error.filename}'.") from error
    if conda_env is not None and not isinstance(conda_env, dict) and not Path(conda_env).is_file():
        raise NotFoundError(f"conda_env: there is no file '{conda_env}'.")
    _wheel()


def write_environment(
    path: Path, bundle: Bundle, conda_env: Any, pip_requirements: Any, extra_pip_requirements: Any
) -> None:
    """Write the environment files of a model directory, as MLflow's own flavors do."""
    import yaml

    if conda_env is None:
        own = get_default_pip_requirements(bundle.variants.values(), bundle.task().packages)
        defaults = None if pip_requirements is not None else _bundle_wheel(path, own)
        conda_env, lines, constraints = _process_pip_requirements(defaults, pip_requirements, extra_pip_requirements)
    else:
        conda_env, lines, constraints = _process_conda_env(conda_env)
    if not any("mlflow-tdeploy" in line or "mlflow_tdeploy" in line for line in lines):
        _log.warning(
            "The model's requirements leave out mlflow-tdeploy: an environment made of them cannot open the model."
        )
    (path / CONDA_FILE).write_text(yaml.safe_dump(conda_env, default_flow_style=False), encoding="utf-8")
    if constraints:
        (path / CONSTRAINTS_FILE).write_text("\n".join(constraints), encoding="utf-8")
    (path / REQUIREMENTS_FILE).write_text("\n".join(lines), encoding="utf-8")
    _PythonEnv.current().to_yaml(str(path / PYTHON_FILE))


def _bundle_wheel(path: Path, requirements: list[str]) -> list[str]:
    """Copy the wheel that the user named into the model and install this package from there."""
    wheel = _wheel()
    if wheel is None:
        return requirements
    (path / _WHEELS).mkdir(exist_ok=True)
    shutil.copyfile(wheel, path / _WHEELS / wheel.name)
    return [f"{_WHEELS}/{wheel.name}" if line.startswith("mlflow-tdeploy") else line for line in requirements]


def _wheel() -> Path | None:
    value = os.environ.get(WHEEL_VARIABLE, "")
    if not value:
        return None
    wheel = Path(value)
    if not wheel.is_file() or not (wheel.name.startswith("mlflow_tdeploy-") and wheel.suffix == ".whl"):
        raise InvalidInputError(
            f"{WHEEL_VARIABLE} must name a wheel of mlflow-tdeploy, got '{value}'. Make one with: pip wheel --no-deps ."
        )
    return wheel
