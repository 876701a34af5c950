"""What a call wants to have deployed: the version of a model that suits a server, and how it is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.choose import choose, served
from mlflow_tdeploy.deploy.found import LoggedBundle
from mlflow_tdeploy.deploy.plan import Settings, key_of
from mlflow_tdeploy.deploy.server_host import host_of
from mlflow_tdeploy.deploy.settings import DeploySettings, as_record, said
from mlflow_tdeploy.registry_io import registered_version
from mlflow_tdeploy.triton.repository import Deployable


@dataclass(frozen=True)
class Wanted:
    """A model under a name.

    Attributes:
        deployments: Those of the server.
        name: The deployment.
        uri: The model.
        flavor: What to take it for; empty for what it is.
        config: What is said in this call.
        before: What is deployed, as :meth:`State.describe` tells it; None for a new deployment.
        known: The bundle that the model is, where somebody has its records.
    """

    deployments: Deployments
    name: str
    uri: str
    flavor: str
    config: Mapping[str, Any]
    before: Mapping[str, Any] | None = None
    known: LoggedBundle | None = None

    def for_server(self) -> tuple[Deployable, Settings]:
        """Return what suits the server, which says what its host is; not where what answers is what is wanted.

        Raises:
            TDeployError: See :func:`choose` and :meth:`Deployments.host`.
        """
        if self._settings.device:
            return self._chosen_for(lambda: None)
        if (known := host_of(self.before or {})) is not None:
            what, how = self._chosen_for(lambda: known)
            if self.deployments.answers(what, how):
                return what, how
        return self._chosen_for(lambda: self.deployments.host(self.name, create=self.before is None))

    @property
    def said(self) -> Settings:
        """What is said of the deployment, whichever version answers; how that one is served is not part of it."""
        settings = self._settings
        return Settings(settings.keep, settings.keep_loaded, settings.grace, config=self._record)

    @property
    def _record(self) -> str:
        return as_record({**self._remembered, **said(self.config)})

    @property
    def _remembered(self) -> Mapping[str, Any]:
        """What was said once counts until something else is said."""
        return (self.before or {}).get("config", {})

    @cached_property
    def _settings(self) -> DeploySettings:
        return DeploySettings.of(self.config, self._remembered)

    def _chosen_for(self, host: Callable[[], Fingerprint | None]) -> tuple[Deployable, Settings]:
        settings, coming = self._settings, self._next()
        what = choose(
            self.uri, settings, name=self.name, version=coming, flavor=self.flavor, host=host, known=self.known
        )
        options = served(settings, what, self.before)
        how = Settings(settings.keep, settings.keep_loaded, settings.grace, options, self._record)
        if not settings.version and self._is_deployed(what, how):
            what = replace(what, version=(self.before or {})["version"])
        return what, how

    def _is_deployed(self, what: Deployable, how: Settings) -> bool:
        """Tell whether this very model answers already, under whichever number it came."""
        before = self.before or {}
        same = before.get("key") == key_of(what, how)
        registered = registered_version(self.uri, known=True)  # else what is elsewhere now may be another model
        return same and (not registered or before.get("model_uri") == what.about["model_uri"])

    def _next(self) -> int:
        """Return a number for a model that has none of its own."""
        known = self.before
        return max(known["version"], *known["previous"], *known["ahead"], 0) + 1 if known else 1
