"""What has to go: what killed deployers have left, and versions that are not kept, or not kept loaded."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping

from mlflow_tdeploy.deploy.files import Held, RepositoryFiles
from mlflow_tdeploy.deploy.publish import read_index, remove
from mlflow_tdeploy.deploy.route import Route
from mlflow_tdeploy.deploy.state import State
from mlflow_tdeploy.triton.client import TritonClient
from mlflow_tdeploy.triton.names import FACTS, TRIAL, graph_of, owner

_log = logging.getLogger("mlflow_tdeploy")
_DRAIN_S, _PAUSE_S = 120.0, 0.1
#: Seconds at most for the same where somebody goes back, which is urgent.
BRIEFLY_S = 10.0


class Tidy(State):
    """Removes and unloads what a deployment does not need any more.

    Args:
        client: The server.
        files: Its repository, as this host reaches it.
        on_step: Told of each step before it begins.
    """

    def __init__(
        self, client: TritonClient, files: RepositoryFiles, on_step: Callable[[str], None] | None = None
    ) -> None:
        super().__init__(client, files)
        self._held: Held = lambda: None
        self._step = on_step or (lambda step: _log.info("Deployment: %s", step))

    def _clean(self, name: str, coming: int, serving: Route | None, *, graphs: bool) -> None:
        """Remove what a killed deployer has left: models that are tried, and versions that no route knows.

        What the server still routes to stays, whatever the repository says: that may never have been loaded. So does
        what may have requests from before the last switch: who retires waits for them.

        Args:
            name: The deployment.
            coming: The version that is to come.
            serving: What the server routes to.
            graphs: Versions, too, and all files at once; not where other servers have the repository, which may have
                requests for them, or loaded what was tried: who retires removes that.
        """
        route = self.route(name)
        staying = {coming, *(route.kept if route else ()), *(serving.kept if serving else ())}
        mine = [model for model in self.files.models() if owner(model) == name and model != name]
        drained = graphs and self._is_drained(name)
        for model in mine:
            version = graph_of(model.removesuffix(TRIAL))
            if version and (version[1] in staying or not drained) and not model.endswith(TRIAL):
                continue
            if read_index(self.files, model) is None:
                continue  # somebody else's
            self._step(f"clean {model}")
            self.client.unload(model)
            if version and version[1] not in staying and drained:
                remove(self.files, name, f"{version[1]}/")
            if graphs:
                remove(self.files, model)  # last: it tells the next call that there is something to remove

    def _retire(self, name: str, grace: float | None, *, unload_only: bool = False) -> None:
        """Unload and remove the versions that are not kept, and unload those that are kept on disk only.

        Args:
            name: The deployment.
            grace: Seconds for requests that are on their way; None where they were waited for.
            unload_only: Leave their files.
        """
        route, tried = self.route(name), self.tried(name)
        old, resting = self._to_retire(name, route)
        if route is None or not (old or resting or tried):
            return
        self._step("retire")
        if grace is not None:
            time.sleep(grace)
            self._drained(name)
        self._held()
        for model in (*tried, *resting.values(), *old.values()):
            self.client.unload(model)
        if unload_only:
            return
        for model in tried:
            remove(self.files, model)
        for version, model in old.items():
            remove(self.files, name, f"{version}/")
            remove(self.files, model)
        if old:
            self._remove_libraries(name, route)

    def _is_to_retire(self, name: str) -> bool:
        return any(self._to_retire(name, self.route(name)))

    def _to_retire(self, name: str, route: Route | None) -> tuple[dict[int, str], dict[int, str]]:
        """Return the models of versions that are not kept, and those that are only to be unloaded, by version.

        Those are versions that are kept on disk, and what a server that was away has of those that are gone.
        """
        if route is None:
            return {}, {}
        graphs = {found[1]: model for model in self.graphs(name) if (found := graph_of(model))}
        old = {version: model for version, model in graphs.items() if version not in route.kept}
        resting = {} if route.keep_loaded else {one: graphs[one] for one in route.kept[1:] if one in graphs}
        resting |= {one: f"{name}.v{one}" for one in route.gone if one not in graphs}
        ready = {version: model for version, model in resting.items() if self.client.ready(model, version)}
        if not (old or ready):
            return {}, {}
        serving = self.serving(name)  # another one than the repository says where a switch did not come
        answers = serving.active if serving else None
        return _without(old, answers), _without(ready, answers)

    def _drained(self, name: str, version: int | None = None, seconds: float | None = None) -> bool:
        """Wait until no version of the stable name, or not that one, answers requests that it had before the switch.

        Returns:
            False where one is, after some time: two minutes, or so many seconds.
        """
        end = time.monotonic() + (_DRAIN_S if seconds is None else seconds)
        while not (drained := self._is_drained(name, version)) and time.monotonic() < end:
            time.sleep(_PAUSE_S)
        return drained

    def _is_drained(self, name: str, version: int | None = None) -> bool:
        going = (one for one in self.client.models() if one.name == name and one.state == "UNLOADING")
        return not any(version is None or one.version == str(version) for one in going)

    def _remove_libraries(self, name: str, route: Route) -> None:
        """Remove the libraries that no version which is kept uses: those of an older version of this package."""
        facts = [json.loads(self.files.read(f"{name}/{version}/{FACTS}") or b"{}") for version in route.kept]
        used = {one.get("library") for one in facts}
        index = read_index(self.files, name)
        tops = {path.partition("/")[0] for path in (index.files if index else ())}
        for top in sorted(one for one in tops if one.startswith("library-") and one not in used):
            remove(self.files, name, f"{top}/")


def _without(models: Mapping[int, str], version: int | None) -> dict[int, str]:
    return {one: model for one, model in models.items() if one != version}
