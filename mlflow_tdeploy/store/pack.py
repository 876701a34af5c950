"""The small files of a bundle in one, so that who reads them far away asks once and not for each.

Records are only ever added, so what a pack holds stays true. Who adds one leaves a sign first: then there are others
beside the pack.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
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
    with storage_errors(f"write '{root / PACK}'"):
        paths = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        held = {name: path.read_bytes() for name, path in paths.items() if not _is_apart(name)}
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
        archive.comment = _digest(held)  # a file has a sum of its own, and nothing else would tell that one is gone
    write_once(root / PACK, content.getvalue())


def unpack(pack: Path, root: Path) -> frozenset[str]:
    """Write what a pack holds into a folder.

    Args:
        pack: The file.
        root: A ``tdeploy`` folder in the making.

    Returns:
        The paths of its files.

    Raises:
        IntegrityError: The pack is damaged, or a file of it has no business in it: nothing was written.
        InvalidInputError: A file of it would lie outside the folder.
        OSError: The disk is full or refuses.
    """
    held = _held(pack.read_bytes())
    for name in held:
        if _is_apart(name):
            raise IntegrityError(f"'{name}' does not belong into '{PACK}'.")
    targets = {name: safe_path(root, name) for name in held}
    if MANIFEST not in held:
        raise IntegrityError(f"'{PACK}' has no '{MANIFEST}'.")
    for folder in {target.parent for target in targets.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    for name, target in targets.items():
        target.write_bytes(held[name])
    return frozenset(held)


def _held(content: bytes) -> dict[str, bytes]:
    """Return what a pack holds by name, all of it or none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            held, said = {name: archive.read(name) for name in archive.namelist()}, archive.comment
    except Exception as error:  # a damaged archive makes Python's reader raise nearly anything
        raise IntegrityError(f"'{PACK}' is damaged ({error}).") from error
    if said != _digest(held):
        raise IntegrityError(f"'{PACK}' is damaged: it does not hold what was packed.")
    return held


def _digest(held: Mapping[str, bytes]) -> bytes:
    """Return a sum of names and contents."""
    parts = (f"{name}\0{hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(held.items()))
    return hashlib.sha256("".join(parts).encode()).hexdigest().encode()


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
    return parts[0] in _APART or any(part.startswith(".tdeploy-") for part in parts)  # what a writer is at
