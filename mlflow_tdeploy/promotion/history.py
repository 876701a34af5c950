"""Who promoted what, when and why: tags of the model versions, in the registry, where people look.

Nothing is decided from them. ``tdeploy.history.<time>-<id>`` is an event as JSON, the newest ones of a version are
kept; ``tdeploy.<target>.<name>`` says in words what a version is there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import TDeployError, first_line
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.core.records import from_json, to_plain
from mlflow_tdeploy.deploy.back import user_name
from mlflow_tdeploy.promotion.registry import versions_of

_log = logging.getLogger("mlflow_tdeploy")
_PREFIX = "tdeploy.history."
#: Events of a version that are kept: the registry sends all tags with each look at a model.
_KEPT = 20
_LONGEST = 1000  # characters of a reason

Decision = Literal["deployed", "rolled back", "refused", "failed", "taken back"]
_SERVES = ("deployed", "rolled back")


@dataclass(frozen=True)
class Event:
    """Something that was decided about a version on a target.

    Attributes:
        at: When, UTC in ISO format.
        by: Who: user and host.
        trigger: What was called: ``apply``, ``promote``, ``rollback`` or ``watch``.
        target: The target.
        name: The stable name there.
        model: The registered model.
        version: Its version.
        decision: ``deployed`` and ``rolled back``: it answers. ``refused``: a gate, before anything moved. ``failed``:
            what served serves on. ``taken back``: as another target failed.
        why: In one line.
        before: The version that answered before.
        variant: The variant that was to answer.
        seconds: How long it took.
        servers: On which servers of the target.
    """

    at: str
    by: str
    trigger: str
    target: str
    name: str
    model: str
    version: int
    decision: Decision
    why: str = ""
    before: int | None = None
    variant: str = ""
    seconds: float = 0.0
    servers: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What people read at the version."""
        at, by = f"{self.at[:19]} UTC".replace("T", " ", 1), f"by {self.by} ({self.trigger})"
        if self.decision in _SERVES:
            return f"serves since {at}, {by}: {self.variant or 'its variant'}"
        return f"{self.decision} {at}, {by}: {self.why}"

    def repeats(self, other: Event) -> bool:
        """Tell whether it says what another one said, only later."""
        mine, others = (replace(one, at="", by="", trigger="", seconds=0.0) for one in (self, other))
        new = self.decision in _SERVES and self.before != self.version  # else it answers again, as so often
        return not new and mine == others


def who() -> str:
    """Return who does this: user and host."""
    return f"{user_name()}@{socket.gethostname()}"


class History:
    """The events of registered models.

    Args:
        client: The registry; the current one by default.
    """

    def __init__(self, client: MlflowClient | None = None) -> None:
        self._client = client or MlflowClient()

    def add(self, events: Iterable[Event]) -> None:
        """Write events down; a registry that refuses is warned of, as what was done is done."""
        for event in events:
            try:
                self._add(event)
            except MlflowException as error:
                _log.warning(
                    "What became of version %s of '%s' could not be written to the registry: %s", event.version,
                    event.model, first_line(error),
                )  # fmt: skip

    def of(self, model: str, most: int = 50) -> tuple[Event, ...]:
        """Return the newest events of a registered model, the newest first.

        Raises:
            MlflowException: There is no such model, or the registry does not answer.
        """
        self._client.get_registered_model(model)
        found = [event for one in versions_of(self._client, model) for event in _events(one.tags).values()]
        return tuple(sorted(found, key=lambda one: one.at, reverse=True)[:most])

    def _add(self, event: Event) -> None:
        event = replace(event, why=event.why[:_LONGEST])
        model, version = event.model, str(event.version)
        known = _events(self._client.get_model_version(model, version).tags)
        about = [one for one in known.values() if (one.target, one.name) == (event.target, event.name)]
        if about and event.repeats(max(about, key=lambda one: one.at)):
            return
        stamp = re.sub(r"[^0-9T]", "", event.at.partition("+")[0])
        self._tag(model, version, f"{_PREFIX}{stamp}-{secrets.token_hex(2)}", json.dumps(to_plain(event)))
        self._tag(model, version, f"tdeploy.{event.target}.{event.name}", event.said)
        for key in sorted(known)[: max(0, len(known) + 1 - _KEPT)]:
            self._client.delete_model_version_tag(model, version, key)
        if event.decision in _SERVES and event.before not in (None, event.version):
            gone = f"served until {event.at[:19]} UTC, then version {version}".replace("T", " ", 1)
            with contextlib.suppress(MlflowException):  # it may have been deleted, or the model be another one
                self._tag(model, str(event.before), f"tdeploy.{event.target}.{event.name}", gone)

    def _tag(self, model: str, version: str, key: str, value: str) -> None:
        self._client.set_model_version_tag(model, version, key, value)


def _events(tags: Mapping[str, str]) -> dict[str, Event]:
    """Return the events in the tags of a version; what cannot be read was not written here, and is left alone."""
    found = {}
    for key, value in tags.items():
        if key.startswith(_PREFIX):
            try:
                found[key] = from_json(Event, value, key)
            except TDeployError as error:
                _log.debug("%s is no event: %s", key, error)
    return found


def event(trigger: str, target: str, name: str, model: str, version: int, decision: Decision, **more: object) -> Event:
    """Return something that is decided now, by who runs this."""
    return Event(now(), who(), trigger, target, name, model, version, decision, **more)  # type: ignore[arg-type]
