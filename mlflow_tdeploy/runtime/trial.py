"""Opening that may end the process is tried in another one first; what went well once is not tried again.

A plan for another GPU, a driver that is too old or a damaged library can kill whoever opens an engine: then the child
is dead, and this process goes on with the next candidate.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import SessionError, TDeployError
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.decision import Candidate
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.disk import own_folder, write_once

_log = logging.getLogger("mlflow_tdeploy")

#: What the child runs.
SCRIPT = "import sys\nfrom mlflow_tdeploy.runtime.trial import attempt\nattempt(sys.argv[1])"
#: Seconds that it may take: TensorRT-RTX compiles an engine when it is first opened.
TIMEOUT = 600.0
_FOLDER = "trials"


def require_trial(bundle: Bundle, candidate: Candidate, options: SessionOptions) -> None:
    """Make sure that opening a candidate does not end a process, if its runtime might.

    Raises:
        SessionError: It did, or the child says why it cannot be opened.
    """
    runtime = RUNTIMES.get(candidate.runtime)()
    if not runtime.risky:
        return
    note = own_folder(_FOLDER) / f"{_key(bundle, candidate, options, runtime.version())}.json"
    if note.exists():
        return
    begin = time.monotonic()
    told = {"root": str(bundle.root), "variant": candidate.variant, "runtime": candidate.runtime, **_told(options)}
    result = probe.run_child(SCRIPT, json.dumps(told), timeout=TIMEOUT)
    if not result.ok:
        raise SessionError(f"it was tried in a process of its own first: {result.reason}")
    _log.info("Variant %s opens here: tried in %.1f s.", candidate.variant, time.monotonic() - begin)
    _remember(note, told)


def attempt(told: str) -> None:
    """Open what a parent process is about to open, and let it answer a golden request; runs in the child.

    Args:
        told: JSON of what to open.
    """
    from mlflow_tdeploy.runtime.base import Fit
    from mlflow_tdeploy.runtime.sessions import Opener

    values = json.loads(told)
    bundle = Bundle.open(Path(values["root"]))
    candidate = Candidate(values["variant"], values["runtime"], Fit.USABLE, "")
    options = SessionOptions(**values["options"])
    Opener.of(bundle, tried=True).open(candidate, options).close()


def _told(options: SessionOptions) -> dict[str, Any]:
    return {"options": {**asdict(options), "own": dict(options.own)}}


def _key(bundle: Bundle, candidate: Candidate, options: SessionOptions, version: str) -> str:
    """Return what a trial is valid for: these files, this runtime, this hardware and driver, these options."""
    host = probe.hardware()
    gpu = asdict(host.gpu) if host.gpu else None
    parts = [bundle.variants[candidate.variant].digest, candidate.runtime, version, host.kind, gpu, _told(options)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _remember(note: Path, told: dict[str, Any]) -> None:
    try:
        write_once(note, json.dumps(told).encode())
    except TDeployError as error:  # then it is tried again next time
        _log.debug("The trial is not remembered: %s", error)
