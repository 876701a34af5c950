"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow_tdeploy.core.errors import ConflictError, StorageError
from mlflow_tdeploy.store.layout import TEMPORARY

_log = logging.getLogger("mlflow_tdeploy")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
#: What os.link raises where a file system has no hard links (FAT, many mounted object stores) or not between these two.
_NO_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES)


def cache_home() -> Path:
    """Return the folder of everything this package remembers on this host (``$TDEPLOY_CACHE_DIR`` overrides it)."""
    if chosen := os.environ.get("TDEPLOY_CACHE_DIR"):
        return Path(chosen)
    home = os.path.expanduser("~")  # Path.home() raises where a container's user has no home
    if not os.path.isabs(home):
        # anybody can make that folder first, so it counts only if it is this user's own
        return own_or_private(Path(tempfile.gettempdir()) / f"mlflow_tdeploy-{_user()}")
    return Path(home) / ".cache" / "mlflow_tdeploy"


def own_folder(name: str) -> Path:
    """Return a folder below :func:`cache_home` that is this user's own: nobody else could have put files there.

    Where it is not, or cannot be made, a private folder is returned that goes when this process ends.
    """
    return own_or_private(cache_home() / name / f"user-{_user()}")


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else "user"


def own_or_private(folder: Path) -> Path:
    """Return a folder if it is this user's own, made if need be; else a private one that goes with this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = os.lstat(folder)
        if not hasattr(os, "geteuid"):
            return folder
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
            return folder
        why = "it is not this user's own, or others may write to it"
    except OSError as error:
        why = str(error.strerror or error)
    private = _private(str(folder), os.getpid())
    _log.warning("'%s' is not used (%s): '%s' is, until this process ends.", folder, why, private)
    return private


@functools.cache
def _private(instead_of: str, process: int) -> Path:
    folder = tempfile.mkdtemp(prefix="mlflow_tdeploy-")  # of mode 0700, under a name that nobody can guess
    atexit.register(_remove_private, folder, process)
    return Path(folder)


def _remove_private(folder: str, process: int) -> None:
    if os.getpid() == process:  # not in a fork, which leaves the folder to its parent
        shutil.rmtree(folder, ignore_errors=True)


def temporary(folder: Path) -> Path:
    """Return a fresh name in ``folder`` that readers skip."""
    return folder / f"{TEMPORARY}{secrets.token_hex(8)}"


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn a full disk and refused access into a :class:`StorageError` that says what was being done."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise StorageError(
                f"Cannot {doing}: the disk (or the quota on it) is full. Nothing was kept; free some space and "
                f"try again."
            ) from error
        if isinstance(error, OSError) and error.errno in _REFUSED and not _is_only_unreadable(error):
            raise StorageError(f"Cannot {doing}: {error.strerror} ('{error.filename}'). Nothing was kept.") from error
        raise


def _is_only_unreadable(error: OSError) -> bool:
    """Tell whether it is about a file that is there to be read and may not: something else than what is written."""
    path = error.filename
    return isinstance(path, (str, os.PathLike)) and os.path.isfile(path) and not os.access(path, os.R_OK)


def is_full(error: BaseException) -> bool:
    """Tell whether an error means a full disk; safetensors and protobuf say so in words only."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return "No space left on device" in str(error) or "StorageFull" in str(error)


def write_once(path: Path, content: bytes) -> None:
    """Create a file with this content, all at once, in a folder that is made if need be.

    The content is on disk before the name exists, and of several writers one wins.

    Raises:
        ConflictError: The name is taken.
        StorageError: The disk is full or refuses.
    """
    with storage_errors(f"write '{path}'"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = temporary(path.parent)
        try:
            _write_synced(fresh, content)
            _name_exclusively(fresh, path)
        except FileExistsError:
            raise ConflictError(f"'{path}' exists already; records are never overwritten.") from None
        finally:
            fresh.unlink(missing_ok=True)
        sync_folder(path.parent)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _name_exclusively(fresh: Path, path: Path) -> None:
    try:
        os.link(fresh, path)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno not in _NO_LINK:
            raise
        _rename_exclusively(fresh, path)


def _rename_exclusively(fresh: Path, path: Path) -> None:
    """Without hard links: whoever creates the claim beside ``path`` may rename."""
    claim = path.parent / f"{TEMPORARY}claim-{path.name}"
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        raise ConflictError(
            f"Another process is writing '{path}'. If none is, one was killed there: remove '{claim}' and try again."
        ) from None
    try:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(fresh, path)
    finally:
        claim.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Make ``target`` the same content as ``source``: a hard link, or a copy where that is not possible.

    Returns:
        Whether it is a link.

    Raises:
        FileExistsError: ``target`` exists.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno not in _NO_LINK:
            raise
        with source.open("rb") as read, target.open("xb") as write:
            shutil.copyfileobj(read, write, 1 << 20)
        return False
    return True


def link_own_or_copy(source: Path, target: Path) -> bool:
    """Like :func:`link_or_copy` for a file of this package's own cache; any other is copied: its owner may change it.

    Raises:
        FileExistsError: ``target`` exists.
    """
    home = os.path.realpath(cache_home())
    if os.path.commonpath([home, os.path.realpath(source)]) == home:
        return link_or_copy(source, target)
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
    return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make every file and name below a folder durable."""
    for current, _, names in os.walk(folder):
        for name in names:
            path = Path(current, name)
            if not path.is_symlink():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(Path(current))
