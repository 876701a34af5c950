"""Back to what a repository has already: a version that answered before, or the one that should and does not."""

from __future__ import annotations

import contextlib
import getpass
import time
from collections.abc import Iterator
from dataclasses import replace

from mlflow_tdeploy.core.errors import NotFoundError
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.deploy.plan import Deployed, Settings
from mlflow_tdeploy.deploy.publish import Sent
from mlflow_tdeploy.deploy.route import Route
from mlflow_tdeploy.deploy.switch import Switch
from mlflow_tdeploy.deploy.tidy import BRIEFLY_S
from mlflow_tdeploy.triton.names import check_name


class Back(Switch):
    """Goes back, see :class:`Tidy`; nothing is sent."""

    def rollback(
        self,
        name: str,
        version: int | None = None,
        grace: float = Settings.grace,
        *,
        said: Settings | None = None,
        retire: bool = True,
    ) -> Deployed:
        """Have the version answer that did before, or another one that is kept, such as one that was gone back from.

        A call that was killed is completed by the next one, which goes no further back.

        Args:
            name: The deployment.
            version: Which version; the one before by default.
            grace: Seconds that what does not stay loaded stays all the same, for requests that it has.
            said: What is said of the deployment from now on, where another version comes that is there already: what
                serves becomes the version before.
            retire: Remove what is not kept any more; else :meth:`Deployments.retire` does.

        Raises:
            NotFoundError: There is no such deployment, or no such version is kept.
            ServerError: The server cannot load it: what served before serves on.
        """
        started = time.perf_counter()
        check_name(name)
        self.client.require_live()
        with self._changing(name):
            route, serving = self.required(name), self.serving(name)
            self.require_same(name, serving)
            before = serving.active if serving else None
            wanted = version if version is not None else route.back_from(before)
            if wanted is None or wanted not in route.kept:
                kept = ", ".join(str(one) for one in route.kept if one != route.active) or "none"
                raise NotFoundError(f"'{name}' has no version {wanted or 'before'} to go back to. Kept are: {kept}.")
            self._step("load")
            changed = self._load_graph(f"{name}.v{wanted}", wanted, self.published_key(f"{name}.v{wanted}"))
            new = route.moved(wanted, now(), user_name())
            if said is not None:  # another version comes, which was there already
                new = route.switched(wanted, said, now(), user_name())
            if route.rollout or new.config != route.config or not wanted == before == route.active:
                self._drained(name, wanted, BRIEFLY_S)  # else it could not be told from the one that comes
                self._step("switch")
                self._switch(name, route, new)
                changed = True
            if retire:
                self._retire(name, grace)
        return Deployed(name, wanted, before, changed, Sent(), time.perf_counter() - started)

    def restore(self, name: str, route: Route, *, retire: bool = True) -> None:
        """Have everything as it was before a call that has retired nothing.

        Args:
            name: The deployment.
            route: What :meth:`State.route` said before that call of :meth:`Deployments.deploy` or :meth:`rollback`.
            retire: See :meth:`rollback`.

        Raises:
            ServerError: The server cannot load what served then.
        """
        self.client.require_live()
        with self._changing(check_name(name)):
            there = self.required(name)
            self._load_graph(f"{name}.v{route.active}", route.active, self.published_key(f"{name}.v{route.active}"))
            serving = self.serving(name)
            if there != route or serving is None or serving.active != route.active:
                self._drained(name, route.active, BRIEFLY_S)
                self._switch(name, there, route)
            if retire:
                self._retire(name, 0.0)

    def revive(self, name: str) -> int | None:
        """Have the version that is deployed answer again where nothing does, as on a server that came back empty.

        It is loaded from the repository as it is, and asks neither the registry nor any gate: it passed them when it
        came. Nothing else is changed.

        Args:
            name: The deployment.

        Returns:
            The version; None where one answers, or nothing is deployed.

        Raises:
            ServerError: The server cannot load it.
        """
        self.client.require_live()
        with self._changing(check_name(name)):
            route = self.route(name)
            if route is None or self.answering(name) is not None:
                return None
            self._step("revive")
            self._load_graph(f"{name}.v{route.active}", route.active, self.published_key(f"{name}.v{route.active}"))
            serving = self.serving(name)
            if route.rollout or serving is None or serving.active != route.active:
                self._switch(name, route, replace(route, rollout=""))
        return route.active

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Be the only one to change a deployment, and notice once that is over."""
        with self.files.lease(name) as held:
            self._held = held
            try:
                yield
            finally:
                self._held = lambda: None


def user_name() -> str:
    """Return who does this, as the system knows them."""
    with contextlib.suppress(Exception):  # no such user, no environment
        return getpass.getuser()
    return "unknown"
