"""What a call to bring a version shall do, and what it has done."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from mlflow_tdeploy.deploy.publish import Sent
from mlflow_tdeploy.triton.options import TritonOptions
from mlflow_tdeploy.triton.repository import Deployable


@dataclass(frozen=True)
class Settings:
    """How deployments are changed.

    Attributes:
        keep: Versions that stay for going back to.
        keep_loaded: Whether they stay loaded; else their files do, and going back loads them.
        grace: Seconds that a version which is not kept stays after the switch, for requests that it has.
        options: How Triton serves the model.
        config: What was said, as JSON, to be remembered with the deployment.
    """

    keep: int = 1
    keep_loaded: bool = True
    grace: float = 1.0
    options: TritonOptions = field(default_factory=TritonOptions)
    config: str = "{}"


@dataclass(frozen=True)
class Deployed:
    """What a call has done.

    Attributes:
        name: The deployment.
        version: The version that answers now.
        before: The version that answered before; None for a new deployment.
        changed: Whether anything was changed.
        sent: What was moved.
        seconds: How long it took.
        seen: What was seen when it was tried out, in one line; empty where it was not.
    """

    name: str
    version: int
    before: int | None
    changed: bool
    sent: Sent
    seconds: float
    seen: str = ""


def key_of(what: Deployable, settings: Settings) -> str:
    """Return what a version is made of: the same key, the same files and configuration."""
    return hashlib.sha256(what.made_of(settings.options).encode()).hexdigest()[:32]
