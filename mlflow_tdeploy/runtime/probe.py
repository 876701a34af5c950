"""What this host is. Whatever may kill a process is tried in a child first.

A CUDA driver that is broken can end the process that loads it, and ``onnxruntime.get_available_providers()``
lists GPU providers on hosts without a GPU: so the driver itself is asked, in a child.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mlflow_tdeploy.core import gpu_driver
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu, host_cpu, installed_version
from mlflow_tdeploy.runtime.base import RUNTIMES

#: What answers depend on, whichever runtime computes them.
_LIBRARIES = ("transformers", "tokenizers", "numpy", "mlflow")
_DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")
_TIMEOUT = 60.0
#: Begins the reason of a child that did not end by itself.
KILLED = "killed by"
_GPU_SCRIPT = Path(gpu_driver.__file__)

_RUNTIME_SCRIPT = (
    "import sys\nfrom mlflow_tdeploy.runtime.base import RUNTIMES\nprint(RUNTIMES.get(sys.argv[1])().self_test())"
)


@dataclass(frozen=True)
class ChildResult:
    """How a child process ended.

    Attributes:
        ok: Whether it exited with 0.
        output: What it printed, stripped.
        reason: Why it failed, as one line; empty when it did not.
    """

    ok: bool
    output: str
    reason: str = ""


@functools.cache
def host() -> Fingerprint:
    """Return this host's whole fingerprint: CPU, GPU, library versions. Computed once per process."""
    return dataclasses.replace(hardware(), software=library_versions())


@functools.cache
def hardware() -> Fingerprint:
    """Return this host's fingerprint without library versions: those take longer to look up than all else here."""
    return dataclasses.replace(host_cpu(), gpu=gpu()[0])


def library_versions() -> dict[str, str]:
    """Return the versions of installed libraries that matter here, those of the runtimes first; imports none."""
    names = [name for runtime in RUNTIMES for name in runtime.distributions]
    return {name: version for name in (*names, *_LIBRARIES) if (version := installed_version(name)) is not None}


@functools.cache
def gpu() -> tuple[Gpu | None, str]:
    """Return the first NVIDIA GPU, or None and why there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None, "CUDA_VISIBLE_DEVICES hides every device"
    if not any(Path(node).exists() for node in _DEVICE_NODES):
        return None, "no NVIDIA device on this host"
    result = run_child(_GPU_SCRIPT.read_text(encoding="utf-8"))
    if not result.ok:
        return None, result.reason
    return Gpu(**json.loads(result.output.splitlines()[-1])), ""


def gpu_uuid() -> str:
    """Return the UUID of that GPU, for whoever finds GPUs by it; empty where its driver does not say."""
    if gpu()[0] is None:
        return ""
    result = run_child(_GPU_SCRIPT.read_text(encoding="utf-8"), "uuid")
    return result.output.splitlines()[-1] if result.ok and result.output else ""


def self_test(runtime: str) -> ChildResult:
    """Exercise a runtime in a child process."""
    return run_child(_RUNTIME_SCRIPT, runtime)


def run_child(script: str, *arguments: str, timeout: float = _TIMEOUT) -> ChildResult:
    """Run Python code in a child process; a crash there is an answer, not an accident.

    Args:
        script: The code.
        arguments: Its ``sys.argv[1:]``.
        timeout: Seconds after which it is killed.
    """
    # not from the working directory, as "-c" would: whatever json.py lies there is not ours
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True, text=True, timeout=timeout, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return ChildResult(False, "", f"no answer within {timeout:.0f} s")
    except OSError as error:
        return ChildResult(False, "", f"cannot start a child process: {error}")
    if done.returncode == 0:
        return ChildResult(True, done.stdout.strip())
    return ChildResult(False, done.stdout.strip(), _why(done.returncode, done.stderr))


def _why(code: int, stderr: str) -> str:
    if code < 0:
        try:
            return f"{KILLED} {signal.Signals(-code).name}"
        except ValueError:
            return f"{KILLED} signal {-code}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {code}"
