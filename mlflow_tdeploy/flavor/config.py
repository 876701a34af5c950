"""What was saved with a model as ``model_config``: the same for whoever opens, explains, measures or downloads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow.models import Model as MlflowModel
from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_tdeploy import FLAVOR_NAME
from mlflow_tdeploy.core.errors import NotFoundError
from mlflow_tdeploy.runtime.select import Policy
from mlflow_tdeploy.store.bundle import Bundle


def read_mlmodel(bundle: Bundle) -> MlflowModel | None:
    """Return the ``MLmodel`` file around a bundle, or None for a bundle that was written without MLflow.

    Raises:
        NotFoundError: The model was logged with another flavor.
    """
    folder = bundle.root.parent
    if not (folder / MLMODEL_FILE_NAME).is_file():
        return None
    meta = MlflowModel.load(str(folder / MLMODEL_FILE_NAME))
    if FLAVOR_NAME not in meta.flavors:
        raise NotFoundError(f"The model at '{folder}' was not logged with the flavor '{FLAVOR_NAME}'.")
    return meta


def merged_config(meta: MlflowModel | None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the saved configuration with a user's overrides; what is None there overrides nothing."""
    saved = dict(meta.flavors.get("python_function", {}).get("config") or {}) if meta is not None else {}
    return {**saved, **{key: value for key, value in (overrides or {}).items() if value is not None}}


def policy_of(bundle: Bundle, overrides: Mapping[str, Any] | None = None) -> Policy:
    """Return what is insisted on for a bundle: overrides, then what was saved with it, then the environment.

    Args:
        bundle: The bundle, its ``MLmodel`` beside it where MLflow wrote one.
        overrides: ``variant``, ``runtime``, ``strict``; None leaves a saved value, an empty one lifts it.

    Raises:
        InvalidInputError: A value of a wrong type.
    """
    return Policy.of(merged_config(read_mlmodel(bundle), overrides))
