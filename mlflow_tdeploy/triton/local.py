"""A Triton server on this host, for as long as somebody wants it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.store.staging import workspace
from mlflow_tdeploy.triton import docker
from mlflow_tdeploy.triton.home import Server, backends, environment, find_server, preflight
from mlflow_tdeploy.triton.listening import Listening

#: Ends the server with the thread that started it (prctl PR_SET_PDEATHSIG), whatever becomes of that.
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Triton puts it
_ATTEMPTS = 3
#: What a process of a Python model runs; its arguments begin with the name of its shared memory.
_STUB = b"triton_python_backend_stub"
#: Seconds that a Python process of the server may take to start: usually less than one, 30 where nobody says so.
_STUB_S = 300
#: Seconds after which whoever answers is taken for the server, where its log does not say so in words that are known.
_UNSAID_S = 30.0
#: Seconds until a server that was told to end is killed, and until one that starts must be ready.
STOP_S, START_S = 10.0, 60.0


@dataclass(frozen=True)
class LocalTriton(Listening):
    """A server that this process started.

    Attributes:
        process: Its process.
        region: Begins the names of what it has in shared memory.
        container: Name of its container; empty where it is in none.
    """

    process: subprocess.Popen[bytes]
    region: str
    container: str = ""

    def wait(self, seconds: float | None = None) -> None:
        """Wait until this process is told to end (Ctrl-C, or SIGTERM as by a supervisor), or for so long.

        Args:
            seconds: How long at most; None for ever.

        Raises:
            SessionError: The server ended by itself.
        """
        end, told = None if seconds is None else time.monotonic() + seconds, list[int]()
        with on_sigterm(told.append), contextlib.suppress(KeyboardInterrupt):
            while not told and (end is None or time.monotonic() < end):
                if self.process.poll() is not None:
                    raise SessionError(f"Triton ended by itself: {self.last_error() or 'it does not say why'}")
                time.sleep(0.1)

    def stop(self) -> None:
        """End it, and what it left in shared memory; ending it twice is fine."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        remove_remains(self.region)
        docker.remove(self.container)


@contextmanager
def on_sigterm(do: Callable[[int], object]) -> Iterator[None]:
    """Do something in a block where this process is told to end by SIGTERM; who listened before does again after it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may listen
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: do(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def end_process(number: int) -> None:
    """Leave as by Ctrl-C, so that what was begun is taken back: ``timeout`` and cancelled jobs send SIGTERM."""
    raise SystemExit(128 + number)


def remove_remains(region: str) -> None:
    """Remove what a server that has ended left: processes of its Python models, and files in shared memory.

    A process that had just been started when the server ended does not notice that it has.
    """
    end = time.monotonic() + STOP_S
    while (left := _processes_with(region)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)  # on a busy host it takes a moment to end, and has its shared memory until then
    for path in _SHARED_MEMORY.glob(f"{region}*"):
        path.unlink(missing_ok=True)


def _processes_with(region: str) -> list[int]:
    """Return the processes of Python models whose command line names a region of shared memory."""
    found, wanted = list[int](), f"\0{region}".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if region and wanted in line and _STUB in line:
                found.append(int(path.parent.name))
    return found


@contextmanager
def local_triton(
    repository: Path | str, *, models: Iterable[str] = (), server: Server | None = None, seconds: float = START_S
) -> Iterator[LocalTriton]:
    """Run a server on free ports of 127.0.0.1 for the length of a block.

    Models are loaded when they are asked for (``--model-control-mode explicit``), and their configurations are taken as
    they are written.

    Args:
        repository: Folder of models, or the address of one in an object store as Triton writes it.
        models: Those to load at the start.
        server: Which server; the one of this host when None.
        seconds: How long it may take to be ready.

    Raises:
        MissingDependencyError: There is no server on this host.
        SessionError: It cannot start.
    """
    with workspace() as folder, on_sigterm(end_process):  # until somebody waits: see LocalTriton.wait
        running = launch(repository, folder / "log", models=models, server=server, seconds=seconds)
        try:
            yield running
        finally:
            running.stop()


def launch(
    repository: Path | str,
    log: Path,
    *,
    models: Iterable[str] = (),
    server: Server | None = None,
    seconds: float = START_S,
    ports: Sequence[int] = (),
    lasting: bool = False,
    begun: Callable[[LocalTriton], None] | None = None,
) -> LocalTriton:
    """Start a server and wait until it is ready; one that cannot start leaves nothing but its log.

    Args:
        repository: As for :func:`local_triton`.
        log: File for what it writes.
        models: Those to load at the start.
        server: Which server; the one of this host when None.
        seconds: How long it may take to be ready.
        ports: For HTTP, gRPC and metrics; free ones otherwise.
        lasting: It outlives the process that starts it.
        begun: Called with each process that was started, before it is waited for.

    Raises:
        MissingDependencyError: There is no server on this host.
        SessionError: It cannot start.
    """
    server = server or find_server()
    preflight(server)
    region, wanted = f"tdeploy-{os.getpid()}-{secrets.token_hex(4)}-", list(models)
    for attempt in range(_ATTEMPTS):
        http, grpc, metrics = chosen = tuple(ports) or _free_ports(3)
        command = _command(server, str(repository), wanted, chosen, region)
        if not lasting:
            command = [sys.executable, "-c", _LAUNCH, *command]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment(server),
                start_new_session=lasting,
            )
        running = LocalTriton(http, grpc, metrics, log, process, region, _container(server, region))
        try:
            if begun:
                begun(running)
            _wait(running, seconds)
            return running
        except BaseException as error:
            running.stop()
            if not isinstance(error, SessionError):  # somebody has interrupted
                raise
            taken = not ports and "Address already in use" in running.written()
            if not taken or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _command(server: Server, repository: str, models: list[str], ports: Sequence[int], region: str) -> list[str]:
    http, grpc, metrics = map(str, ports)
    where = repository if "://" in repository else str(Path(repository).absolute())
    options = {
        "model-repository": where, "model-control-mode": "explicit", "http-address": "127.0.0.1",
        "http-port": http, "grpc-address": "127.0.0.1", "grpc-port": grpc, "metrics-address": "127.0.0.1",
        "metrics-port": metrics, "backend-config": f"python,shm-region-prefix-name={region}",
    }  # fmt: skip
    if (folder := backends(server)) is not None:
        options["backend-directory"] = str(folder)
    # where a busy host needs longer than this for a Python process, the server waits for it for ever
    patience = f"--backend-config=python,stub-timeout-seconds={_STUB_S}"
    arguments = [patience, *(f"--{name}={value}" for name, value in options.items())]
    arguments += [f"--load-model={name}" for name in models]
    arguments.append("--disable-auto-complete-config")
    if server.image:
        return docker.command(str(server.binary), server.image, _container(server, region), where, arguments)
    return [str(server.binary), *arguments]


def _container(server: Server, region: str) -> str:
    return region.rstrip("-") if server.image else ""


def _wait(running: LocalTriton, seconds: float) -> None:
    end, since = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        if running.process.poll() is not None:
            why = "; ".join(running.last_errors(3)) or running.written()[-400:]
            raise SessionError(f"Triton ended with {running.process.returncode} while it started: {why}")
        if running.ready:  # it, unless another one has the port
            since = since or time.monotonic()
            if running.listens or time.monotonic() - since > _UNSAID_S:
                return
        time.sleep(0.02)
    raise SessionError(f"Triton is not ready after {seconds:.0f} s. {running.last_error()}".strip())


def _free_ports(count: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(one.getsockname()[1] for one in sockets)
