"""How much memory of the host a process takes that serves one variant alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.golden import GoldenRequest, dump, load
from mlflow_tdeploy.runtime.decision import Candidate
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.runtime.probe import run_child
from mlflow_tdeploy.store.bundle import Bundle

#: Seconds for opening a variant and answering: an engine, or gigabytes from a slow disk, may take minutes.
_TIMEOUT = 600.0
#: Arenas and thread pools have what they need after the first few.
_REQUESTS = 3
_TEXT, _ARRAYS = "request.json", "request.npz"
_STATUS = Path("/proc/self/status")
_SCRIPT = """
import sys
from mlflow_tdeploy.runtime.footprint import serve_alone
serve_alone(*sys.argv[1:])
"""


def footprint(bundle: Bundle, candidate: Candidate, request: Any) -> float | None:
    """Return the most memory of a process that opens a variant and answers a request a few times, in MiB.

    Args:
        bundle: The model, with the variant's files.
        candidate: The variant, and what opens it.
        request: Texts or images, or arrays by input name.

    Returns:
        Resident memory at its peak; None on hosts that do not tell (other than Linux).

    Raises:
        SessionError: It does not answer in a process of its own.
    """
    if not _STATUS.exists():
        return None
    with tempfile.TemporaryDirectory(prefix="tdeploy-memory-") as folder:
        text, arrays = dump((GoldenRequest(request, {}, {}, None),))  # nobody's answer: that form takes any request
        (Path(folder) / _TEXT).write_text(text, encoding="utf-8")
        (Path(folder) / _ARRAYS).write_bytes(arrays)
        place = (str(bundle.root), candidate.variant, candidate.runtime)
        done = run_child(_SCRIPT, *place, folder, timeout=_TIMEOUT)
    if not done.ok:
        raise SessionError(f"Variant '{candidate.variant}' does not serve in a process of its own: {done.reason}")
    return int(done.output.splitlines()[-1]) / 1024


def serve_alone(root: str, variant: str, runtime: str, folder: str) -> None:
    """Open a variant in this process, answer what lies in a folder, and print the most memory that took, in KiB.

    ``VmHWM`` and not ``ru_maxrss``, which a child begins with as its parent's.
    """
    with open_model(root, policy=Policy(variant, runtime, True)) as model:
        (whole,) = load((Path(folder) / _TEXT).read_text("utf-8"), (Path(folder) / _ARRAYS).read_bytes())
        for _ in range(_REQUESTS):
            model.predict(whole.inputs, model.task.usual)
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))  # noqa: T201 - what the child says
