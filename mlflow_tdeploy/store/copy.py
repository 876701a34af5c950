"""A finished bundle into a new folder: what its records name, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlflow_tdeploy.core.variant import FileRecord
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.disk import storage_errors
from mlflow_tdeploy.store.hashing import HashCache, verify_file
from mlflow_tdeploy.store.layout import safe_path


def copy_bundle(bundle: Bundle, root: Path) -> None:
    """Copy records and recorded files, each checked; whatever else lies in the folder stays behind.

    So do variants whose record cannot be read here, of which the bundle has warned: their files cannot be checked.

    Args:
        bundle: A finished bundle.
        root: The new ``tdeploy`` folder, inside a :func:`~mlflow_tdeploy.store.writer.staged_directory`.

    Raises:
        IntegrityError: A recorded file is missing, changed, or a link out of the bundle.
        ManifestError: The golden requests cannot be read.
        StorageError: The disk is full or refuses.
    """
    bundle.verify_assets()
    bundle.golden()
    cache = HashCache()  # the copy is hashed without it
    for variant in bundle.variants.values():
        bundle.verify(variant, cache)
    manifest = bundle.manifest
    variants = bundle.variants.values()
    recorded: dict[str, FileRecord] = {
        record.path: record
        for record in (*manifest.assets, *manifest.golden, *(file for v in variants for file in v.needed))
    }
    with storage_errors(f"write '{root}'"):
        for relative in (*recorded, *bundle.record_paths()):
            target = safe_path(root, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(relative), target)
            if relative in recorded:
                verify_file(target, recorded[relative])
