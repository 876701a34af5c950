"""Writing a bundle: all or nothing, records last, nothing overwritten."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from mlflow_tdeploy.core import golden
from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, InvalidInputError, NotFoundError, TDeployError
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.manifest import Manifest
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.variant import FileRecord, Variant
from mlflow_tdeploy.store.disk import link_or_copy, storage_errors, temporary, write_once
from mlflow_tdeploy.store.hashing import record_file, record_tree, verify_file
from mlflow_tdeploy.store.layout import ABANDONED_S, EVIDENCE, FILES, GOLDEN, MANIFEST, TEMPORARY, VARIANTS, safe_path
from mlflow_tdeploy.store.pack import note_added
from mlflow_tdeploy.store.staging import is_fresh, refuse_taken, staged_directory


class BundleDraft:
    """A bundle being written, inside a :func:`staged_directory`: files first, then their records.

    Args:
        root: The new ``tdeploy`` folder; it may exist if it is empty.

    Raises:
        ConflictError: ``root`` holds something.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        refuse_taken(self.root)
        with storage_errors(f"write '{self.root}'"):
            self.root.mkdir(parents=True, exist_ok=True)

    def add_tree(self, relative_folder: str) -> tuple[FileRecord, ...]:
        """Return the records of all files below a folder that was filled."""
        return record_tree(self.root, relative_folder)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, once."""
        write_once(self.root / MANIFEST, to_json(manifest).encode())

    def write_golden(self, requests: Sequence[GoldenRequest]) -> tuple[FileRecord, ...]:
        """Write the golden requests and return the records that belong into the manifest; none for no requests."""
        if not requests:
            return ()
        text, arrays = golden.dump(tuple(requests))
        contents = {f"{GOLDEN}/golden.json": text.encode(), f"{GOLDEN}/golden.npz": arrays}
        for relative, content in contents.items():
            write_once(safe_path(self.root, relative), content)
        return tuple(record_file(self.root, relative) for relative in contents)

    def write_variant(self, variant: Variant) -> None:
        """Write a variant's record; its files must be there.

        Raises:
            IntegrityError: A file is missing or has another size than recorded.
            ConflictError: The variant has a record.
        """
        for record in variant.files:
            path = safe_path(self.root, record.path)
            if not path.is_file() or path.stat().st_size != record.size:
                raise IntegrityError(f"Variant '{variant.id}': '{record.path}' is not there as recorded.")
        write_once(_record_path(self.root, variant.id), to_json(variant).encode())

    def write_evidence(self, evidence: Evidence) -> str:
        """Write a measurement and return its path in the bundle."""
        return _write_evidence(self.root / EVIDENCE / evidence.variant, evidence)


def evidence_name() -> str:
    """Return a new file name for a measurement: UTC time, then a random suffix, so that names sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(4)}.json"


def append_evidence(root: Path, evidence: Evidence) -> str:
    """Add a measurement to a variant of a bundle on this file system.

    Returns:
        Its path in the bundle.

    Raises:
        NotFoundError: The bundle has no such variant.
        StorageError: The disk is full or refuses.
    """
    if not _record_path(root, evidence.variant).is_file():
        raise NotFoundError(f"The bundle '{root}' has no variant '{evidence.variant}' to add a measurement to.")
    note_added(root)
    return _write_evidence(safe_path(root, f"{EVIDENCE}/{evidence.variant}"), evidence)


def append_variant(root: Path, variant: Variant, staged: Path | None, evidence: Sequence[Evidence]) -> Variant:
    """Add a variant to a bundle on this file system, without changing a file of it.

    Its files get a folder of their own, so that nobody else's are ever mixed with them, and the record appears last:
    before that the variant does not exist for any reader. Of two appenders with the same id the first record wins.
    Files that a killed appender left behind are removed by one that comes an hour later.

    Args:
        root: The bundle's ``tdeploy`` folder.
        variant: Its record. Its files lie below ``files/<id>/``, or are in the bundle already.
        staged: A folder laid out like the bundle that holds the new files (``files/<id>/…``); None when there
            are none. It stays as it is and is the caller's to remove; its files may be linked, so do not write to
            them again.
        evidence: What was measured about the variant.

    Returns:
        The record as it was written.

    Raises:
        NotFoundError: ``root`` holds no bundle.
        ConflictError: The bundle has a variant of that id.
        IntegrityError: A file is not what the record says.
        InvalidInputError: A new file is not below ``files/<id>/``, or evidence is about another variant.
        StorageError: The disk is full or refuses.
    """
    root = Path(root)
    if not (root / MANIFEST).is_file():
        raise NotFoundError(f"'{root}' holds no bundle (no {MANIFEST}): a variant can only be added to one.")
    _check_append(variant, staged, evidence)
    for record in variant.files:
        verify_file(safe_path(staged or root, record.path), record)
    with storage_errors(f"add the variant '{variant.id}' to '{root}'"):
        _refuse_recorded(root, variant.id)
        if staged is not None:
            _remove_unrecorded(root, variant.id)
        return _place(root, variant, staged, evidence)


def moved(variant: Variant, folder: str) -> Variant:
    """Return the variant with its files below ``folder`` instead of ``files/<id>``."""
    old = f"{FILES}/{variant.id}/"
    files = tuple(replace(record, path=f"{folder}/{record.path.removeprefix(old)}") for record in variant.files)
    entry = f"{folder}/{variant.entry.removeprefix(old)}" if variant.entry.startswith(old) else folder
    folders, executables = (
        tuple(f"{folder}/{path.removeprefix(old)}" for path in paths)
        for paths in (variant.folders, variant.executables)
    )
    return replace(variant, entry=entry, files=files, folders=folders, executables=executables)


def own_files(variant_id: str) -> str:
    """Return a folder of a bundle that no other appender uses."""
    return f"{FILES}/{variant_id}/{secrets.token_hex(4)}"


def _check_append(variant: Variant, staged: Path | None, evidence: Sequence[Evidence]) -> None:
    for record in variant.files if staged else ():
        if not record.path.startswith(f"{FILES}/{variant.id}/"):
            raise InvalidInputError(
                f"Variant '{variant.id}': the new file '{record.path}' must be below '{FILES}/{variant.id}/'."
            )
    for item in evidence:
        if item.variant != variant.id:
            raise InvalidInputError(f"Evidence about '{item.variant}' was passed for the variant '{variant.id}'.")


def _refuse_recorded(root: Path, variant_id: str) -> None:
    if os.path.lexists(_record_path(root, variant_id)):
        raise ConflictError(
            f"The bundle '{root}' has a variant '{variant_id}' already; variants are never replaced. Choose another id."
        )


def _place(root: Path, variant: Variant, staged: Path | None, evidence: Sequence[Evidence]) -> Variant:
    own, placed = own_files(variant.id), list[Path]()
    try:
        if staged is not None and variant.files:
            placed.append(safe_path(root, own))
            with staged_directory(placed[0]) as fresh:
                for record in variant.files:
                    target = fresh / record.path.removeprefix(f"{FILES}/{variant.id}/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not link_or_copy(safe_path(staged, record.path).resolve(), target):
                        verify_file(target, record)
            variant = moved(variant, own)
        note_added(root)
        for item in evidence:
            measured = item if item.files else replace(item, files=variant.digest or None)
            written = _write_evidence(safe_path(root, f"{EVIDENCE}/{variant.id}"), measured)
            placed.append(safe_path(root, written))
        _write_record(root, variant)
    except BaseException:
        # an interrupt that comes right after the record appeared must not take the files away from it
        if not _is_recorded(root, variant):
            _take_back(root, variant.id, placed)
        raise
    return variant


def _write_record(root: Path, variant: Variant) -> None:
    try:
        write_once(_record_path(root, variant.id), to_json(variant).encode())
    except ConflictError:
        _refuse_recorded(root, variant.id)  # says more
        raise


def _is_recorded(root: Path, variant: Variant) -> bool:
    """Tell whether the very record may be there: not if it cannot be written, is missing, or is another appender's."""
    try:
        wanted = to_json(variant).encode()
    except TDeployError:
        return False
    try:
        return _record_path(root, variant.id).read_bytes() == wanted
    except FileNotFoundError:
        return False
    except OSError:
        return True  # it cannot be read just now: files without a record only take room


def _take_back(root: Path, variant_id: str, placed: Sequence[Path]) -> None:
    for path in placed:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    for name in (FILES, EVIDENCE):
        with contextlib.suppress(OSError):
            (root / name / variant_id).rmdir()  # unless somebody else's are there


def _remove_unrecorded(root: Path, variant_id: str) -> None:
    """Remove what nobody has written to for some time and no record names: a killed appender's."""
    for path in safe_path(root, f"{FILES}/{variant_id}").glob("*"):
        with contextlib.suppress(OSError):
            if not path.is_symlink() and path.is_dir() and not is_fresh(path):
                gone = temporary(path.parent)
                os.rename(path, gone)
                if os.path.lexists(_record_path(root, variant_id)):  # it only slept, and has ended meanwhile
                    os.rename(gone, path)
                    continue
                shutil.rmtree(gone, ignore_errors=True)
    for folder in (root / VARIANTS, root / EVIDENCE / variant_id):
        for path in folder.glob(f"{TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if not path.is_dir() and time.time() - path.lstat().st_mtime >= ABANDONED_S:
                    path.unlink()


def _write_evidence(folder: Path, evidence: Evidence) -> str:
    path = folder / evidence_name()
    write_once(path, to_json(evidence).encode())
    return f"{EVIDENCE}/{evidence.variant}/{path.name}"


def _record_path(root: Path, variant_id: str) -> Path:
    return safe_path(root, f"{VARIANTS}/{variant_id}.json")
