"""Names inside a bundle, and the one way from a recorded path to a file."""

from __future__ import annotations

import os
from pathlib import Path

from mlflow_tdeploy.core.errors import IntegrityError
from mlflow_tdeploy.core.manifest import ASSETS as ASSETS
from mlflow_tdeploy.core.manifest import MANIFEST as MANIFEST
from mlflow_tdeploy.core.variant import check_relative

ROOT = "tdeploy"
VARIANTS = "variants"
EVIDENCE = "evidence"
FILES = "files"
SOURCE = "source"
GOLDEN = "golden"
#: Copies of all files but those of variants and the source, in one, as they were when the model was logged.
PACK = "records.zip"
#: The sign that records were added since.
ADDED = "added.txt"

#: What is not finished yet has a name that starts like this; a reader skips every name with a leading dot.
TEMPORARY = ".tdeploy-"
#: Seconds without a change after which that is what a killed process left.
ABANDONED_S = 3600.0


def safe_path(root: Path, relative: str) -> Path:
    """Return the file of a bundle that a recorded path names; it need not exist.

    Args:
        root: The bundle's folder.
        relative: A path out of a record: not trusted.

    Raises:
        InvalidInputError: The path is absolute, has ``..`` or is otherwise no plain relative path.
        IntegrityError: A symbolic link on the way leads out of ``root``.
    """
    path = Path(root)
    inside = os.path.realpath(root)
    for part in check_relative(relative).split("/"):
        path = path / part
        if os.path.islink(path) and not _is_below(os.path.realpath(path), inside):
            raise IntegrityError(
                f"'{relative}' leads out of the bundle '{root}' through the symbolic link '{path}'. "
                f"A bundle holds its own files only: replace the link by the file, or download the model again."
            )
    return path


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
