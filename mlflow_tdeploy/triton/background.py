"""Triton servers of this host that outlive the command that started them, and what is remembered of each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    SessionError,
    StorageError,
    TDeployError,
)
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.core.records import from_json, to_json
from mlflow_tdeploy.store.disk import cache_home, own_folder, storage_errors
from mlflow_tdeploy.store.process import born
from mlflow_tdeploy.triton import docker
from mlflow_tdeploy.triton.home import Server, find_server
from mlflow_tdeploy.triton.listening import Listening
from mlflow_tdeploy.triton.local import (
    START_S,
    STOP_S,
    LocalTriton,
    end_process,
    launch,
    on_sigterm,
    remove_remains,
)

#: Triton's own ports for HTTP, gRPC and metrics, which clients ask when nobody says others.
USUAL_PORTS = (8000, 8001, 8002)
_RECORD = ".json"
#: Seconds in which the ports of a server that crashed become free.
_FREE_S = 5.0


@dataclass(frozen=True)
class Running:
    """A server that was started to last.

    Attributes:
        http: Port for HTTP on 127.0.0.1.
        grpc: Port for gRPC.
        metrics: Port for metrics.
        pid: Its process.
        born: When that began, in ticks since the host did: another process may have the number later.
        repository: What it serves.
        log: File of what it writes.
        region: Begins the names of what it has in shared memory.
        since: When it was started, UTC in ISO format.
        server: What it is.
        container: Name of its container; empty where it is in none.
    """

    http: int
    grpc: int
    metrics: int
    pid: int
    born: int
    repository: str
    log: str
    region: str
    since: str
    server: str
    container: str = ""

    @property
    def listening(self) -> Listening:
        """Where it listens."""
        return Listening(self.http, self.grpc, self.metrics, Path(self.log))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return born(self.pid) == self.born


def start(
    repository: Path | str,
    *,
    models: Iterable[str] = (),
    ports: Sequence[int] = (),
    server: Server | None = None,
    seconds: float = START_S,
) -> Running:
    """Start a server on 127.0.0.1 that outlives this process, until :func:`stop`.

    Args:
        repository: Folder of models, or the address of one in an object store as Triton writes it.
        models: Those to load at the start.
        ports: For HTTP, gRPC and metrics; Triton's usual ones otherwise, or free ones where one of them is taken.
        server: Which server; the one of this host when None.
        seconds: How long it may take to be ready.

    Raises:
        InvalidInputError: Two of the ports are the same.
        ConflictError: A server that was started here has that repository, or one of the ports.
        MissingDependencyError: There is no server on this host.
        SessionError: It cannot start: nothing of it is left.
        StorageError: Nothing can be remembered on this host.
    """
    if len(set(ports)) < len(ports):
        raise InvalidInputError(f"HTTP, gRPC and metrics need a port each, got {', '.join(map(str, ports))}.")
    how: dict[str, Any] = {"models": list(models), "server": server or find_server(), "seconds": seconds}
    folder, where = _folder(), _absolute(repository)
    with contextlib.ExitStack() as alone:
        alone.enter_context(_alone(folder))
        known = _ports_of_others(where, ports)
        usual = not ports and all(map(_is_free, USUAL_PORTS)) and not set(USUAL_PORTS) & set(known)
        return _start(where, USUAL_PORTS if usual else ports, how, begun=alone.close, may_move=usual)


def _ports_of_others(where: str, ports: Sequence[int]) -> list[int]:
    """Return the ports of servers that were started here, some of which may not listen yet.

    Raises:
        ConflictError: One of them has that repository or one of the wanted ports, or another program has one.
    """
    known = list[int]()
    for other in running():
        if not other.alive:
            stop(other)  # it has ended by itself: what it left goes
            continue
        if other.repository == where:
            raise ConflictError(f"'{where}' is served at {other.listening.url} already. Stop that one first.")
        if taken := set(ports) & {other.http, other.grpc, other.metrics}:
            raise ConflictError(f"Port {min(taken)} is that of another server. Stop it, or choose another port.")
        known += [other.http, other.grpc, other.metrics]  # it may not listen yet
    _require_free(ports)
    return known


def _start(
    where: str, ports: Sequence[int], how: dict[str, Any], *, begun: Callable[[], object], may_move: bool
) -> Running:
    """Start a server and remember it; what cannot start is forgotten.

    Args:
        where: Its repository.
        ports: The ports; free ones where there are none.
        how: For :func:`launch`.
        begun: Called once it is remembered: others may look then.
        may_move: Whether free ports will do where another program was quicker.
    """
    folder, made = _folder(), list[Running]()
    log = folder / f"{os.getpid()}-{time.time_ns()}.log"

    def remember(one: LocalTriton) -> None:  # before it is ready: whatever ends this process, the server is known
        _forget(made)
        made.append(_running(one, where, how["server"].description))
        with storage_errors(f"write below '{folder}'"):
            _record(made[-1]).write_text(to_json(made[-1]), encoding="utf-8")
        begun()

    try:
        with on_sigterm(end_process):
            try:
                launch(where, log, ports=ports, begun=remember, lasting=True, **how)
            except SessionError:
                if not may_move or all(map(_is_free, USUAL_PORTS)):
                    raise
                launch(where, log, begun=remember, lasting=True, **how)  # somebody was quicker
    except BaseException:
        _forget(made)
        log.unlink(missing_ok=True)
        raise
    return made[-1]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only one of this host that looks for servers and starts one."""
    import fcntl

    with storage_errors(f"write below '{folder}'"):
        file = (folder / ".lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_free(ports: Sequence[int]) -> None:
    """Wait until ports are free: processes of a server that crashed notice that after a moment.

    Raises:
        ConflictError: Another program has one of them.
    """
    end = time.monotonic() + _FREE_S
    while taken := [port for port in ports if not _is_free(port)]:
        if time.monotonic() > end:
            raise ConflictError(f"Port {taken[0]} is taken by another program. Choose another port.")
        time.sleep(0.1)


def _running(made: LocalTriton, repository: str, description: str) -> Running:
    return Running(
        made.http, made.grpc, made.metrics, made.process.pid, born(made.process.pid) or 0, repository, str(made.log),
        made.region, now(), description, made.container,
    )  # fmt: skip


def _forget(begun: list[Running]) -> None:
    """Remove what is remembered of servers that could not start and are gone."""
    while begun:
        _record(begun.pop()).unlink(missing_ok=True)


def running() -> list[Running]:
    """Return the servers that were started here and not stopped, by port; some may have ended by themselves."""
    found = []
    for path in sorted(_folder().glob(f"*{_RECORD}")):
        with contextlib.suppress(TDeployError, OSError):  # one that is not whole is nobody's
            found.append(from_json(Running, path.read_text(encoding="utf-8"), path.name))
    return sorted(found, key=lambda one: one.http)


def started_at(port: int, *, alive: bool = True) -> Running | None:
    """Return the server that was started here and listens on a port, or the last one that did; None for none."""
    found = (one for one in reversed(running()) if port in (one.http, one.grpc))
    return next((one for one in found if one.alive or not alive), None)


def stop(which: Running) -> None:
    """End a server and remove what is remembered of it, and what it left in shared memory; twice is fine.

    Raises:
        SessionError: It is somebody else's process, or does not end.
    """
    if which.alive:
        _end(which)
    remove_remains(which.region)
    docker.remove(which.container)
    Path(which.log).unlink(missing_ok=True)
    _record(which).unlink(missing_ok=True)


def chosen(port: int | None) -> Running:
    """Return the server that is meant by its port for HTTP, or the only one there is; one that runs before ended ones.

    Raises:
        NotFoundError: There is none, or it is not clear which.
    """
    found = running()
    if port is not None:
        found = [one for one in found if one.http == port]
    found = [one for one in found if one.alive] or found
    if len(found) == 1 or (found and port is not None):
        return found[-1]
    if not found:
        at = f" at port {port}" if port is not None else ""
        raise NotFoundError(f"No server was started here{at}. 'tdeploy triton start REPOSITORY' starts one.")
    raise NotFoundError(f"Say which: there are servers at the ports {', '.join(str(one.http) for one in found)}.")


def _end(which: Running) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            try:
                os.kill(which.pid, number)
            except PermissionError as error:
                raise SessionError(f"Process {which.pid} is somebody else's and cannot be ended.") from error
        end = time.monotonic() + STOP_S
        while time.monotonic() < end:
            if not which.alive:
                return
            time.sleep(0.02)
    raise SessionError(f"Triton (process {which.pid}) does not end.")


def _folder() -> Path:
    folder = own_folder("triton") / "started"
    if not folder.is_relative_to(cache_home()):
        raise StorageError(
            f"'{cache_home()}' cannot be written, so a server that lasts could not be found again. Set "
            f"TDEPLOY_CACHE_DIR to a folder of yours, or use 'tdeploy triton run'."
        )
    with storage_errors(f"make '{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _record(which: Running) -> Path:
    return _folder() / f"{which.pid}-{which.born}{_RECORD}"


def _absolute(repository: Path | str) -> str:
    return str(repository) if "://" in str(repository) else os.path.realpath(repository)


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
