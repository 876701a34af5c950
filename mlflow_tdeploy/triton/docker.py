"""Triton from a container image, for hosts that have docker and no server of their own.

https://github.com/triton-inference-server/server/blob/main/docs/getting_started/quickstart.md
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence

from mlflow_tdeploy.core.errors import MissingDependencyError, SessionError
from mlflow_tdeploy.runtime import probe

#: Environment variable that names the image, for example one of NVIDIA's ``tritonserver`` images.
IMAGE = "TDEPLOY_TRITON_IMAGE"
#: What its Python backend needs of shared memory.
_SHARED_MEMORY = "1g"
#: Variables that a repository in an object store wants; their values are in no command line.
_PASSED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION")
_TIMEOUT_S = 60.0


def find_docker() -> str:
    """Return the program.

    Raises:
        MissingDependencyError: There is none.
    """
    if found := shutil.which("docker"):
        return found
    raise MissingDependencyError("docker", f"The Triton image of {IMAGE}", "your system's package of docker")


def require_image(docker: str, image: str) -> None:
    """Make sure that an image is here: it has many gigabytes, and nobody shall wait for them by surprise.

    Raises:
        SessionError: It is not, or docker does not answer.
    """
    done = _run(docker, "image", "inspect", "--format", "{{.Id}}", image)
    if done.returncode:
        raise SessionError(
            f"docker has no image '{image}' ({done.stderr.strip() or 'it does not say why'}). Get it with: docker pull "
            f"{image}"
        )


def command(docker: str, image: str, container: str, repository: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs Triton in the foreground.

    Args:
        docker: The program.
        image: The image.
        container: Name of the container.
        repository: Folder of models, which the container has at the same place, or an address.
        arguments: Those of ``tritonserver``.
    """
    mount = [] if "://" in repository else ["--volume", f"{repository}:{repository}:ro"]
    gpus = ["--gpus", "all"] if probe.gpu()[0] is not None else []
    passed = [part for name in _PASSED if name in os.environ for part in ("--env", name)]
    return [
        *(docker, "run", "--rm", "--name", container, "--network", "host", "--shm-size", _SHARED_MEMORY),
        *(*gpus, *mount, *passed, image, "tritonserver", *arguments),
    ]


def remove(container: str) -> None:
    """Remove a container whose client may have been killed; one that is gone is fine."""
    if container and (docker := shutil.which("docker")):
        with contextlib.suppress(SessionError):
            _run(docker, "rm", "--force", container)


def _run(docker: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([docker, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SessionError(f"docker does not answer: {error}") from error
