"""Where a Triton server is on this host, and whether it can run here at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from mlflow_tdeploy.core.errors import ConflictError, MissingDependencyError, NotFoundError, SessionError
from mlflow_tdeploy.store.disk import link_or_copy, own_folder
from mlflow_tdeploy.store.staging import staged_directory
from mlflow_tdeploy.triton import docker

#: Environment variables: where NVIDIA's own installation is, and where the one that :func:`install` made.
TRITON_HOME, OWN_HOME = "TRITON_HOME", "TDEPLOY_TRITON_HOME"
#: The wheel with a whole server, and the numpy that its Python backend works with.
_WHEEL, _NUMPY = "nvidia-pytriton==0.7.0", "numpy==1.26.4"
_GLIBC = (2, 35)
_INSTALL = "tdeploy triton install"


@dataclass(frozen=True)
class Server:
    """A Triton server that is installed.

    Attributes:
        binary: The program.
        wheel: Folder of the wheel it is from; None for NVIDIA's own installation.
        numpy: Folder of the numpy that the wheel's Python backend needs.
        image: Container image that the program, docker, runs; empty for a server of this host.
    """

    binary: Path
    wheel: Path | None = None
    numpy: Path | None = None
    image: str = ""

    @property
    def description(self) -> str:
        """What to tell a user that this is."""
        if self.image:
            return f"{self.binary}, which runs the image {self.image}"
        if self.wheel is None:
            return f"{self.binary}"
        return f"{self.binary}, from the wheel {_WHEEL}: ONNX graphs run in a Python-based backend of this project"


def find_server() -> Server:
    """Return the server to use.

    The first that there is of: ``TRITON_HOME``, ``tritonserver`` on the path, the image that ``TDEPLOY_TRITON_IMAGE``
    names with docker, the wheel that was installed.

    Raises:
        MissingDependencyError: There is none.
    """
    if given := os.environ.get(TRITON_HOME):
        binary = Path(given) / "bin" / "tritonserver"
        if not binary.is_file():
            raise NotFoundError(f"{TRITON_HOME} is '{given}', and '{binary}' does not exist.")
        return Server(binary)
    if found := shutil.which("tritonserver"):
        return Server(Path(found))
    if image := os.environ.get(docker.IMAGE):
        return Server(Path(docker.find_docker()), image=image)
    home = own_home()
    binary = home / "wheel" / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    if not binary.is_file():
        raise MissingDependencyError(
            "tritonserver", "A local Triton", f"{_INSTALL} (or set {TRITON_HOME} or {docker.IMAGE})"
        )
    return Server(binary, home / "wheel", home / "numpy")


def own_home() -> Path:
    """Return the folder in which :func:`install` puts a server."""
    return Path(os.environ[OWN_HOME]) if os.environ.get(OWN_HOME) else own_folder("triton") / "server"


def install(home: Path | None = None) -> Path:
    """Put the wheel's server and what it needs into a folder of their own; nothing of this environment changes.

    The wheel pins numpy 1, which would replace that of a whole environment: so it is unpacked apart.

    Args:
        home: The folder; :func:`own_home` when None. One that is there already is left as it is.

    Raises:
        SessionError: pip failed; the folder does not exist then.
        ConflictError: The folder holds something else.
    """
    home = home or own_home()
    if (home / "wheel").is_dir():
        return home
    with contextlib.suppress(ConflictError), staged_directory(home) as fresh:  # another process may be as far
        for name, package in (("wheel", _WHEEL), ("numpy", _NUMPY)):
            target = str(fresh / name)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SessionError(f"pip cannot install {package}: {done.stderr.strip()[-400:]}")
    if not (home / "wheel").is_dir():
        raise ConflictError(
            f"'{home}' is not empty and holds no Triton. Empty it, or set {OWN_HOME} to another folder."
        )
    return home


def preflight(server: Server) -> None:
    """Make sure that a wheel's server can start models here: what is missing would be a hang, not an error.

    Raises:
        SessionError: Something is missing; says what to do.
    """
    if server.image:
        docker.require_image(str(server.binary), server.image)
    if server.wheel is None:
        return
    have = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2] if part.isdecimal())
    if have < _GLIBC:
        here = platform.libc_ver()[1] or "another C library"
        raise SessionError(f"The wheel's Triton needs glibc 2.35 or later, this host has {here}.")
    if not _stub(server.wheel).is_file():
        raise SessionError(
            f"The wheel's Triton has no Python backend for Python {_python()}: run it with Python 3.8 to 3.13."
        )
    if server.numpy is None or not (server.numpy / "numpy").is_dir():
        raise SessionError(f"'{server.numpy}' holds no numpy, which Triton's Python backend needs. Run: {_INSTALL}")
    library = sysconfig.get_config_var("LDLIBRARY") or ""
    if not (Path(sysconfig.get_config_var("LIBDIR") or "/") / library).is_file() or not library.endswith(".so"):
        raise SessionError(
            f"This Python ({sys.executable}) has no shared libpython, without which a Triton model would never finish "
            f"loading. Use a Python that was built with --enable-shared."
        )


def environment(server: Server) -> dict[str, str]:
    """Return the environment to start a server in."""
    found = dict(os.environ)
    if server.wheel is not None:
        libraries = [str(server.wheel / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        found["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [found.get("LD_LIBRARY_PATH")])])
        # the stub starts the python3 that it finds: it must be this one, with this one's packages
        found["PATH"] = os.pathsep.join([str(_interpreter(server) / "bin"), found.get("PATH", "")])
    return found


@functools.cache
def _interpreter(server: Server) -> Path:
    """Return a virtual environment of this Python with all packages that are here, but for the numpy that works there.

    With numpy 2, that server's Python backend returns no output, and models of users import it, too.
    """
    wheel, here = server.wheel or Path(), site.getsitepackages()
    lines = [str(server.numpy), *(f"import site; site.addsitedir({folder!r})" for folder in here)]
    key = hashlib.sha256("\n".join([sys.executable, *lines]).encode()).hexdigest()[:8]
    target = wheel.parent / f"python-{_python()}-{key}"
    if target.is_dir():
        return target
    with contextlib.suppress(ConflictError), staged_directory(target) as fresh:  # another process may be as far
        venv.create(fresh, symlinks=True)
        (fresh / "lib" / f"python{_python()}" / "site-packages" / "tdeploy.pth").write_text("\n".join(lines) + "\n")
    return target


def backends(server: Server) -> Path | None:
    """Return the folder of backends for a wheel's server, put together once; None for the server's own."""
    return None if server.wheel is None else _put_together(server.wheel)


@functools.cache
def _put_together(wheel: Path) -> Path:
    own = importlib.resources.files("mlflow_tdeploy.triton") / "backends" / "onnxruntime" / "model.py"
    content = own.read_bytes()
    target = wheel.parent / f"backends-{_python()}-{hashlib.sha256(content).hexdigest()[:8]}"
    if target.is_dir():
        return target
    with contextlib.suppress(ConflictError), staged_directory(target) as fresh:  # another process may be as far
        (fresh / "python").mkdir()
        (fresh / "onnxruntime").mkdir()
        for source in [*(wheel / "pytriton/tritonserver/backends/python").glob("*.*"), _stub(wheel)]:
            link_or_copy(source, fresh / "python" / source.name)
        (fresh / "onnxruntime" / "model.py").write_bytes(content)
    return target


def _stub(wheel: Path) -> Path:
    return wheel / "pytriton" / "tritonserver" / "python_backend_stubs" / _python() / "triton_python_backend_stub"


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
