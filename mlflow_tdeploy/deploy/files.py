"""Where a Triton repository lies: its files, each there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError, shown
from mlflow_tdeploy.core.variant import check_relative
from mlflow_tdeploy.store.disk import link_or_copy, storage_errors, temporary
from mlflow_tdeploy.store.process import runs, this_process

#: Begins the names of leases: files beside the models' folders, as Triton takes every folder for a model.
LEASE = ".lease-"
#: A lease that nobody has renewed for so long is a dead deployer's.
LEASE_S = 120.0


Held = Callable[[], None]


class RepositoryFiles(ABC):
    """The files of a repository. Paths are relative, with forward slashes, and stay inside."""

    #: What to call it in messages.
    url: str

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """Return a file's content; None where there is none."""

    @abstractmethod
    def write(self, path: str, content: bytes) -> None:
        """Write a small file, at once.

        Raises:
            StorageError: The storage is full or refuses.
        """

    @abstractmethod
    def put(self, path: str, source: Path) -> None:
        """Make a file of this host one of the repository's, at once."""

    @abstractmethod
    def copy(self, source: str, path: str) -> None:
        """Make a file of the repository another one, without moving its content to this host and back."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file; one that is not there is fine."""

    @abstractmethod
    def below(self, folder: str) -> dict[str, int]:
        """Return size by path of every file below a folder, relative to it."""

    @abstractmethod
    def models(self) -> list[str]:
        """Return the names of the models' folders."""

    @abstractmethod
    def lease(self, name: str, seconds: float = LEASE_S) -> contextlib.AbstractContextManager[Held]:
        """Let one deployer at a time change a deployment.

        Yields:
            Raises ConflictError once the lease is another one's: its holder was taken for dead, and must stop.

        Raises:
            ConflictError: Another one is at it, on whichever host.
        """


class FolderFiles(RepositoryFiles):
    """A folder of this host, or one that hosts share.

    Args:
        root: The folder; made with the first file.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(root)))
        self.url = str(self.root)

    def read(self, path: str) -> bytes | None:
        """Return a file's content; None where there is none."""
        try:
            return self._place(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, content: bytes) -> None:
        """Write a small file, at once."""
        with self._becoming(path) as fresh:
            fresh.write_bytes(content)

    def put(self, path: str, source: Path) -> None:
        """Link a file, or copy it where that is not possible."""
        with self._becoming(path) as fresh:
            link_or_copy(source, fresh)

    def copy(self, source: str, path: str) -> None:
        """Link a file of the repository."""
        self.put(path, self._place(source))

    def remove(self, path: str) -> None:
        """Remove a file, and folders that are empty then."""
        place = self._place(path)
        with storage_errors(f"remove '{place}'"):
            place.unlink(missing_ok=True)
            for parent in place.parents:
                if parent == self.root:
                    break
                try:
                    parent.rmdir()
                except FileNotFoundError:
                    continue
                except OSError:
                    break

    def below(self, folder: str) -> dict[str, int]:
        """Return size by path of every file below a folder."""
        top = self._place(folder)
        found = (path for path in sorted(top.rglob("*")) if path.is_file() or path.is_symlink())
        return {path.relative_to(top).as_posix(): path.lstat().st_size for path in found}

    def models(self) -> list[str]:
        """Return the names of the models' folders."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    @contextlib.contextmanager
    def lease(self, name: str, seconds: float = LEASE_S) -> Iterator[Held]:
        """Hold a file that only one deployer can make; one that a dead deployer has left is taken over."""
        own = f"{LEASE}{name}"
        path, content = self._place(own), json.dumps({**this_process(), "id": secrets.token_hex(8)})
        with storage_errors(f"write '{path}'"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take(path, name, content, seconds)

        def held() -> None:
            if self.read(own) != content.encode():
                raise lost(name, self.url)

        done = threading.Event()
        threading.Thread(target=_renew, args=(path, done, seconds / 4), daemon=True, name="tdeploy-lease").start()
        try:
            yield held
        finally:
            done.set()
            if self.read(own) == content.encode():
                path.unlink(missing_ok=True)

    def _take(self, path: Path, name: str, content: str, seconds: float) -> None:
        for _ in range(2):
            try:
                with path.open("x") as file:
                    try:
                        file.write(content)
                        file.flush()
                    except BaseException:  # a full disk: an empty one would be somebody's, for a while
                        path.unlink(missing_ok=True)
                        raise
                return
            except FileExistsError:
                holder = _holder(path)
                if holder is None or _is_alive(holder, path, seconds):
                    break
                if not _taken_away(path, holder):
                    break  # somebody else took it over first
        told = f"process {holder['pid']} on {holder['host']}" if (holder := _holder(path)) else "somebody"
        raise ConflictError(
            f"'{name}' in '{self.url}' is being changed by {told}. Wait until that is done, or, if it is not "
            f"running any more, remove '{path}'."
        )

    def _place(self, path: str) -> Path:
        return self.root / check_relative(path)

    @contextlib.contextmanager
    def _becoming(self, path: str) -> Iterator[Path]:
        place = self._place(path)
        with storage_errors(f"write '{place}'"):
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = temporary(place.parent)
            try:
                yield fresh
                os.replace(fresh, place)
                if fresh.exists():  # a link to what was there already: replacing it by itself does nothing
                    fresh.unlink()
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise


def _taken_away(path: Path, holder: Mapping[str, str]) -> bool:
    """Remove a dead deployer's lease, and no other that was made in its place meanwhile."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    if _holder(aside) == holder:
        aside.unlink()
        return True
    with contextlib.suppress(FileExistsError):
        os.link(aside, path)  # give back what was another one's
    aside.unlink()
    return False


def _renew(path: Path, done: threading.Event, every: float) -> None:
    """Keep a lease young as long as its holder lives."""
    while not done.wait(every):
        with contextlib.suppress(OSError):
            os.utime(path)


def _holder(path: Path) -> Mapping[str, str] | None:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) and {"host", "pid"} <= set(found) else {"host": "?", "pid": "?"}
    except FileNotFoundError:
        return None
    except ValueError:
        return {"host": "?", "pid": "?"}


def lost(name: str, url: str) -> ConflictError:
    """Return the error for who is no longer the one to change a deployment."""
    return ConflictError(
        f"Another deployer has taken over '{name}' in '{url}', as this one had not been heard of for too long. What it "
        f"was about to change is left as it is."
    )


def _is_alive(holder: Mapping[str, Any], path: Path, seconds: float) -> bool:
    """Tell whether a lease's holder may still be at it: its process runs, or, elsewhere, the lease is young."""
    if (alive := runs(holder)) is not None:
        return alive
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime < seconds
    return False


def open_files(url: str | Path) -> RepositoryFiles:
    """Return the repository at a path or URL.

    Raises:
        InvalidInputError: It is of a kind that is not supported.
    """
    text = str(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if text.startswith("s3://"):
        from mlflow_tdeploy.deploy.s3 import S3Files

        return S3Files(text)
    if "://" in text:
        raise InvalidInputError(
            f"No repository at an address that begins with {shown(text.partition('://')[0])}: use a folder that the "
            f"server reads as well, or s3://…."
        )
    return FolderFiles(text)
