"""One process of a host at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow_tdeploy.core.errors import MissingDependencyError
from mlflow_tdeploy.store.disk import own_folder, storage_errors

_log = logging.getLogger("mlflow_tdeploy")


@contextmanager
def host_lock(name: str) -> Iterator[bool]:
    """Let one process of this host and user in at a time; a killed one lets go of it.

    Args:
        name: What is locked; any text.

    Yields:
        Whether another process was waited for.

    Raises:
        MissingDependencyError: The package ``filelock`` is not installed.
        StorageError: The lock's file cannot be made.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise MissingDependencyError("filelock", "Building engines", "pip install filelock") from error
    folder = own_folder("locks")
    with storage_errors(f"make a lock below '{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
        lock, waited = FileLock(folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"), False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            _log.info("Another process is at it: waiting for %s.", name)
            lock.acquire()
    try:
        yield waited
    finally:
        lock.release()
