"""What was saved with a model as ``model_config``: the same for whoever opens, explains, measures or downloads it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import yaml
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.utils.model_utils import _validate_and_get_model_config_from_file

from mlflow_tdeploy import FLAVOR_NAME
from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, NotFoundError, first_line, shown
from mlflow_tdeploy.runtime.base import runtime_settings
from mlflow_tdeploy.runtime.options import SESSION_KEY, SessionOptions, added_options, common_options
from mlflow_tdeploy.runtime.policy import ENVIRONMENT, Policy
from mlflow_tdeploy.store.bundle import Bundle

_log = logging.getLogger("mlflow_tdeploy")

#: libyaml's reader where PyYAML has it: ten times as fast, which a plan over many models feels.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: Empty leaves the choice to the environment, then to the host.
_POLICY: dict[str, Any] = {"variant": "", "runtime": "", "strict": ""}


def defaults() -> dict[str, Any]:
    """Return every ``model_config`` key that this package knows, with its default."""
    return {**_POLICY, **common_options(), **added_options(runtime_settings()), SESSION_KEY: {}}


def read_config(given: Any) -> Mapping[str, Any]:
    """Return ``model_config`` as a mapping, where MLflow takes one or the path of a YAML file.

    Raises:
        InvalidInputError: It is neither.
        MlflowException: The file cannot be read.
    """
    if isinstance(given, (str, os.PathLike)):
        given = _validate_and_get_model_config_from_file(os.fspath(given))
    if given is not None and not isinstance(given, Mapping):
        raise InvalidInputError(f"model_config must be a mapping or the path of a YAML file, got {shown(given)}.")
    return given or {}


def full_config(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return every ``model_config`` key with its value: MLflow lets a user override only keys that were saved.

    The key ``session`` is there for what a later version adds: its options can be given in it to models logged now. It
    is saved empty, what was given in it beside its other keys: so what a caller says later comes first either way.

    Raises:
        InvalidInputError: An unknown key or a value that cannot be used.
    """
    policy, options = split_config(given)
    stated = {key: value for key, value in (given or {}).items() if value not in (None, "")}
    chosen = {key: getattr(policy, key) for key in _POLICY if key in stated}
    common = {key: getattr(options, key) for key in common_options()}
    return {**defaults(), **chosen, **common, **options.own}


def split_config(config: Mapping[str, Any] | None) -> tuple[Policy, SessionOptions]:
    """Return what ``model_config`` says about the choice and about the session; the environment is left out.

    Raises:
        InvalidInputError: An unknown key or a value that cannot be used.
    """
    given = dict(config or {})
    if unknown := sorted(set(map(str, given)) - set(known := defaults())):
        raise InvalidInputError(f"Unknown model_config key '{unknown[0]}'. Known: {', '.join(known)}.")
    policy = Policy.of({key: given.pop(key, default) for key, default in _POLICY.items()}, environ={})
    return policy, SessionOptions.of(given, runtime_settings())


def known_only(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a saved configuration without the keys that another version wrote.

    A warning names them, unless what was saved switches nothing on: every key is saved with its default.
    """
    known = defaults()
    for key in (given := dict(config or {})).keys() - known.keys():
        if given[key]:
            _log.warning("The option '%s' was saved with the model and is unknown to this version: ignored.", key)
        del given[key]
    return given


def read_flavors(bundle: Bundle) -> Mapping[str, Any] | None:
    """Return the flavors of the ``MLmodel`` file around a bundle, or None for one that was written without MLflow.

    Raises:
        IntegrityError: That file is damaged.
        NotFoundError: The model was logged with another flavor.
    """
    folder = bundle.root.parent
    if not (folder / MLMODEL_FILE_NAME).is_file():
        return None
    # not by MLflow's reader: it takes a path for a URI, finds no folder with a "%" in its name, and imports pandas
    try:
        flavors = yaml.load((folder / MLMODEL_FILE_NAME).read_bytes(), _LOADER)["flavors"]  # noqa: S506 - a safe one
        found = {str(name): dict(one or {}) for name, one in flavors.items()}
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise IntegrityError(
            f"'{folder / MLMODEL_FILE_NAME}' is damaged ({first_line(error)}). Take a sound copy of the model."
        ) from error
    if FLAVOR_NAME not in found:
        raise NotFoundError(f"The model at '{folder}' was not logged with the flavor '{FLAVOR_NAME}'.")
    return found


def merged_config(flavors: Mapping[str, Any] | None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the saved configuration with a user's overrides; what is None there overrides nothing."""
    saved = dict((flavors or {}).get("python_function", {}).get("config") or {})
    return {**saved, **{key: value for key, value in (overrides or {}).items() if value is not None}}


def policy_of(bundle: Bundle, overrides: Mapping[str, Any] | None = None) -> Policy:
    """Return what is insisted on for a bundle: overrides, then the environment, then what was saved with it.

    So an operator can move every model of a host to another variant, whatever was saved with them.

    Args:
        bundle: The bundle, its ``MLmodel`` beside it where MLflow wrote one.
        overrides: ``variant``, ``runtime``, ``strict``; None leaves a saved value, an empty one lifts it.

    Raises:
        InvalidInputError: A value of a wrong type.
    """
    return Policy.of(overrides, saved=merged_config(read_flavors(bundle)))


def said_now(bundle: Bundle, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration is not simply what was saved: MLflow hands on both in one mapping.

    Args:
        bundle: The bundle.
        config: What was saved, with a user's overrides.
    """
    if not any(os.environ.get(variable) for variable in ENVIRONMENT.values()):
        return {}  # then it makes no difference, and the file need not be read again
    saved = merged_config(read_flavors(bundle))
    return {key: value for key, value in config.items() if value != saved.get(key)}
