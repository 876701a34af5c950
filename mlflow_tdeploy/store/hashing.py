"""Digests of files, and what this host remembers about them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from pathlib import Path
from typing import BinaryIO

from mlflow_tdeploy.core.errors import IntegrityError
from mlflow_tdeploy.core.variant import FileRecord
from mlflow_tdeploy.store.disk import cache_home, temporary
from mlflow_tdeploy.store.layout import safe_path

_ENTRY = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64})\n")
#: A file that changed this recently may change again within one tick of the file system's clock.
_YOUNG_NS = 2_000_000_000
_AGAIN = (
    "Load the model by its URI once more: what this host keeps of it is fetched again then. Where the model is a "
    "folder, take a sound copy of it or log the model again."
)


def sha256_file(path: Path | str) -> str:
    """Return the hex digest of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()


def record_file(root: Path, relative: str) -> FileRecord:
    """Describe one file of a bundle.

    Raises:
        IntegrityError: It is missing, no plain file, or a link out of the bundle.
    """
    path = safe_path(root, relative)
    with _open(path) as file:
        return FileRecord(relative, _digest(file), file.tell())


def record_tree(root: Path, folder: str) -> tuple[FileRecord, ...]:
    """Describe every file below a folder of a bundle, sorted by path.

    Raises:
        IntegrityError: A file is no plain file, a link leads out of the bundle, or a folder is a link.
    """
    return tuple(record_file(root, relative) for relative in list_tree(root, folder))


def list_tree(root: Path, folder: str) -> list[str]:
    """Return the relative path of every file below a folder of a bundle, sorted.

    Raises:
        IntegrityError: A folder in it is a symbolic link.
    """
    found: list[str] = []
    start = safe_path(root, folder)
    for current, folders, names in os.walk(start):
        base = Path(current).relative_to(root).as_posix()
        for name in folders:
            if Path(current, name).is_symlink():
                raise IntegrityError(f"'{base}/{name}' is a symbolic link to a folder; a bundle holds plain folders.")
        found += [f"{base}/{name}" for name in names]
    return sorted(found)


class HashCache:
    """Remembers on this host which content a file had, so that gigabytes are hashed once and not at every start.

    An entry holds for one path as long as device, inode, size, mtime and ctime stay the same. A tamper
    that keeps the size and sets the mtime back is noticed, because no program can set a POSIX ctime
    back; on Windows, where ctime is something else, nothing is remembered and every open hashes. Not
    noticed are changes below the file system (a dying disk, a raw write to the device): pass no cache
    to hash the content itself. Files younger than two seconds are not remembered, as two changes
    within one tick of the file system's clock look alike.

    Each user has an own folder and reads only entries that this user owns, so nobody can vouch for a file for
    somebody else. A cache that cannot be read or written is ignored: it costs time, never a start.

    Args:
        directory: Where entries are kept; the default is ``hashes`` below ``$TDEPLOY_CACHE_DIR`` or
            ``~/.cache/mlflow_tdeploy``.
    """

    def __init__(self, directory: Path | None = None) -> None:
        base = cache_home() / "hashes" if directory is None else Path(directory)
        self._enabled = os.name == "posix"
        self._user = os.geteuid() if self._enabled else 0
        self._directory = base / f"user-{self._user}"

    def get(self, path: Path, status: os.stat_result) -> str | None:
        """Return the digest remembered for a file in this very state, or None."""
        if not self._enabled:
            return None
        try:
            with self._entry(path).open("rb") as file:
                own = os.fstat(file.fileno()).st_uid == self._user
                match = _ENTRY.fullmatch(file.read(200).decode("ascii"))
        except (OSError, ValueError):
            return None
        return match[2] if own and match and match[1] == _state(status) else None

    def put(self, path: Path, status: os.stat_result, sha256: str) -> None:
        """Remember the digest of a file in this state."""
        if not self._enabled or time.time_ns() - max(status.st_ctime_ns, status.st_mtime_ns) < _YOUNG_NS:
            return
        entry = self._entry(path)
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = temporary(entry.parent)
            try:
                fresh.write_text(f"{_state(status)} {sha256}\n", encoding="ascii")
                os.replace(fresh, entry)  # a torn entry has not the form above and counts as none
            finally:
                fresh.unlink(missing_ok=True)

    def _entry(self, path: Path) -> Path:
        name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
        return self._directory / name[:2] / name[2:]


def _state(status: os.stat_result) -> str:
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def verify_file(path: Path, record: FileRecord, cache: HashCache | None = None) -> None:
    """Check that a file is what its record says.

    Args:
        path: The file.
        record: What it should be.
        cache: Digests remembered on this host; None hashes the content.

    Raises:
        IntegrityError: It is missing, of another size, or changed; the message names it and says which.
    """
    with _open(path) as file:
        before = os.fstat(file.fileno())
        if before.st_size != record.size:
            raise IntegrityError(
                f"'{path}' has {before.st_size} bytes, its record says {record.size}: it is truncated or was "
                f"replaced. {_AGAIN}"
            )
        found = cache.get(path, before) if cache else None
        if found is None:
            found = _digest(file)
            if cache and _state(os.fstat(file.fileno())) == _state(before):
                cache.put(path, before, found)
    if found != record.sha256:
        raise IntegrityError(
            f"'{path}' was changed: its sha256 is {found}, its record says {record.sha256}. It is not used. {_AGAIN}"
        )


def _open(path: Path) -> BinaryIO:
    """Open a plain file; never waits on a pipe or a device."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise IntegrityError(f"'{path}' is missing. {_AGAIN}") from None
    except OSError as error:
        raise IntegrityError(f"'{path}' cannot be read ({error.strerror}). {_AGAIN}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise IntegrityError(f"'{path}' is not a plain file. {_AGAIN}")
    return os.fdopen(handle, "rb", buffering=0)
