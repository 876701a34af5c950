"""What is deployed: read from a server and its repository, every time; nothing else remembers it."""

from __future__ import annotations

import logging
from typing import Any

from mlflow_tdeploy.core.errors import (
    ConflictError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    TDeployError,
)
from mlflow_tdeploy.deploy.files import RepositoryFiles
from mlflow_tdeploy.deploy.publish import read_index
from mlflow_tdeploy.deploy.route import Route, record
from mlflow_tdeploy.triton.client import TritonClient
from mlflow_tdeploy.triton.config import ours, own_parameters, parse
from mlflow_tdeploy.triton.names import CONFIG, TRIAL, check_name, graph_of, owner

_log = logging.getLogger("mlflow_tdeploy")


def route_of(files: RepositoryFiles, name: str) -> Route | None:
    """Return which version answers, as the repository says; None where nothing of ours is deployed.

    Raises:
        IntegrityError: It says nothing that makes sense.
    """
    if read_index(files, name) is None:
        return None
    content = files.read(f"{name}/{CONFIG}")
    if content is None:
        return None  # a deployer was killed before the first switch
    where = f"'{name}/{CONFIG}' in '{files.url}'"
    try:
        return Route.of(own_parameters(parse(content.decode())), where)
    except (InvalidInputError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{where} is damaged, so what serves is not known: {error}") from error


class State:
    """The deployments of one server and its repository.

    Args:
        client: The server.
        files: Its repository, as this host reaches it.
    """

    def __init__(self, client: TritonClient, files: RepositoryFiles) -> None:
        self.client = client
        self.files = files

    def names(self) -> list[str]:
        """Return the deployments of ours, from the repository."""
        models = (name for name in self.files.models() if graph_of(name) is None and not name.endswith(TRIAL))
        found = []
        for name in models:
            try:
                if self.route(name) is not None:
                    found.append(name)
            except TDeployError as error:  # one that is damaged says nothing about the others
                _log.warning("A deployment cannot be read and is left out: %s", error)
        return found

    def route(self, name: str) -> Route | None:
        """Return which version answers, see :func:`route_of`."""
        return route_of(self.files, name)

    def serving(self, name: str) -> Route | None:
        """Return which version answers, as the server says; None where the name is not loaded.

        Raises:
            ConflictError: A model that is not ours answers to the name.
        """
        found = self.client.parameters(name)
        if found is None:
            return None
        own = ours(found)
        if "active" not in own:
            raise ConflictError(
                f"The server at {self.client.connection.url} has a model '{name}' that was not deployed by "
                f"mlflow-tdeploy. Deploy under another name."
            )
        return Route.of(own, f"'{name}' at {self.client.connection.url}")

    def answering(self, name: str) -> int | None:
        """Return the version that answers to a name; None where that is not loaded, or its graph is not."""
        serving = self.serving(name)
        there = serving is not None and self.client.ready(f"{name}.v{serving.active}", serving.active)
        return serving.active if serving is not None and there else None

    def describe(self, name: str, *, live: bool | None = None) -> dict[str, Any]:
        """Return what is known about a deployment.

        Args:
            name: The deployment.
            live: Whether the server answers, where that is known.

        Raises:
            NotFoundError: There is none of that name.
        """
        route = self.required(name)
        graph = self.files.read(f"{name}.v{route.active}/{CONFIG}")
        own = own_parameters(parse(graph.decode())) if graph else {}
        live = self.client.live() if live is None else live
        answers = self.answering(name) if live else None
        loaded = [one for one in route.kept if live and self.client.ready(f"{name}.v{one}", one)]
        return {
            "name": name,
            "version": route.active,
            "answers": answers,
            "previous": list(route.previous),
            "ahead": list(route.ahead),
            "ready": answers == route.active,
            "loaded": loaded,
            "deployed": route.changed,
            "by": route.by,
            **({"tried_out": route.tried_out.version} if route.tried_out else {}),
            "server": self.client.connection.url,
            "repository": self.files.url,
            **own,
            "host": record(own.get("host", "")),
            "config": route.said,
        }

    def required(self, name: str) -> Route:
        """Return the route of a deployment that has to be there.

        Raises:
            NotFoundError: There is none of that name.
        """
        route = self.route(check_name(name))
        if route is None:
            having = ", ".join(self.names()) or "none"
            raise NotFoundError(f"There is no deployment '{name}' in '{self.files.url}'. There are: {having}.")
        return route

    def graphs(self, name: str) -> list[str]:
        """Return the graphs of ours that the repository has of a deployment."""
        return [one for one in self._published(name) if graph_of(one)]

    def loaded(self, name: str) -> list[str]:
        """Return the models of ours that the server has of a deployment, wherever their files are.

        Raises:
            ConflictError: The name is somebody else's.
        """
        found = {one.name for one in self.client.models() if one.state == "READY"}
        serving = self.serving(name)  # a server lists no model whose folder is gone
        found |= {name, *self.graphs(name), *(f"{name}.v{version}" for version in (serving.kept if serving else ()))}
        mine = [one for one in sorted(found) if owner(one) == name]
        return [one for one in mine if ours(self.client.parameters(one) or {})]

    def require_same(self, name: str, serving: Route | None) -> None:
        """Make sure that a server answers with what the repository has: else the two do not belong together.

        One that answers with a version whose files are lost is given another one all the same, where it lists the one
        that the repository routes to: it is the server's repository then.

        Raises:
            ConflictError: It answers with a version that the repository does not have, or has with other files.
        """
        if serving is None:
            return
        model = f"{name}.v{serving.active}"
        has, loaded = self.published_key(model), self.loaded_key(model, serving.active)
        route = self.route(name) if not has else None
        if route and f"{name}.v{route.active}" in {one.name for one in self.client.models()}:
            return
        if not has or loaded not in ("", has):
            raise ConflictError(
                f"The server at {self.client.connection.url} answers to '{name}' with version {serving.active}, and "
                f"'{self.files.url}' {'has it with other files' if has else 'does not have it'}: is that the server's "
                f"repository? If its files were lost, delete the deployment first."
            )

    def loaded_key(self, model: str, version: int) -> str:
        """Return what a graph that the server has loaded was made of; empty where it is not loaded."""
        return ours(self.client.parameters(model, version) or {}).get("key", "")

    def tried(self, name: str) -> list[str]:
        """Return the models of ours that were there for a moment, left by a killed deployer."""
        return [one for one in self._published(name) if one.endswith(TRIAL)]

    def _published(self, name: str) -> list[str]:
        mine = [one for one in self.files.models() if owner(one) == name]
        return [one for one in mine if read_index(self.files, one) is not None]

    def published_key(self, model: str) -> str:
        """Return what a published graph was made of; empty where it is not there."""
        return self.published(model).get("key", "")

    def published(self, model: str) -> dict[str, str]:
        """Return what a published graph says of itself; nothing where it is not there."""
        content = self.files.read(f"{model}/{CONFIG}")
        return own_parameters(parse(content.decode())) if content else {}
