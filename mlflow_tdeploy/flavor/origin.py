"""Where the files are that a partly downloaded bundle has not: noted on this host, for the process that opens it.

Not in the bundle itself: whoever wrote a model could then have this host ask any server, with its credentials.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import urllib.parse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.registry_io import Location, fetch_variant
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.disk import own_folder, storage_errors, temporary


def write_origin(bundle: Bundle, location: Location) -> None:
    """Note where a bundle came from; notes of bundles that are gone are removed. No password is written."""
    path = _note(bundle)
    _forget_gone(path.parent)
    if _has_password(location.root):
        return
    if _has_password(location.tracking_uri or ""):
        location = replace(location, tracking_uri=None)  # the opening process's own
    with storage_errors(f"write '{path}'"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = temporary(path.parent)
        try:
            fresh.touch(mode=0o600)
            fresh.write_text(json.dumps({"bundle": str(bundle.root), "origin": asdict(location)}), encoding="utf-8")
            os.replace(fresh, path)  # at once: other processes may be reading it
        finally:
            fresh.unlink(missing_ok=True)


def origin_fetch(bundle: Bundle) -> Fetch | None:
    """Return how to get what a partial download left out, or None for a whole one.

    Whatever comes from there is checked against the hashes of the bundle's records.
    """
    try:
        location = Location(**_read(_note(bundle))["origin"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    fetch: functools.partial[None] = functools.partial(_fetch, location, bundle)
    return fetch


def _fetch(location: Location, bundle: Bundle, variant: Variant) -> None:
    fetch_variant(location, bundle, variant)


def _note(bundle: Bundle) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(bundle.root))).hexdigest()
    return own_folder("origins") / f"{name}.json"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _forget_gone(folder: Path) -> None:
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if not os.path.lexists(_read(path)["bundle"]):
                path.unlink()


def _has_password(uri: str) -> bool:
    try:
        return urllib.parse.urlparse(uri).password is not None
    except ValueError:
        return False
