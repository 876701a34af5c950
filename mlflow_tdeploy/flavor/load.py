"""``load_model``: the bundle behind a URI, opened by the variant this host picks, and no other one downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.utils.model_utils import _add_code_from_conf_to_system_path

from mlflow_tdeploy import FLAVOR_NAME
from mlflow_tdeploy.core.errors import InvalidInputError, TDeployError
from mlflow_tdeploy.flavor.config import known_only, merged_config, policy_of, read_config, read_flavors, split_config
from mlflow_tdeploy.flavor.native import TDeployModel
from mlflow_tdeploy.registry_io import locate, mlflow_errors, open_records
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.layout import MANIFEST


@mlflow_errors()
def load_model(
    model_uri: str,
    dst_path: str | None = None,
    *,
    variant: str | None = None,
    runtime: str | None = None,
    strict: bool | None = None,
    model_config: Mapping[str, Any] | str | Path | None = None,
) -> TDeployModel:
    """Load a model on this host. From a remote store only the records and the chosen variant are fetched.

    Args:
        model_uri: ``models:/name/1``, ``models:/name@alias``, ``models:/m-…``, ``runs:/…``, a folder, or a URI of any
            artifact store that MLflow knows.
        dst_path: Folder to download to; by default a folder of this host's cache, and nothing for local models.
        variant: Serve this variant and no other.
        runtime: Serve with this runtime and no other.
        strict: Fail instead of falling back to another variant when the first choice cannot be opened.
        model_config: Overrides of what was saved with the model: session options and the three above. A mapping, or
            the path of a YAML file.

    Returns:
        An object with ``predict(inputs, **params)``, ``infer(dict of arrays)``, ``signature``, ``variants``,
        ``decision`` and ``close()``; what it raises is an MlflowException.

    Raises:
        MlflowException: There is no such model, it holds no bundle, or none of its variants can serve here.
    """
    chosen = {"variant": variant, "runtime": runtime, "strict": strict}
    given = {**read_config(model_config), **{key: value for key, value in chosen.items() if value is not None}}
    split_config(given)  # what was saved may hold keys of a newer version, what a user says now may not
    if not model_uri:
        raise InvalidInputError(f"model_uri must name a model, got {model_uri!r}.")
    location = locate(model_uri)
    bundle, fetch = open_records(location, Path(dst_path) if dst_path is not None else None)
    try:
        return _open(bundle, fetch, given)
    except (TDeployError, OSError):
        if fetch is None or dst_path is not None or (bundle.root / MANIFEST).is_file():
            raise
    return _open(*open_records(location), given)  # somebody pruned this host's cache at that moment


def _open(bundle: Bundle, fetch: Fetch | None, given: Mapping[str, Any]) -> TDeployModel:
    flavors = read_flavors(bundle)
    if flavors is not None:
        _add_code_from_conf_to_system_path(str(bundle.root.parent), flavors[FLAVOR_NAME])
    _, options = split_config(known_only(merged_config(flavors, given)))
    return TDeployModel(open_model(bundle.root, policy=policy_of(bundle, given), options=options, fetch=fetch))
