"""How the models of a deployment are called in a Triton repository, and the files in them."""

from __future__ import annotations

import re
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, shown

CONFIG = "config.pbtxt"
#: In a version's folder of the stable name: what its front needs to know, and the configuration to answer with it.
FACTS, ROUTED = "front.json", "route.pbtxt"
#: Ends the name of the model in which a version's front is tried, and of the one that says what the host is.
TRIAL = ".check"
_HOST, _TALLY = f".host{TRIAL}", f".tally{TRIAL}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_GRAPH_NAME = re.compile(r"(.+)\.v([1-9][0-9]*)")
#: Triton's versions are positive numbers of 63 bits.
_LARGEST = 2**63 - 1


def check_name(name: str) -> str:
    """Return a deployment's name, if it can be one.

    Raises:
        InvalidInputError: It is no plain folder name, or ends as the name of a version does.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise InvalidInputError(
            f"Invalid deployment name {shown(name)}: use 1 to 128 of A-Z, a-z, 0-9, '.', '_', '-', starting with a "
            f"letter or digit; no '/' and no '..'."
        )
    if name.endswith(TRIAL):
        raise InvalidInputError(
            f"Invalid deployment name {shown(name)}: names that end in '{TRIAL}' are for trying versions."
        )
    if _GRAPH_NAME.fullmatch(name):
        raise InvalidInputError(
            f"Invalid deployment name {shown(name)}: '{name}' is what version {name.rpartition('.v')[2]} of "
            f"'{name.rpartition('.v')[0]}' is called. Choose another one."
        )
    return name


def check_version(version: int) -> int:
    """Return a version, if Triton can have it.

    Raises:
        InvalidInputError: It is no positive number.
    """
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= _LARGEST:
        raise InvalidInputError(f"A version is a whole number from 1 on, got {shown(version)}.")
    return version


def host_model_of(name: str) -> str:
    """Return the name of the model that is asked what the host is, for a deployment."""
    return f"{name}{_HOST}"


def tally_model_of(name: str) -> str:
    """Return the name of the model that counts what is seen of a version which is tried out for a deployment."""
    return f"{name}{_TALLY}"


def owner(model: str) -> str:
    """Return the deployment that a Triton model is of by its name: ``m`` for ``m.v7``, ``m.v7.check`` and ``m``."""
    for end in (_HOST, _TALLY):
        if model.endswith(end):
            return model.removesuffix(end)
    found = graph_of(model.removesuffix(TRIAL))
    return found[0] if found else model


def graph_of(model: str) -> tuple[str, int] | None:
    """Return stable name and version of a Triton model that is a version's graph by its name, or None."""
    found: Any = _GRAPH_NAME.fullmatch(model)
    return (found[1], int(found[2])) if found else None
