"""``download_variant``: the files of one variant, as they were logged."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.registry_io import locate, mlflow_errors, open_records
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import verify_file
from mlflow_tdeploy.store.layout import safe_path
from mlflow_tdeploy.store.staging import refuse_taken, staged_directory


@mlflow_errors()
def download_variant(model_uri: str, variant: str, dst_path: str | Path) -> str:
    """Write the files of one variant of a logged or registered model to a folder; no other variant is downloaded.

    A graph or a plan lies directly in it, with what belongs to it; a Triton repository is what it was when it was
    logged, empty folders included. Every file is checked against its recorded hash.

    Args:
        model_uri: The model, see :func:`extend_model`.
        variant: Id of the variant.
        dst_path: Folder to write; it must not exist or be empty.

    Returns:
        The folder's path.

    Raises:
        MlflowException: There is no such model or variant, its files were not kept or were changed, or the folder
            cannot be written. Then it does not exist.
    """
    refuse_taken(Path(dst_path))
    bundle, fetch = open_records(locate(model_uri))
    record = bundle.variants.get(variant)
    if record is None or record.dropped:
        why = bundle.absent.get(variant) or ("its files were not kept" if record else "there is none of that id")
        having = ", ".join(sorted(one.id for one in bundle.variants.values() if not one.dropped))
        raise InvalidInputError(f"Variant '{variant}' of '{model_uri}' cannot be had: {why}. It has: {having}.")
    if fetch is not None:
        fetch(record)
    bundle.verify(record)
    with staged_directory(Path(dst_path)) as folder:
        _copy(bundle, record.id, folder)
    return str(dst_path)


def _copy(bundle: Bundle, variant_id: str, folder: Path) -> None:
    variant = bundle.variants[variant_id]
    own = {file.path: file for file in variant.files}
    top = variant.entry.rpartition("/")[0] if variant.entry in own else variant.entry
    for path in (*own, *variant.folders):
        target = safe_path(folder, path.removeprefix(f"{top}/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in own:
            shutil.copyfile(bundle.path(path), target)
            verify_file(target, own[path])
            if path in variant.executables:
                target.chmod(target.stat().st_mode | 0o111)
        else:
            target.mkdir(exist_ok=True)
