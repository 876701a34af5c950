"""Contents by digest: a host keeps one copy of a file, however many models use it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mlflow_tdeploy.core.errors import IntegrityError, NotFoundError
from mlflow_tdeploy.core.variant import FileRecord
from mlflow_tdeploy.store.disk import cache_home, link_or_copy, storage_errors, temporary
from mlflow_tdeploy.store.hashing import verify_file

_USED = ".used"


class ContentCache:
    """Files by sha256, shared by all processes of a user.

    Contents are verified on the way in and on the way out, and appear under their digest at once; a damaged one is
    removed, so that it is fetched again. Linking the same target again changes nothing: a new link would
    change the file's ctime, which makes :class:`~mlflow_tdeploy.store.hashing.HashCache` hash it again.

    Args:
        directory: Where contents are kept; the default is ``objects`` below ``$TDEPLOY_CACHE_DIR`` or
            ``~/.cache/mlflow_tdeploy``.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = cache_home() / "objects" if directory is None else Path(directory)

    def has(self, record: FileRecord) -> bool:
        """Tell whether the content is here, by digest and size."""
        try:
            return self._object(record).stat().st_size == record.size
        except OSError:
            return False

    def add(self, path: Path, record: FileRecord) -> None:
        """Take in a file; the original stays where it is and must not be written to again (it may be linked).

        Raises:
            IntegrityError: Its content is not what ``record`` says; nothing was kept.
            StorageError: The disk is full or refuses.
        """
        if self.has(record):
            return
        final = self._object(record)
        with storage_errors(f"keep '{path}' in the cache '{self._directory}' (TDEPLOY_CACHE_DIR moves it)"):
            final.parent.mkdir(parents=True, exist_ok=True)
            fresh = temporary(final.parent)
            try:
                link_or_copy(path, fresh)
                verify_file(fresh, record)
                os.replace(fresh, final)
            finally:
                fresh.unlink(missing_ok=True)
        self._touch(final)

    def link(self, record: FileRecord, target: Path) -> None:
        """Put the content at ``target`` (replacing a file there) by a hard link, or a copy where that fails.

        Raises:
            NotFoundError: The content is not here (any more), or was damaged and is removed: add it again.
            StorageError: The disk is full or refuses.
        """
        content = self._object(record)
        if not self.has(record):
            raise NotFoundError(f"'{record.path}' ({record.sha256}) is not in the cache '{self._directory}'. Fetch it.")
        self._touch(content)
        if _same_file(content, target):
            return
        with storage_errors(f"write '{target}'"):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = temporary(target.parent)
            try:
                link_or_copy(content, fresh)
                verify_file(fresh, record)
                os.replace(fresh, target)
            except IntegrityError as error:
                self.discard(record)
                raise NotFoundError(f"'{record.path}' was damaged in the cache and is removed. Fetch it.") from error
            except FileNotFoundError:  # pruned by another process in between
                raise NotFoundError(f"'{record.path}' has just been removed from the cache. Fetch it again.") from None
            finally:
                fresh.unlink(missing_ok=True)

    def use(self, record: FileRecord) -> None:
        """Note that a content is in use, so that it is pruned later than others."""
        if self.has(record):
            self._touch(self._object(record))

    def discard(self, record: FileRecord) -> None:
        """Remove one content, for example one that turned out damaged."""
        self.remove(self._object(record))

    def folders(self) -> list[Path]:
        """Return the folders in which contents lie, and what writers have not finished."""
        return [path for path in self._directory.glob("??") if path.is_dir()]

    def paths(self) -> Iterator[Path]:
        """Yield every content that is kept."""
        for path in self._directory.glob("??/*"):
            if not path.name.startswith(".") and path.suffix != _USED:
                yield path

    def _object(self, record: FileRecord) -> Path:
        return self._directory / record.sha256[:2] / record.sha256

    @staticmethod
    def remove(path: Path) -> None:
        """Remove a content and the note of its use."""
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.with_suffix(_USED).unlink(missing_ok=True)

    @staticmethod
    def _touch(path: Path) -> None:
        with contextlib.suppress(OSError):  # a stamp beside it: touching the content itself would change its ctime
            path.with_suffix(_USED).touch()


def last_used(path: Path) -> int:
    """Return when a content was used last, in ns."""
    try:
        return path.with_suffix(_USED).stat().st_mtime_ns
    except OSError:
        return path.stat().st_mtime_ns


def _same_file(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False
