"""Folders in the making: whole in the end or gone, and those of killed processes are removed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError
from mlflow_tdeploy.store.disk import own_or_private, storage_errors, sync_folder, sync_tree, temporary
from mlflow_tdeploy.store.layout import ABANDONED_S, TEMPORARY

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Names of folders in the making: that of :func:`mlflow_tdeploy.store.disk.temporary`, and which host it is on.
_STAGED = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}(?:-([0-9a-f]{8}))?")
#: Seconds between making a folder and locking it, and plenty of them.
_UNLOCKED_S = 10.0


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield a fresh folder beside ``target`` that becomes ``target``, whole and on disk, when the block ends well.

    After any exception neither exists. After a kill there may be a folder ``.tdeploy-…`` beside ``target``, which
    nothing reads and a later call removes; ``target`` itself is there completely or not at all.

    Raises:
        ConflictError: ``target`` exists and is not an empty folder.
        StorageError: The disk is full or refuses.
    """
    target = Path(os.path.abspath(target))  # the block may change the working directory
    refuse_taken(target)
    with storage_errors(f"write '{target}'"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        with _held(target.parent) as fresh:
            yield fresh
            sync_tree(fresh)
            _become(fresh, target)
        sync_folder(target.parent)


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Yield an empty folder for what is made on the way; it goes with the block, or when its killed process is noticed.

    Raises:
        StorageError: The disk is full or refuses.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    home = own_or_private(Path(tempfile.gettempdir()) / f"mlflow_tdeploy-{user}")
    _remove_abandoned(home)
    with _held(home) as fresh:
        yield fresh


@contextlib.contextmanager
def _held(parent: Path) -> Iterator[Path]:
    """Yield a fresh folder that this process locks as long as it lives, and that is gone in the end."""
    fresh = parent / f"{temporary(parent).name}-{_host()}"
    owner = os.getpid()
    with storage_errors(f"make a folder in '{parent}'"):
        fresh.mkdir()
        handle = _hold(fresh)
    try:
        yield fresh
    finally:
        if os.getpid() == owner:  # not in a fork that unwinds
            shutil.rmtree(fresh, ignore_errors=True)  # unless it has another name by now
        if handle is not None:
            os.close(handle)


@functools.cache
def _host() -> str:
    """Return what tells this host, since it was started, from others that may share the file system."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = platform.node()
    return hashlib.sha256(boot.encode()).hexdigest()[:8]


def _hold(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives and the handle is open, where the system can."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left: folders that nobody locks.

    Of another host's they also must not have been written to for some time: a file system may know only this host's
    locks.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            name = _STAGED.fullmatch(path.name)
            if name is None or path.is_symlink() or not path.is_dir():
                continue
            if is_fresh(path, _UNLOCKED_S if name[1] == _host() and fcntl is not None else ABANDONED_S):
                continue
            if (handle := _hold(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def is_fresh(folder: Path, seconds: float = ABANDONED_S) -> bool:
    """Tell whether anything in a folder was written within so many seconds."""
    newest = max(os.lstat(path).st_mtime for path in (folder, *folder.rglob("*")))
    return time.time() - newest < seconds


def refuse_taken(target: Path) -> None:
    """Make sure that a folder can be made under a name.

    Raises:
        InvalidInputError: Something in its path is no folder, or it is a mount point.
        ConflictError: It exists and is not empty.
    """
    if os.path.ismount(target):
        raise InvalidInputError(
            f"'{target}' is a mount point, which cannot become a model's folder all at once. Choose a folder inside it."
        )
    if (file := next((path for path in target.parents if path.is_file()), None)) is not None:
        raise InvalidInputError(f"'{target}' cannot be made: '{file}' is a file. Choose another path.")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ConflictError(f"'{target}' exists already and is not an empty folder. Choose another path or remove it.")


def _become(fresh: Path, target: Path) -> None:
    """Rename a folder to a name that is free or an empty folder's."""
    if os.name == "nt" and target.is_dir():
        target.rmdir()  # only there a rename never replaces
    try:
        os.rename(fresh, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise ConflictError(f"'{target}' was created by somebody else in the meantime and is kept.") from error
        raise
