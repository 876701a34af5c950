"""The records of model versions, opened once for a plan and what is done about it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import mlflow

from mlflow_tdeploy.registry_io import Location, locate, open_records
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.layout import MANIFEST

#: Seconds for which records are as they were: a plan, and its doing right after it. Later a variant may be added.
FRESH_S = 10.0
#: Of so many versions they are kept, those that were opened last.
_MOST = 64


@dataclass(frozen=True)
class Opened:
    """A version's records.

    Attributes:
        location: Where it is.
        bundle: Its records.
        fetch: Brings the files of a variant; None where they are here.
        since: When it was opened, on the clock of ``time.monotonic``.
        at: When that was, in milliseconds since 1970.
    """

    location: Location
    bundle: Bundle
    fetch: Fetch | None
    since: float
    at: float


_known: dict[tuple[str, str, str], Opened] = {}
_lock = threading.Lock()


def opened(uri: str, within: float = FRESH_S, changed: float = 0.0, source: str = "") -> Opened:
    """Return the records of a model version.

    Args:
        uri: ``models:/name/version``.
        within: Seconds for which those that this process has opened before are good enough.
        changed: When the registered model was changed, in milliseconds since 1970: what was opened before it is not.
        source: What the registry says that the version is from, where that is known.

    Raises:
        TDeployError: It is not there, or holds no bundle.
        MlflowException: The registry does not know it.
    """
    key = (mlflow.get_registry_uri(), mlflow.get_tracking_uri(), uri)
    with _lock:
        found = _known.get(key)
    good = found is not None and time.monotonic() - found.since < within and found.at > changed
    if found is not None and good and (found.bundle.root / MANIFEST).is_file():  # else somebody has pruned it
        return found
    location = locate(uri, source=source)
    bundle, fetch = open_records(location, packaging=False)
    fresh = Opened(location, bundle, fetch, time.monotonic(), time.time() * 1000)
    with _lock:
        _known.pop(key, None)
        _known[key] = fresh
        while len(_known) > _MOST:
            del _known[next(iter(_known))]
    return fresh
