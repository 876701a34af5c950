"""What the host of a server is, asked of a model that is there for that moment only."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from mlflow_tdeploy.core.errors import ServerError, TDeployError, UnreachableError
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.records import from_plain
from mlflow_tdeploy.deploy.files import RepositoryFiles
from mlflow_tdeploy.deploy.publish import publish, remove
from mlflow_tdeploy.store.staging import workspace
from mlflow_tdeploy.triton.client import TritonClient
from mlflow_tdeploy.triton.helper_model import VERSION
from mlflow_tdeploy.triton.host_model import HOST, fingerprint_of, question
from mlflow_tdeploy.triton.names import host_model_of


def ask_host(client: TritonClient, files: RepositoryFiles, name: str) -> Fingerprint:
    """Return what a server's host is; nothing is left of the asking.

    Args:
        client: The server.
        files: Its repository.
        name: The deployment that it is asked for, whose lease the caller holds.

    Raises:
        ServerError: The server cannot load the model, or does not say what its host is.
    """
    model = host_model_of(name)
    with workspace() as work:
        HOST.write(work / model)
        try:
            publish(files, model, work / model)
            client.bring_up(model, VERSION)
            return fingerprint_of(client.infer(model, question()), client.connection.url)
        except ServerError as error:
            if isinstance(error, UnreachableError) or model not in str(error):
                raise
            raise ServerError(
                f"{error} (Is '{files.url}' the server's repository? That model only says what the server's host is, "
                f"for the choice of a variant; it is not needed where device=cpu or device=cuda says that.)"
            ) from error
        finally:
            with contextlib.suppress(TDeployError):  # what is left is taken away by the next deployment
                client.unload(model)
                remove(files, model)


def host_of(deployed: Mapping[str, Any]) -> Fingerprint | None:
    """Return what a deployment's version was chosen for; None where that cannot be told."""
    with contextlib.suppress(TDeployError):
        return from_plain(Fingerprint, deployed.get("host") or None, "the deployment")
    return None
