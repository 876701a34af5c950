"""Bringing a version to a server: its graph loaded and verified under its own name, then the stable name's route.

Steps, in order; whatever fails, what served before serves on, and what was new goes:

1. ``graph``: the graph is published as ``m.v8`` and loaded. ``m.v7`` is not touched.
2. ``verify``: the golden requests are replayed on it.
3. ``front``: what the stable name needs for it is published as a model of its own and loaded.
4. ``answers``: the golden requests are sent to that as a user would send them; whoever else is to judge asks it
   (``judge``). It may be tried out on requests to ``m`` for a while (``tryout``): ``m`` is loaded anew with that in its
   route, and again without it. It is unloaded and removed.
5. ``switch``: ``m`` gets the new version's folder and its route, and is loaded anew: the thin front only.
6. ``retire``: versions that are not kept are unloaded and removed, after a while for requests that they still have.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mlflow_tdeploy.core.errors import (
    ConflictError,
    TDeployError,
    VerificationError,
)
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.rollout import Rollout
from mlflow_tdeploy.deploy.back import Back, user_name
from mlflow_tdeploy.deploy.ends import remove_notes
from mlflow_tdeploy.deploy.files import RepositoryFiles
from mlflow_tdeploy.deploy.plan import Deployed, Settings, key_of
from mlflow_tdeploy.deploy.publish import (
    Sent,
    missing,
    publish,
    publish_copy,
    read_index,
    remove,
    require_ours,
    write_file,
)
from mlflow_tdeploy.deploy.route import Route
from mlflow_tdeploy.deploy.server_host import ask_host
from mlflow_tdeploy.deploy.tryout import Tryout, counted
from mlflow_tdeploy.deploy.verify import check_front, check_graph
from mlflow_tdeploy.store.staging import workspace
from mlflow_tdeploy.triton.bundle_version import BundleVersion
from mlflow_tdeploy.triton.config import parse, to_text
from mlflow_tdeploy.triton.names import CONFIG, FACTS, TRIAL, check_name, tally_model_of
from mlflow_tdeploy.triton.repository import Deployable

#: Seconds that a server goes on trying a version out where nobody says any more that it is over.
_LONGER_S = 30.0
#: Raises where a version may not serve; is told the version, and the name of a model that answers as it will.
Judge = Callable[[Deployable, str], None]


class Deployments(Back):
    """Changes the deployments of one server and its repository, see :class:`Tidy`."""

    def deploy(
        self,
        what: Deployable,
        settings: Settings,
        *,
        create: bool = False,
        judge: Judge | None = None,
        tryout: Tryout | None = None,
        retire: bool = True,
    ) -> Deployed:
        """Have a version answer to its name; a version that does already is left as it is.

        Args:
            what: The version.
            settings: How.
            create: Fail where the name is deployed already.
            judge: Called with the version and the name of a model that answers as it will, before it does; what it
                raises is a failure.
            tryout: How it is tried out before it answers everybody; not where nothing answers yet.
            retire: Remove what is not kept any more; else :meth:`retire` does, and until then :meth:`restore` can.

        Raises:
            ConflictError: The name is taken, by another model or by a deployer that is at it.
            VerificationError: The version answers otherwise on the server: what served before serves on.
            TryoutError: It did worse than the version that serves.
            ServerError: The server cannot load it, or is not there.
        """
        started = time.perf_counter()
        check_name(what.name)
        self.client.require_live()
        with self._changing(what.name):
            serving, route = self._found(what.name, create=create)
            self._clean(what.name, what.version, serving, graphs=retire)
            before = route.active if route else None
            if route and self.answers(what, settings):
                kept = route.previous[: settings.keep]
                new = replace(
                    route, previous=kept, config=settings.config, keep_loaded=settings.keep_loaded, rollout=""
                )
                if changed := new != route:
                    self._switch(what.name, route, new)
                if retire:  # who was killed may not have come so far
                    self._retire(what.name, settings.grace)
                return Deployed(what.name, what.version, before, changed, Sent(), time.perf_counter() - started)
            sent, seen = self._bring(what, settings, (route, serving), judge, tryout)
            if retire:
                self._retire(what.name, settings.grace)
        return Deployed(what.name, what.version, before, True, sent, time.perf_counter() - started, seen)

    def host(self, name: str, *, create: bool = False) -> Fingerprint:
        """Return what the server's host is, as a model says that is loaded for it, under a deployment's lease.

        Args:
            name: The deployment that it is asked for.
            create: Fail where the name is deployed already.

        Raises:
            ConflictError: The name is taken.
            ServerError: The server cannot load that model, or is not there.
        """
        self.client.require_live()
        with self._changing(check_name(name)):
            self._found(name, create=create)
            self._step("host")
            return ask_host(self.client, self.files, name)

    def answers(self, what: Deployable, settings: Settings) -> bool:
        """Tell whether a version answers already, with the same files and options."""
        serving, route = self.serving(what.name), self.route(what.name)
        if serving is None or route is None or not serving.active == route.active == what.version:
            return False
        same = self.loaded_key(what.graph_name, what.version) == key_of(what, settings)
        return same and self.is_whole(what.graph_name, what.name)

    def is_whole(self, *models: str) -> bool:
        """Tell whether all files of models are in the repository, as was noted when they were put there."""
        return all(_is_whole(self.files, model) for model in models)

    def retire(self, name: str, *, unload_only: bool = False) -> None:
        """Remove the versions that are not kept; who wants requests to have a while calls :meth:`drain` before.

        Args:
            name: The deployment.
            unload_only: Leave their files, as another server of the repository may have them loaded.
        """
        with self._changing(check_name(name)):
            self._retire(name, None, unload_only=unload_only)

    def drain(self, name: str, grace: float = Settings.grace) -> bool:
        """Wait until no version still has requests that came before the last switch; changes nothing, holds nobody up.

        Args:
            name: The deployment.
            grace: Seconds for requests that are on their way to what is not kept.

        Returns:
            False where there are some still, after two minutes.
        """
        if self._is_to_retire(check_name(name)):
            time.sleep(grace)
        return self._drained(name)

    def is_drained(self, name: str) -> bool:
        """Tell whether there is nothing left for :meth:`drain` to wait for: somebody may have switched since."""
        return self._is_drained(check_name(name))

    def delete(self, name: str) -> bool:
        """Remove a deployment: its models from the server, and exactly their files; False where there was none.

        Raises:
            ConflictError: The name is somebody else's.
            UnreachableError: The server is not there: what it has loaded would answer on, and nobody could end it.
        """
        check_name(name)
        self.client.require_live()
        with self._changing(name):
            loaded, published = self.loaded(name), [*self.graphs(name), *self.tried(name)]
            if require_ours(self.files, name) is None and not published and not loaded:
                return False
            for model in sorted(loaded, key=lambda one: one != name):  # the name first
                self._step(f"unload {model}")
                self.client.unload(model)
                if model == name:
                    self._drained(name)  # its graphs answer what it still has
            remove_notes(self.files, name, self.client.connection.url)
            self.files.remove(f"{name}/{CONFIG}")  # from now on nothing of it is loaded where a server starts
            for model in (*published, name):
                self._step(f"remove {model}")
                remove(self.files, model)
            return True

    def _found(self, name: str, *, create: bool) -> tuple[Route | None, Route | None]:
        """Return what the server and the repository say of a name that may be changed."""
        require_ours(self.files, name)
        serving, route = self.serving(name), self.route(name)
        self.require_same(name, serving)
        if create and route is not None:
            raise ConflictError(
                f"'{name}' is deployed already: version {route.active} answers. Use update, or another name."
            )
        return serving, route

    def _bring(
        self,
        what: Deployable,
        settings: Settings,
        found: tuple[Route | None, Route | None],
        judge: Judge | None,
        tryout: Tryout | None,
    ) -> tuple[Sent, str]:
        route, serving = found
        kept = {*(route.kept if route else ()), *(serving.kept if serving else ())}
        made_of = {self.published_key(what.graph_name), self.loaded_key(what.graph_name, what.version)}
        if what.version in kept and made_of - {"", key_of(what, settings)}:
            raise ConflictError(
                f"Version {what.version} of '{what.name}' is deployed with other files or options, and a version is "
                f"not changed in place. Go back to it as it is (rollback_deployment with version={what.version}), "
                f"deploy it under another number (version={max(kept) + 1}), or delete the deployment first."
            )
        beside = route if tryout and self.answering(what.name) is not None else None  # else there is nothing beside
        if beside:
            self._require_tries_out(what, beside)
        with workspace() as work, self._undone(what, known=what.version in kept):
            sent = self._bring_graph(what, settings, work)
            with self._front(what, settings, work, asked_by_many=beside is not None) as (trial, more):
                if judge:
                    self._step("judge")
                    judge(what, trial)
                seen = self._try_out(what, trial, tryout) if beside and tryout else ""
                if seen:  # that was long ago, and what hangs meanwhile may have been asked by nobody
                    check_front(self.client, what, trial, settings.options)
            self._drained(what.name, what.version)  # else it could not be told from the one that comes
            self._step("switch")
            new = (route or Route(what.version)).switched(what.version, settings, now(), user_name())
            self._switch(what.name, route, new)
        return sent + more, seen

    def _bring_graph(self, what: Deployable, settings: Settings, work: Path) -> Sent:
        self._step("graph")
        folder, key = work / what.graph_name, key_of(what, settings)
        about = {**what.about, "key": key, "instances": str(settings.options.instances)}
        replace(what, about=about).write_graph(folder, settings.options)
        sent = publish(self.files, what.graph_name, folder)
        self._load_graph(what.graph_name, what.version, key)
        self._step("verify")
        check_graph(self.client, what, settings.options)
        return sent

    @contextlib.contextmanager
    def _front(
        self, what: Deployable, settings: Settings, work: Path, *, asked_by_many: bool
    ) -> Iterator[tuple[str, Sent]]:
        """Have a version's front answer in a model of its own; yields its name, and what was moved."""
        self._step("front")
        trial, folder = f"{what.graph_name}{TRIAL}", work / "front"
        what.write_front(folder, settings.options)
        sent = publish(self.files, what.name, folder, keep=True)
        publish_copy(self.files, what.name, trial, folder)
        config = parse(what.route_text(settings.options))
        config.name = trial
        if config.instance_group and not asked_by_many:
            config.instance_group[0].count = 1  # golden requests come one after the other
        write_file(self.files, trial, CONFIG, to_text(config).encode())
        self.client.bring_up(trial, what.version)
        self._step("answers")
        check_front(self.client, what, trial, settings.options)
        yield trial, sent
        self.client.unload(trial)  # where something fails, who undoes the rest does
        remove(self.files, trial)

    def _require_tries_out(self, what: Deployable, route: Route) -> None:
        content = self.files.read(f"{what.name}/{route.active}/{FACTS}")
        if not (isinstance(what, BundleVersion) and content and json.loads(content).get("tries_out")):
            raise ConflictError(
                f"Version {what.version} of '{what.name}' cannot be tried out beside version {route.active}: a Triton "
                f"model as it is, or one that an older mlflow-tdeploy has deployed, does not know how. Switch to it."
            )

    def _try_out(self, what: Deployable, trial: str, tryout: Tryout) -> str:
        """Have a version asked a share of the requests; return what was seen."""
        self._step(tryout.kind)

        def say(rollout: str) -> None:
            route = self.required(what.name)
            self._switch(what.name, route, replace(route, rollout=rollout))

        def go_on() -> None:
            self._held()
            tryout.go_on()

        with counted(self.client, self.files, what.name) as seen:
            tally = tally_model_of(what.name)
            rollout = Rollout(what.version, trial, tally, tryout.kind, tryout.share, tryout.seconds + _LONGER_S)
            try:
                say(to_json(rollout))
                return f"{tryout.kind}: {replace(tryout, go_on=go_on).watched(seen)}"
            finally:
                say("")

    @contextlib.contextmanager
    def _undone(self, what: Deployable, *, known: bool) -> Iterator[None]:
        """Take back what a failed step has left, but for a version that was there before."""
        try:
            yield
        except BaseException as error:
            if self._is_lost():
                raise
            stays = known or self._may_answer(what)
            trial = f"{what.graph_name}{TRIAL}"
            if not stays:  # it may have been there before, and have requests still
                with contextlib.suppress(TDeployError):
                    self._drained(what.name)
            for model in (trial,) if stays else (trial, what.graph_name):
                with contextlib.suppress(TDeployError):
                    if read_index(self.files, model) is None:
                        continue  # nothing of ours is there
                    self.client.unload(model)
                with contextlib.suppress(TDeployError):
                    remove(self.files, model)
            if not stays:
                with contextlib.suppress(TDeployError):
                    self._remove_front(what.name, what.version)
            if isinstance(error, VerificationError):
                raise type(error)(f"{error} What served before serves on; nothing of it was kept.") from error
            raise

    def _may_answer(self, what: Deployable) -> bool:
        """Tell whether a version that was to be new answers already, or may: what it is made of stays then.

        Who is interrupted may be so between the switch and what would have noted it; whose network is, does not know.
        """
        try:
            routes = (self.route(what.name), self.serving(what.name))
        except TDeployError:
            return True
        return any(route is not None and route.active == what.version for route in routes)

    def _remove_front(self, name: str, version: int) -> None:
        if self.route(name) is None:
            remove(self.files, name)
        else:
            remove(self.files, name, f"{version}/")


def _is_whole(files: RepositoryFiles, model: str) -> bool:
    index = read_index(files, model)
    return index is not None and index.whole and not missing(files, model)
