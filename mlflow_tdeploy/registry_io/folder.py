"""The folder of a model that holds no bundle: what is in it, and all of it on this host."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import yaml
from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_tdeploy.core.errors import IntegrityError, NotFoundError, first_line
from mlflow_tdeploy.registry_io.location import Location
from mlflow_tdeploy.store.disk import storage_errors
from mlflow_tdeploy.store.hashing import record_tree
from mlflow_tdeploy.store.staging import workspace

#: Name of the folder that a model is fetched to.
MODEL = "model"


def flavors_of(location: Location, names: dict[str, str]) -> dict[str, Any]:
    """Return the flavors in a model's ``MLmodel``, and what each says of itself; none where there is no such file.

    Args:
        location: The model.
        names: What :func:`listed` returned.

    Raises:
        IntegrityError: The file is damaged.
    """
    if MLMODEL_FILE_NAME not in names:
        return {}
    with workspace() as work:
        try:
            found = yaml.safe_load(_file(location, MLMODEL_FILE_NAME, work).read_bytes())["flavors"]
            return {str(name): dict(settings or {}) for name, settings in found.items()}
        except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise IntegrityError(
                f"'{MLMODEL_FILE_NAME}' of '{location.uri}' is damaged: {first_line(error)}"
            ) from error


def listed(location: Location) -> dict[str, str]:
    """Return every file of a model by its path, with what tells its state: size, and on this host when it was changed.

    Raises:
        NotFoundError: MLflow reads no artifacts there.
    """
    here = location.local
    if here is not None:
        found = (Path(folder, name) for folder, _, names in os.walk(here) for name in names)
        states = {path.relative_to(here).as_posix(): path.lstat() for path in found}
        return {path: f"{one.st_size} {one.st_mtime_ns} {one.st_ino}" for path, one in states.items()}
    try:
        return below(location, None)
    except ValueError as error:  # such as an http: address that is none of an artifact proxy
        raise NotFoundError(
            f"No model at '{location.uri}': MLflow reads no artifacts at such an address ({location.said(error)})."
        ) from error


def state_of(location: Location, names: dict[str, str], *more: str) -> str:
    """Return a key of a model's files as they are; a file that is changed here gives another one."""
    parts = [location.root, *more, *(f"{name} {state}" for name, state in sorted(names.items()))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def content_of(folder: Path, *more: str) -> str:
    """Return a key of a folder's files by what is in them."""
    records = [f"{one.path} {one.sha256}" for one in record_tree(folder.parent, folder.name)]
    return hashlib.sha256("\0".join([*more, *records]).encode()).hexdigest()[:32]


def bring(location: Location, into: Path) -> Path:
    """Return a folder of this host with all files of a model: its own, or ``into / MODEL``, which is made then."""
    if location.local is not None:
        return location.local
    with storage_errors(f"fetch '{location.uri}' to '{into}'"):
        target = into / MODEL
        target.mkdir()
        location.repository.download_artifacts("", str(target))
    return target


def below(location: Location, folder: str | None) -> dict[str, str]:
    """Return every file below a folder of a model by its path, with its size as the store says it."""
    found: dict[str, str] = {}
    for entry in location.repository.list_artifacts(folder):
        found |= below(location, entry.path) if entry.is_dir else {entry.path: str(entry.file_size)}
    return found


def _file(location: Location, name: str, work: Path) -> Path:
    if location.local is not None:
        return location.local / name
    return Path(location.repository.download_artifacts(name, str(work)))
