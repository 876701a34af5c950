"""The one moment in which a stable name changes whom it asks: a route is written and loaded, or nothing changes."""

from __future__ import annotations

import contextlib

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, ServerError, TDeployError
from mlflow_tdeploy.deploy.publish import write_file
from mlflow_tdeploy.deploy.route import Route
from mlflow_tdeploy.deploy.tidy import Tidy
from mlflow_tdeploy.triton.config import OWN, parse, to_text
from mlflow_tdeploy.triton.names import CONFIG, ROUTED


class Switch(Tidy):
    """Changes routes of one server and its repository, see :class:`Tidy`."""

    def _switch(self, name: str, old: Route | None, new: Route) -> None:
        """Write a route and load it; where that fails, the old one is written and loaded again."""
        before = self.files.read(f"{name}/{CONFIG}")
        self._write_route(name, new)
        try:
            self.client.bring_up(name, new.active)
            serving = self.serving(name)
            if serving is None or serving.active != new.active:
                raise ServerError(
                    f"The server at {self.client.connection.url} has loaded '{name}', and it is not the one in "
                    f"'{self.files.url}': is that the server's repository?"
                )
        except BaseException:
            if self._is_lost():
                pass  # what is there is another deployer's
            elif before is None or old is None:
                self.files.remove(f"{name}/{CONFIG}")
                with contextlib.suppress(TDeployError):
                    self.client.unload(name)
            else:
                self.files.write(f"{name}/{CONFIG}", before)
                with contextlib.suppress(TDeployError):
                    self.client.load(name)
            raise

    def _write_route(self, name: str, route: Route) -> None:
        """Write the stable name's configuration: that of the version which answers, and what a route says."""
        content = self.files.read(f"{name}/{route.active}/{ROUTED}")
        if content is None:
            raise IntegrityError(f"'{name}/{route.active}/{ROUTED}' is gone from '{self.files.url}': deploy it again.")
        self._held()
        config = parse(content.decode())
        for key, value in route.parameters().items():
            config.parameters[f"{OWN}{key}"].string_value = value
        write_file(self.files, name, CONFIG, to_text(config).encode())

    def _is_lost(self) -> bool:
        """Tell whether another deployer has taken over, to whom everything belongs then."""
        try:
            self._held()
        except ConflictError:
            return True
        return False

    def _load_graph(self, model: str, version: int, key: str) -> bool:
        """Load a graph, unless the server has this very one: another may be left of a deployer that was killed."""
        if key and self.loaded_key(model, version) == key:
            return False
        self.client.bring_up(model, version)
        return True
