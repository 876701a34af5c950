"""What answers on a target's servers; read from them and their repositories, every time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_tdeploy.core.errors import NotFoundError, first_line
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.manifest import MANIFEST, Manifest
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.files import open_files
from mlflow_tdeploy.deploy.server_host import host_of
from mlflow_tdeploy.promotion.compatible import Asked
from mlflow_tdeploy.promotion.spec import Server, Target
from mlflow_tdeploy.triton.client import Connection, TritonClient


@dataclass(frozen=True)
class Observed:
    """What is known of a stable name on one server.

    Attributes:
        server: Its address.
        name: The stable name.
        reachable: Whether the server answers; what its repository says is known all the same.
        described: What is deployed, as :meth:`State.describe` tells it; empty where nothing of ours is.
        why: Why it is not known, in one line.
        ends: How often in a row the server went away while a version came, by version.
    """

    server: str
    name: str
    reachable: bool = True
    described: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    ends: Mapping[int, int] = field(default_factory=dict)

    @property
    def version(self) -> int | None:
        """The version that is deployed, as the repository says; None for none."""
        return self.described.get("version")

    @property
    def silent(self) -> bool:
        """Whether the server is there and a version is deployed, and none answers: it came back empty, say."""
        return self.reachable and self.version is not None and self.described.get("answers") is None

    @property
    def kept(self) -> tuple[int, ...]:
        """The versions that can answer again: they have passed everything when they came."""
        return tuple(int(one) for key in ("previous", "ahead") for one in self.described.get(key, ()))

    @property
    def host(self) -> Fingerprint | None:
        """What the server's host was when it was last asked."""
        return host_of(self.described)

    def says(self, key: str) -> str:
        """Return what the version's configuration says of itself; empty for nothing."""
        return str(self.described.get(key, ""))


def deployments_at(target: Target, server: Server) -> Deployments:
    """Return the deployments of one server of a target."""
    connection = Connection(server.url, target.token.get_secret_value(), target.ca, target.timeout)
    return Deployments(TritonClient(connection), open_files(target.repository_of(server)))


def asked_at(target: Target, server: Server, name: str, version: int) -> tuple[Asked | None, str]:
    """Return what a version takes and answers that is deployed, and which model it is, as lies beside its front.

    Returns:
        None where that cannot be told, and the sum of its manifest; empty where there is none.
    """
    try:
        content = open_files(target.repository_of(server)).read(f"{name}/{version}/{MANIFEST}")
        manifest = Manifest.read(content, MANIFEST) if content else None
    except Exception:  # a Triton model as it is, a damaged file, a store that refuses
        return None, ""
    if not content or manifest is None:
        return None, ""
    return Asked(manifest.task, manifest.task_config, manifest.signature), sum_of_manifest(content)


def published_at(target: Target, server: Server, name: str, version: int) -> dict[str, str]:
    """Return what a version that is deployed says of itself in the repository; nothing where that cannot be known."""
    try:
        return deployments_at(target, server).published(f"{name}.v{version}")
    except Exception:  # as above
        return {}


def sum_of_manifest(content: bytes) -> str:
    """Return what tells a model as it was logged from every other one: nothing that is added later changes it."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class There:
    """What is known of a server, whatever it serves.

    Attributes:
        live: Whether it answers; None where it cannot be asked.
        has: Models that it has loaded, or is loading; None where it does not say.
    """

    live: bool | None
    has: frozenset[str] | None = None

    def lost(self, name: str, deployed: int | None) -> bool:
        """Tell whether it has nothing at all, as one that was started anew, or not what is deployed under a name."""
        if self.has is None:
            return False
        return not self.has or (deployed is not None and f"{name}.v{deployed}" not in self.has)


def ask_server(target: Target, server: Server) -> There:
    """Ask a server once; one that hangs takes as long as is said of it."""
    live = None
    with contextlib.suppress(Exception):  # who looks at what is deployed there finds out, and says why
        client = deployments_at(target, server).client
        live = client.live()
        return There(live, frozenset(one.name for one in client.models() if one.is_there) if live else None)
    return There(live)


def observe(target: Target, server: Server, name: str, *, live: bool | None = None) -> Observed:
    """Return what is known of a stable name on one server; whatever is wrong there is said, not raised.

    Args:
        target: The target.
        server: The server.
        name: The stable name.
        live: Whether the server answers, where that is known.
    """
    try:
        found = deployments_at(target, server)
        reachable = found.client.live() if live is None else live
        try:
            described = found.describe(name, live=reachable)
        except NotFoundError:
            described = {}
        return Observed(server.url, name, reachable, described, "" if reachable else "the server does not answer")
    except Exception as error:  # a folder that cannot be read, a store that refuses: that is of this place alone
        return Observed(server.url, name, reachable=False, why=first_line(error))
