"""Up: one more variant for a logged or registered model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError, NotFoundError
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.registry_io.location import Location, locate
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.disk import storage_errors
from mlflow_tdeploy.store.hashing import verify_file
from mlflow_tdeploy.store.layout import ADDED, EVIDENCE, FILES, PACK, ROOT, VARIANTS, safe_path
from mlflow_tdeploy.store.pack import write_sign
from mlflow_tdeploy.store.writer import append_evidence as append_local
from mlflow_tdeploy.store.writer import append_variant, evidence_name, moved, own_files


def append(
    model: str | Path | Location, variant: Variant, staged: Path | None, evidence: Sequence[Evidence]
) -> Variant:
    """Add a variant to a logged or registered model, its record last; no file of the model changes.

    In an artifact store behind a server the files get a folder of their own, so that two hosts that append the
    same id at once never mix them. Such a store has no exclusive create: should both write their record within
    the same moment, the later one stays, and it is whole.

    Args:
        model: Its URI, or where it was located: an alias may point elsewhere by now.
        variant: Its record.
        staged: A folder laid out like a bundle with the new files (``files/<id>/…``); None for none.
        evidence: What was measured about the variant.

    Returns:
        The record as it was written.

    Raises:
        ConflictError: The model has a variant of that id.
        InvalidInputError: The model's store cannot be written to.
    """
    location = model if isinstance(model, Location) else locate(model)
    if location.local is not None:
        return append_variant(Bundle.open(location.local).root, variant, staged, evidence)
    if staged is not None:
        for record in variant.files:
            verify_file(safe_path(staged, record.path), record)
    return _append_remote(location, variant, staged, evidence)


def append_evidence(location: Location, evidence: Sequence[Evidence]) -> None:
    """Add measurements of variants to a logged or registered model; no file of it changes.

    Raises:
        NotFoundError: The model has no such variant.
        InvalidInputError: The model's store cannot be written to.
    """
    if location.local is not None:
        root = Bundle.open(location.local).root
        for item in evidence:
            append_local(root, item)
        return
    names = _variant_files(location)
    if missing := [item.variant for item in evidence if f"{item.variant}.json" not in names]:
        raise NotFoundError(f"'{location.uri}' has no variant '{missing[0]}' to add a measurement to.")
    with tempfile.TemporaryDirectory(prefix="tdeploy-append-") as folder:
        _note_added(location, Path(folder))
        for item in evidence:
            written = _write_record(Path(folder), f"{EVIDENCE}/{item.variant}/{evidence_name()}", item)
            _upload(location, written, f"{EVIDENCE}/{item.variant}")


def put_beside(location: Location, folder: Path) -> str:
    """Put files into a logged or registered model, beside its bundle; files and folders of their names are replaced.

    Args:
        location: The model.
        folder: Holds them, and folders with more of them.

    Returns:
        Where they are.

    Raises:
        InvalidInputError: The model's store cannot be written to.
        StorageError: The disk is full or refuses.
    """
    if location.local is not None:
        root = Bundle.open(location.local).root.parent
        with storage_errors(f"write '{root}'"):
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(root / path.name, ignore_errors=True)
            shutil.copytree(folder, root, dirs_exist_ok=True)
        return str(root)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            with contextlib.suppress(Exception):  # what cannot be removed is only old
                location.repository.delete_artifacts(path.name)
        _send(location, path, path.name if path.is_dir() else "")
    return location.uri


def _append_remote(location: Location, variant: Variant, staged: Path | None, evidence: Sequence[Evidence]) -> Variant:
    _refuse_existing(location, variant.id)
    own = own_files(variant.id)
    uploaded: list[str] = []
    record: Path | None = None
    with tempfile.TemporaryDirectory(prefix="tdeploy-append-") as folder:
        try:
            if staged is not None and variant.files:
                uploaded.append(own)
                _upload(location, staged / FILES / variant.id, own)
                variant = moved(variant, own)
            _refuse_existing(location, variant.id)
            _note_added(location, Path(folder))
            for item in evidence:
                written = _write_record(Path(folder), f"{EVIDENCE}/{variant.id}/{evidence_name()}", item)
                uploaded.append(f"{EVIDENCE}/{variant.id}/{written.name}")
                _upload(location, written, f"{EVIDENCE}/{variant.id}")
            record = _write_record(Path(folder), f"{VARIANTS}/{variant.id}.json", variant)
            _upload(location, record, VARIANTS)
        except BaseException:
            # The reply may be lost, or come before the store is done: then the variant is, or will be, there and needs
            # its files. Those of one that is not only take room.
            if record is None or _is_anothers(location, variant.id, record):
                for path in uploaded:  # without a record nobody reads it: what cannot be removed only takes room
                    with contextlib.suppress(Exception):
                        location.repository.delete_artifacts(f"{ROOT}/{path}")
            raise
    return variant


def _note_added(location: Location, scratch: Path) -> None:
    """Leave the sign that there will be records beside the pack: who sees it looks for them."""
    names = {entry.path.rpartition("/")[2] for entry in location.repository.list_artifacts(ROOT)}
    if PACK in names and ADDED not in names:
        _upload(location, write_sign(scratch), "")


def _is_anothers(location: Location, variant_id: str, record: Path) -> bool:
    """Tell whether the store has another host's record of that id, so that this one is not needed."""
    name = f"{VARIANTS}/{variant_id}.json"
    try:
        with tempfile.TemporaryDirectory(prefix="tdeploy-append-") as folder:
            found = Path(location.repository.download_artifacts(f"{ROOT}/{name}", folder))
            return found.read_bytes() != record.read_bytes()
    except Exception:  # there is none, or it cannot be read just now
        return False


def _write_record(folder: Path, relative: str, record: Any) -> Path:
    """Write a record into a scratch folder and return its path."""
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(record), encoding="utf-8")
    return path


def _upload(location: Location, path: Path, target: str) -> None:
    _send(location, path, f"{ROOT}/{target}".rstrip("/"))


def _send(location: Location, path: Path, target: str) -> None:
    repository = location.repository
    try:
        send = repository.log_artifacts if path.is_dir() else repository.log_artifact
        send(str(path), target or None)
    except ValueError as error:  # what MLflow raises for registries that are read-only
        raise InvalidInputError(
            f"The artifact store of '{location.uri}' takes no further files ({error}). Log a new version instead."
        ) from error


def _refuse_existing(location: Location, variant_id: str) -> None:
    names = _variant_files(location)
    if not names:
        raise NotFoundError(f"'{location.uri}' holds no bundle to add a variant to.")
    if f"{variant_id}.json" in names:
        raise ConflictError(
            f"'{location.uri}' has a variant '{variant_id}' already; variants are never replaced. Choose another id."
        )


def _variant_files(location: Location) -> set[str]:
    return {entry.path.rsplit("/", 1)[-1] for entry in location.repository.list_artifacts(f"{ROOT}/{VARIANTS}")}
