"""What a server of a repository loads when it starts."""

from __future__ import annotations

import logging
from pathlib import Path

from mlflow_tdeploy.build.triton_repository import model_names
from mlflow_tdeploy.core.errors import TDeployError
from mlflow_tdeploy.deploy.files import FolderFiles
from mlflow_tdeploy.deploy.publish import missing, read_index
from mlflow_tdeploy.deploy.state import route_of
from mlflow_tdeploy.triton.names import TRIAL, graph_of

_log = logging.getLogger("mlflow_tdeploy")


def models_at_start(repository: Path) -> list[str]:
    """Return the models to load: of deployments what is to be loaded of them, and whatever is somebody else's.

    Triton ends where one model cannot be loaded. So what a deployer that was killed has left is not among them.

    Args:
        repository: The folder.

    Raises:
        InvalidInputError: It is no repository.
    """
    files = FolderFiles(repository)
    names = [model for model in model_names(repository) if not model.endswith(TRIAL) and _loads(files, model)]
    return [model for model in names if _is_whole(files, model)]


def _is_whole(files: FolderFiles, model: str) -> bool:
    gone = missing(files, model)
    if gone:
        _log.warning("'%s' is not loaded: its file '%s' is gone or damaged. Deploy it again.", model, gone[0])
    return not gone


def _loads(files: FolderFiles, model: str) -> bool:
    name, version = graph_of(model) or (model, None)
    try:
        route = route_of(files, name)
        if route is None:
            return read_index(files, model) is None  # what is ours has been left by a deployer that was killed
    except TDeployError as error:  # one that is damaged says nothing about the others
        _log.warning("'%s' is not loaded: %s", model, error)
        return False
    return version in (None, route.active) or (route.keep_loaded and version in route.kept)
