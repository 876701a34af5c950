"""MLflow's deployment target ``tdeploy``: what ``mlflow deployments … -t tdeploy`` and ``get_deploy_client`` use."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.utils.proto_json_utils import NumpyEncoder

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, TDeployError
from mlflow_tdeploy.deploy.address import connection_of, files_of, server_here
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.ask import ask
from mlflow_tdeploy.deploy.choose import choose, served
from mlflow_tdeploy.deploy.found import FLAVORS
from mlflow_tdeploy.deploy.plan import Deployed
from mlflow_tdeploy.deploy.settings import DeploySettings, as_seconds
from mlflow_tdeploy.deploy.wanted import Wanted
from mlflow_tdeploy.registry_io import mlflow_errors
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.store.staging import workspace
from mlflow_tdeploy.triton.client import Connection, TritonClient
from mlflow_tdeploy.triton.names import check_name, check_version
from mlflow_tdeploy.triton.repository import render

__all__ = ["TDeployDeploymentClient", "run_local", "target_help"]

_log = logging.getLogger("mlflow_tdeploy")


class TDeployDeploymentClient(BaseDeploymentClient):
    """Versions of models on a Triton server, each behind a name that stays.

    Args:
        target_uri: ``tdeploy``, or ``tdeploy://host:8000?protocol=http&repository=/models``; see :func:`target_help`.
    """

    def __init__(self, target_uri: str) -> None:
        super().__init__(target_uri)
        with mlflow_errors():
            connection = connection_of(target_uri)
            self._client = TritonClient(connection, lambda: _last_error(connection))

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Deploy a model under a name that is free.

        Args:
            name: Name of the deployment.
            model_uri: The model: ``models:/name/1``, ``models:/name@alias``, ``runs:/…``, a folder, …
            flavor: ``tdeploy``, ``onnx`` or ``triton``; None for what the model is.
            config: Keys of :class:`DeploySettings` and :class:`TritonOptions`; an unknown one is an error.
            endpoint: Not used: Triton has none.

        Returns:
            What :meth:`get_deployment` returns.

        Raises:
            MlflowException: The name is taken (RESOURCE_ALREADY_EXISTS), the version answers otherwise on the server
                than where it was logged (INVALID_STATE), or the server cannot load it. Then nothing of it is left.
        """
        return self._deploy(name, model_uri, flavor, config, endpoint, None)

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Have another version answer to a name; one that does already is left as it is.

        Args:
            name: Name of the deployment.
            model_uri: The model; None for the one that is deployed.
            flavor: As for :meth:`create_deployment`.
            config: As for :meth:`create_deployment`; what is not said is as it was said last.
            endpoint: Not used: Triton has none.

        Raises:
            MlflowException: There is no such deployment, or the version cannot be brought: what served before serves
                on.
        """
        with mlflow_errors():
            before = self._deployments().describe(name)
            uri = model_uri or before.get("model_uri")
            if not uri:
                raise NotFoundError(
                    f"What '{name}' is made of is not known: its graph is gone from the repository. Say a model."
                )
        return self._deploy(name, uri, flavor, config, endpoint, before)

    def rollback_deployment(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Have the version answer that did before, or another one that is kept; nothing is published.

        Args:
            name: Name of the deployment.
            version: Which; the last one by default.

        Raises:
            MlflowException: No such version is kept.
        """
        with mlflow_errors():
            found = self._deployments()
            grace = as_seconds("grace", found.required(name).said.get("grace", DeploySettings.grace))
            _tell(found.rollback(name, version, grace))
        return self.get_deployment(name)

    def delete_deployment(
        self, name: str, config: Mapping[str, Any] | None = None, endpoint: str | None = None
    ) -> None:
        """Remove a deployment, its versions and exactly their files; one that is not there is fine.

        Args:
            name: Name of the deployment.
            config: Not used.
            endpoint: Not used: Triton has none.

        Raises:
            MlflowException: The name is a model's that was not deployed by this package.
        """
        _refuse_endpoint(endpoint)
        with mlflow_errors():
            self._deployments().delete(name)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """Return every deployment of this package in the repository; other models of the server are none.

        Args:
            endpoint: Not used: Triton has none.
        """
        _refuse_endpoint(endpoint)
        with mlflow_errors():
            found, described = self._deployments(), []
            for name in found.names():
                try:
                    described.append(found.describe(name))
                except TDeployError as error:  # one that is damaged says nothing about the others
                    _log.warning("Deployment '%s' cannot be described and is left out: %s", name, error)
            return described

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Return name, version, variant, why that one, readiness, when and by whom it was deployed.

        Args:
            name: Name of the deployment.
            endpoint: Not used: Triton has none.

        Raises:
            MlflowException: There is none of that name (RESOURCE_DOES_NOT_EXIST).
        """
        _refuse_endpoint(endpoint)
        with mlflow_errors():
            return self._deployments().describe(name)

    def predict(
        self,
        deployment_name: str | None = None,
        inputs: Any = None,
        endpoint: str | None = None,
        params: Mapping[str, Any] | None = None,
        version: int | None = None,
    ) -> PredictionsResponse:
        """Ask a deployment; needs the server only, not its repository.

        Args:
            deployment_name: Name of the deployment.
            inputs: What the model's own ``predict`` takes: texts, a table, name → array.
            endpoint: Not used: Triton has none.
            params: The task's parameters.
            version: A version that is loaded under the name.

        Returns:
            ``{"predictions": …}``; ``get_predictions()`` gives them as a table.

        Raises:
            MlflowException: There is no such deployment, the request cannot be used, or the server cannot answer.
        """
        _refuse_endpoint(endpoint)
        with mlflow_errors():
            if deployment_name is None:
                raise InvalidInputError("predict needs the name of a deployment.")
            if version is not None:
                check_version(version)
            return Predictions(
                predictions=ask(self._client, check_name(deployment_name), inputs, version=version, params=params)
            )

    def create_endpoint(self, name: str, config: Mapping[str, Any] | None = None) -> Any:
        """Say that Triton has no endpoints."""
        raise _no_endpoints()

    def update_endpoint(self, endpoint: str, config: Mapping[str, Any] | None = None) -> Any:
        """Say that Triton has no endpoints."""
        raise _no_endpoints()

    def delete_endpoint(self, endpoint: str) -> Any:
        """Say that Triton has no endpoints."""
        raise _no_endpoints()

    def list_endpoints(self) -> Any:
        """Say that Triton has no endpoints."""
        raise _no_endpoints()

    def get_endpoint(self, endpoint: str) -> Any:
        """Say that Triton has no endpoints."""
        raise _no_endpoints()

    def _deployments(self) -> Deployments:
        return Deployments(self._client, files_of(self.target_uri))

    def _deploy(
        self,
        name: str,
        model_uri: str,
        flavor: str | None,
        config: Mapping[str, Any] | None,
        endpoint: str | None,
        before: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Deploy a version in place of the one that is described, or as the first one where there is none."""
        _refuse_endpoint(endpoint)
        with mlflow_errors():
            taken_for = _checked(flavor)
            found = self._deployments()
            wanted = Wanted(found, name, model_uri, taken_for, dict(config or {}), before)
            _tell(found.deploy(*wanted.for_server(), create=before is None))
            return found.describe(name)


class Predictions(PredictionsResponse):
    """A deployment's answer: ``{"predictions": …}``, whose arrays become lists where it is made JSON."""

    def get_predictions(self, predictions_format: str = "dataframe", dtype: Any = None) -> Any:
        """Return the answer as a table, of several axes a row each, or as an array; see MLflow's own."""
        return PredictionsResponse(predictions=_rows(self["predictions"])).get_predictions(predictions_format, dtype)

    def to_json(self, path: Any = None) -> str | None:
        """Return the answer as JSON, or write it to a file."""
        text = json.dumps(_readable(dict(self)), cls=NumpyEncoder)
        if path is None:
            return text
        Path(path).write_text(text, encoding="utf-8")
        return None


def _rows(value: Any) -> Any:
    """Return named arrays with what a row has in each as one value, as a table holds it."""
    if not isinstance(value, Mapping):
        return value
    return {name: list(one) if isinstance(one, np.ndarray) and one.ndim > 1 else one for name, one in value.items()}


def _readable(value: Any) -> Any:
    """Return an answer with its texts as such, of which a server makes bytes."""
    if isinstance(value, Mapping):
        return {key: _readable(one) for key, one in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return _readable(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_readable(one) for one in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _last_error(connection: Connection) -> str:
    """Return the last error in the log of a server of this host; empty where that cannot be known."""
    local = server_here(connection)
    return local.listening.last_error() if local else ""


def run_local(name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, Any] | None = None) -> None:
    """Serve a model on a Triton of this host until it is interrupted.

    Args:
        name: Name of the deployment.
        model_uri: The model.
        flavor: ``tdeploy``, ``onnx`` or ``triton``; None for what the model is.
        config: As for ``create``; ``seconds`` ends it by itself.

    Raises:
        MlflowException: There is no Triton on this host, or it cannot load the model.
    """
    from mlflow_tdeploy.triton.home import find_server
    from mlflow_tdeploy.triton.local import local_triton

    with mlflow_errors(), workspace() as folder:
        taken_for = _checked(flavor)
        given = dict(config or {})
        seconds = as_seconds("seconds", given.pop("seconds", 0) or 0)
        settings = DeploySettings.of(given)
        what = choose(model_uri, settings, name=name, flavor=taken_for, host=probe.host)
        render(what, folder / "repository", served(settings, what))
        server, variant = find_server(), what.about["variant"]
        with local_triton(folder / "repository", models=[what.graph_name, what.name], server=server) as triton:
            print(  # noqa: T201 - what the command is for
                f"'{name}' version {what.version} ({variant}) answers at {triton.url}/v2/models/{name}/infer and by "
                f"gRPC at 127.0.0.1:{triton.grpc}, until Ctrl-C. {server.description}",
                flush=True,
            )
            triton.wait(seconds or None)


def target_help() -> str:
    """Return how the target is used."""
    return (Path(__file__).parent / "help.txt").read_text(encoding="utf-8")


def _tell(done: Deployed) -> None:
    what = f"version {done.version} answers to '{done.name}'"
    if not done.changed:
        _log.info("Nothing to do: %s already.", what)
        return
    _log.info(
        "%s after %.1f s; %d files (%.1f MB) were sent.",
        what.capitalize(),
        done.seconds,
        done.sent.files,
        done.sent.size / 1e6,
    )


def _checked(flavor: str | None) -> str:
    """Return a flavor that can be deployed; empty for what the model is.

    Raises:
        InvalidInputError: It is another one.
    """
    if flavor not in (None, "", *FLAVORS):
        raise InvalidInputError(f"The target tdeploy deploys the flavors {', '.join(FLAVORS)}, got '{flavor}'.")
    return flavor or ""


def _refuse_endpoint(endpoint: str | None) -> None:
    if endpoint is not None:
        raise _no_endpoints()


def _no_endpoints() -> MlflowException:
    return MlflowException(
        "The target tdeploy has no endpoints: a deployment's name is what clients call. Leave it out, and use "
        "create_deployment, update_deployment and rollback_deployment.",
        error_code=ErrorCode.Value("NOT_IMPLEMENTED"),
    )
