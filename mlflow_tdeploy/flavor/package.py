"""An MLflow model directory around a bundle: ``MLmodel``, signature, environment, code, examples."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mlflow import pyfunc
from mlflow.models import Model as MlflowModel
from mlflow.models import ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import (
    _copy_extra_files,
    _validate_and_copy_code_paths,
)

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, first_line
from mlflow_tdeploy.flavor.config import full_config, read_config, split_config
from mlflow_tdeploy.flavor.requirements import CONDA_FILE, PYTHON_FILE, check_environment, write_environment
from mlflow_tdeploy.flavor.schema import merge_signature
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import ROOT


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    try:
        if not isinstance(metadata, Mapping):
            raise TypeError(f"it is a {type(metadata).__name__}")
        yaml.safe_dump(dict(metadata))
    except (yaml.YAMLError, TypeError) as error:
        raise InvalidInputError(
            f"metadata must be a mapping of plain values that YAML can hold: {first_line(error)}."
        ) from error


@dataclass(frozen=True)
class Packaging:
    """What MLflow's own parameters of ``save_model`` say; see there."""

    signature: ModelSignature | None = None
    input_example: Any = None
    conda_env: Any = None
    pip_requirements: Any = None
    extra_pip_requirements: Any = None
    code_paths: list[str] | None = None
    metadata: dict[str, Any] | None = None
    extra_files: list[str] | None = None
    model_config: Mapping[str, Any] | str | None = None

    def check(self) -> None:
        """Refuse what cannot work before minutes are spent on building.

        Raises:
            InvalidInputError: A configuration key or value that cannot be used.
            MlflowException: Requirement parameters that exclude each other.
        """
        check_environment(self.conda_env, self.pip_requirements, self.extra_pip_requirements)
        self.config()
        _check_metadata(self.metadata)
        if self.signature is not None and not isinstance(self.signature, ModelSignature):
            raise InvalidInputError(f"signature must be a ModelSignature, got {type(self.signature).__name__}.")
        for name in ("code_paths", "extra_files"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, (list, tuple)):
                raise InvalidInputError(f"{name} must be a list of paths, got {type(given).__name__}.")
            for path in given or ():
                if "://" not in str(path) and not Path(path).exists():
                    raise NotFoundError(f"{name}: there is no '{path}'.")

    def config(self) -> dict[str, Any]:
        """Return the complete ``model_config`` to save."""
        return full_config(read_config(self.model_config))

    def policy(self) -> Policy:
        """Return what ``model_config`` insists on.

        Raises:
            InvalidInputError: A runtime that does not exist.
        """
        policy, _ = split_config(self.config())
        if policy.runtime is not None:
            RUNTIMES.get(policy.runtime)
        return policy

    def write(self, path: Path, bundle: Bundle, model: MlflowModel) -> None:
        """Complete the directory ``path``, which holds ``bundle``, as a model."""
        code = _validate_and_copy_code_paths(self.code_paths, str(path))
        model.signature = merge_signature(bundle.task(), self.signature)
        if self.input_example is not None:
            _save_example(model, self.input_example, str(path))
        if self.metadata is not None:
            model.metadata = self.metadata
        pyfunc.add_to_model(
            model,
            loader_module=mlflow_tdeploy.__name__,
            data=ROOT,
            conda_env=CONDA_FILE,
            python_env=PYTHON_FILE,
            code=code,
            model_config=self.config(),
        )
        model.add_flavor(
            mlflow_tdeploy.FLAVOR_NAME,
            tdeploy_version=importlib.metadata.version("mlflow-tdeploy"),
            data=ROOT,
            task=bundle.manifest.task,
            schema_version=bundle.manifest.schema_version,
            code=code,
            **_copy_extra_files(self.extra_files, str(path)),
        )
        write_environment(path, bundle, self.conda_env, self.pip_requirements, self.extra_pip_requirements)
        if size := get_total_file_size(str(path)):
            model.model_size_bytes = size
        model.save(str(path / MLMODEL_FILE_NAME))
