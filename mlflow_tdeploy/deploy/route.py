"""Which version answers to a deployment's stable name, and which can answer again at once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow_tdeploy.core.errors import IntegrityError, TDeployError
from mlflow_tdeploy.core.records import from_json
from mlflow_tdeploy.core.rollout import Rollout
from mlflow_tdeploy.deploy.plan import Settings

#: So many versions that are gone are remembered.
_MOST_GONE = 8


def record(text: str) -> dict[str, Any]:
    """Return what a parameter says as JSON; nothing where that is no record."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    return {}


@dataclass(frozen=True)
class Route:
    """What a stable name's configuration says.

    Attributes:
        active: The version that answers.
        previous: Those that are kept for going back to, the last one first.
        ahead: Those that were gone back from, the nearest first; kept until another version comes.
        changed: When it was changed, UTC in ISO format.
        by: Who changed it.
        config: What was said about the deployment, as JSON.
        keep_loaded: Whether versions that are kept stay loaded.
        rollout: The version that is tried out beside the one that answers, as JSON of a
            :class:`mlflow_tdeploy.core.rollout.Rollout`; empty for none.
        gone: Versions that were kept and are not any more, the last one first: a server that was away may have them
            loaded still, though another one of the same repository has removed their files.
    """

    active: int
    previous: tuple[int, ...] = ()
    changed: str = ""
    by: str = ""
    ahead: tuple[int, ...] = ()
    config: str = "{}"
    keep_loaded: bool = True
    rollout: str = ""
    gone: tuple[int, ...] = ()

    @property
    def said(self) -> dict[str, Any]:
        """What was said about the deployment; nothing where that cannot be read."""
        return record(self.config)

    @property
    def tried_out(self) -> Rollout | None:
        """The version that is tried out; None where none is, or where that cannot be read."""
        with contextlib.suppress(TDeployError):
            return from_json(Rollout, self.rollout, "the rollout") if self.rollout else None
        return None

    @property
    def kept(self) -> tuple[int, ...]:
        """Every version that is to stay."""
        return (self.active, *self.previous, *self.ahead)

    def back_from(self, serving: int | None) -> int | None:
        """Return the version to go back to where nobody says which; None where there is none.

        Args:
            serving: The version that the server answers with; another one than :attr:`active` after a kill.
        """
        there = self.interrupted(serving)
        return there if there is not None else next(iter(self.previous), None)

    def interrupted(self, serving: int | None) -> int | None:
        """Return the version that going back leads to where a change of the route was interrupted; None where not.

        Args:
            serving: See :meth:`back_from`.
        """
        if serving in self.ahead:
            return self.active  # going back was
        return serving if serving in self.previous else None  # bringing a version was: the one before answers still

    def switched(self, version: int, settings: Settings, changed: str, by: str) -> Route:
        """Return the route to another version, with as many kept as wanted; to the same one it stays as it is.

        What was gone back from goes: going back again from another version shall not lead there.
        """
        rest = tuple(one for one in (self.active, *self.previous) if one != version)
        ahead = self.ahead if version == self.active else ()
        new = Route(version, rest[: settings.keep], changed, by, ahead, settings.config, settings.keep_loaded)
        past = dict.fromkeys((*rest, *self.ahead, *self.gone))
        return replace(new, gone=tuple(one for one in past if one not in new.kept)[:_MOST_GONE])

    def moved(self, version: int, changed: str, by: str) -> Route:
        """Return the route to a version that is kept; what is kept stays so, in the order of age."""
        line = (*reversed(self.previous), self.active, *self.ahead)
        place = line.index(version)
        before, ahead = tuple(reversed(line[:place])), line[place + 1 :]
        return Route(version, before, changed, by, ahead, self.config, self.keep_loaded, gone=self.gone)

    def parameters(self) -> dict[str, str]:
        """Return it as parameters of a configuration."""
        rollout = {"rollout": self.rollout} if self.rollout else {}
        gone = {"gone": json.dumps(self.gone)} if self.gone else {}
        return {
            **rollout,
            **gone,
            "ahead": json.dumps(self.ahead),
            "active": str(self.active),
            "previous": json.dumps(self.previous),
            "changed": self.changed,
            "by": self.by,
            "config": self.config,
            "keep_loaded": json.dumps(self.keep_loaded),
        }

    @classmethod
    def of(cls, parameters: Mapping[str, Any], where: str) -> Route:
        """Read it back.

        Raises:
            IntegrityError: The parameters say no route.
        """
        try:
            previous, ahead, gone = (
                tuple(int(one) for one in json.loads(parameters.get(key) or "[]"))
                for key in ("previous", "ahead", "gone")
            )
            changed, by = (str(parameters.get(key, "")) for key in ("changed", "by"))
            config, loaded = str(parameters.get("config") or "{}"), parameters.get("keep_loaded") != "false"
            rollout = str(parameters.get("rollout", ""))
            return cls(int(parameters["active"]), previous, changed, by, ahead, config, loaded, rollout, gone)
        except (LookupError, ValueError, TypeError) as error:
            raise IntegrityError(
                f"{where} says no route ({error!r}), so what serves is not known. Delete the deployment and create "
                f"it again."
            ) from error
