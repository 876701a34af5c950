"""A task from the folder of a deployed version: its manifest, and its assets as that says."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlflow_tdeploy.core.errors import IntegrityError
from mlflow_tdeploy.core.manifest import ASSETS, MANIFEST, Manifest
from mlflow_tdeploy.core.tasks import TASKS, Task


def open_task(folder: str | Path, most_rows: int = 0) -> Task:
    """Return the task of a version, ready for requests.

    Args:
        folder: With ``manifest.json`` and the assets that it names.
        most_rows: Where a server joins requests, how many rows its graph takes at once; 0 for as many as it says.

    Raises:
        IntegrityError: An asset is missing or is not what the manifest says.
        ManifestError: The manifest is damaged.
    """
    root = Path(folder)
    manifest = Manifest.read((root / MANIFEST).read_bytes())
    for record in manifest.assets:
        try:
            content = (root / record.path).read_bytes()
        except OSError as error:
            raise IntegrityError(
                f"'{record.path}' of this version cannot be read: {error}. Deploy it again."
            ) from error
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise IntegrityError(f"'{record.path}' of this version was changed. Deploy it again.")
    signature, rows = manifest.signature, manifest.signature.batch_dim
    if rows and most_rows:
        signature = signature.limited(rows, most_rows)
    task = TASKS.get(manifest.task)(manifest.task_config, signature, root / ASSETS)
    task.prepare()
    return task
