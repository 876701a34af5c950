"""How much room this package takes on a host, and giving some back."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow_tdeploy.store.cache import ContentCache, last_used
from mlflow_tdeploy.store.disk import own_folder, temporary
from mlflow_tdeploy.store.layout import ABANDONED_S, ROOT, TEMPORARY

_VIEWS = "views"
#: Engines that ONNX Runtime's TensorRT provider has built here, a folder for each content.
ENGINES = "ort-tensorrt"


@dataclass(frozen=True)
class Usage:
    """Bytes on the disk; what an object and a view share through a hard link counts once in ``total``."""

    objects: int
    views: int
    engines: int
    total: int


@dataclass(frozen=True)
class _Item:
    used: int
    path: Path
    files: dict[tuple[int, int], int]

    @property
    def size(self) -> int:
        return sum(self.files.values())


def views_home() -> Path:
    """Return the folder of all views: this user's own, because a model's ``code/`` in it is imported."""
    return own_folder(_VIEWS)


def used(view: Path) -> None:
    """Note that a view is in use, so that it is pruned later than others."""
    with contextlib.suppress(OSError):
        os.utime(view)


def usage() -> Usage:
    """Return what objects, views and engines take."""
    return _usage(*_items())


def prune(max_bytes: int) -> int:
    """Remove what was used least recently, objects, views and engines, until at most ``max_bytes`` are left.

    A process that runs keeps what it has opened; whatever else is wanted again is fetched, or built, again.

    Returns:
        Bytes freed.
    """
    swept = _sweep()
    kinds = _items()
    before = left = _usage(*kinds).total
    items = [item for kind in kinds for item in kind]
    owners: dict[tuple[int, int], int] = {}
    for item in items:
        for inode in item.files:
            owners[inode] = owners.get(inode, 0) + 1
    for item in sorted(items, key=lambda item: item.used):
        if left <= max_bytes:
            break
        _remove(item.path)
        for inode, size in item.files.items():
            owners[inode] -= 1
            left -= 0 if owners[inode] else size
    return swept + before - left


def _sweep() -> int:
    """Remove what killed processes left half written or half removed; returns its bytes."""
    freed = 0
    for path in _leftovers():
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime < ABANDONED_S:
                continue
            files = _files(_below(path) if path.is_dir() else [path])
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            freed += sum(files.values())
    return freed


def _leftovers() -> list[Path]:
    folders = [views_home(), own_folder(ENGINES), *views_home().glob(f"*/{ROOT}"), *ContentCache().folders()]
    return [path for folder in folders for path in folder.glob(f"{TEMPORARY}*")]


def _usage(*kinds: list[_Item]) -> Usage:
    objects, views, engines = (sum(item.size for item in kind) for kind in kinds)
    distinct = {inode: size for kind in kinds for item in kind for inode, size in item.files.items()}
    return Usage(objects, views, engines, sum(distinct.values()))


def _items() -> tuple[list[_Item], list[_Item], list[_Item]]:
    objects = [_Item(last_used(path), path, _files([path])) for path in ContentCache().paths()]
    return objects, _folders(views_home()), _folders(own_folder(ENGINES))


def _folders(home: Path) -> list[_Item]:
    found = []
    for path in home.iterdir() if home.is_dir() else ():
        with contextlib.suppress(OSError):  # another process prunes, too
            if path.is_dir() and not path.name.startswith("."):
                found.append(_Item(path.stat().st_mtime_ns, path, _files(_below(path))))
    return found


def _below(folder: Path) -> Iterator[Path]:
    for current, _, names in os.walk(folder):
        yield from (Path(current, name) for name in names)


def _files(paths: list[Path] | Iterator[Path]) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.lstat()
            found[status.st_dev, status.st_ino] = status.st_size
    return found


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if not path.is_dir():
            ContentCache.remove(path)
            return
        gone = temporary(path.parent)
        os.rename(path, gone)  # at once: nobody opens half a view
        shutil.rmtree(gone, ignore_errors=True)
