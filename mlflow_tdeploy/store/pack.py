"""The small files of a bundle in one, so that who reads them far away asks once and not for each.

Records are only ever added, so what a pack holds stays true. Who adds one leaves a sign first: then there are others
beside the pack.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
import zlib
from pathlib import Path

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError
from mlflow_tdeploy.store.disk import storage_errors, write_once
from mlflow_tdeploy.store.layout import ADDED, FILES, MANIFEST, PACK, SOURCE, safe_path

#: What is in a pack besides what a folder's other files are: nothing of this.
_APART = (FILES, SOURCE, PACK, ADDED)
_NOTE = f"Records were added after {PACK} was written: it does not hold all of them.\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files, the same bytes


def write_pack(root: Path) -> None:
    """Pack everything of a bundle in the making but the files of its variants.

    Args:
        root: Its ``tdeploy`` folder, with all its records.

    Raises:
        StorageError: The disk is full or refuses.
    """
    content = io.BytesIO()
    with storage_errors(f"write '{root / PACK}'"), zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root).as_posix()
            if path.is_file() and not _is_apart(relative):
                archive.writestr(zipfile.ZipInfo(relative, _EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)
    write_once(root / PACK, content.getvalue())


def unpack(pack: Path, root: Path) -> frozenset[str]:
    """Write what a pack holds into a folder.

    Args:
        pack: The file.
        root: A ``tdeploy`` folder in the making.

    Returns:
        The paths of its files.

    Raises:
        IntegrityError: The pack is damaged, or a file of it has no business in it; part of it may have been written.
        OSError: The disk is full or refuses.
    """
    found: set[str] = set()
    try:
        with zipfile.ZipFile(pack) as archive:
            for name in archive.namelist():
                if _is_apart(name):
                    raise IntegrityError(f"'{name}' does not belong into '{PACK}'.")
                target = safe_path(root, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))  # it checks a sum of each
                found.add(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise IntegrityError(f"'{PACK}' is damaged ({error}).") from error
    if MANIFEST not in found:
        raise IntegrityError(f"'{PACK}' has no '{MANIFEST}'.")
    return frozenset(found)


def note_added(root: Path) -> None:
    """Leave the sign that there are, or will be, records beside a bundle's pack; leaving it twice is fine.

    Raises:
        StorageError: The disk is full or refuses.
    """
    if os.path.lexists(root / PACK):
        with contextlib.suppress(ConflictError):
            write_sign(root)


def write_sign(folder: Path) -> Path:
    """Write that sign into a folder, and return its path.

    Raises:
        ConflictError: It is there.
        StorageError: The disk is full or refuses.
    """
    write_once(folder / ADDED, _NOTE.encode())
    return folder / ADDED


def _is_apart(relative: str) -> bool:
    parts = relative.split("/")
    return parts[0] in _APART or any(part.startswith(".") for part in parts)
