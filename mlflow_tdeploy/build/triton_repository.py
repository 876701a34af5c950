"""A Triton model repository that exists already, kept as a variant: nothing in it is read as a model or changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.stage import Staged
from mlflow_tdeploy.build.workshop import Workshop
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.probe import library_versions
from mlflow_tdeploy.store.disk import storage_errors
from mlflow_tdeploy.store.hashing import record_tree
from mlflow_tdeploy.store.layout import FILES

_CONFIG = "config.pbtxt"
#: Nobody asked the files: which precision they compute with is theirs to know.
_UNKNOWN = Precision("unknown", "unknown")


def model_names(repository: Path) -> list[str]:
    """Return the models of a Triton repository.

    See https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html:
    a folder for each, with a ``config.pbtxt`` or, where Triton makes that itself, a numbered folder for each version.

    Raises:
        InvalidInputError: There is none, or the folder is a single model.
    """
    if _is_model(repository):
        raise InvalidInputError(
            f"'{repository}' is a single Triton model. Give the repository, the folder '{repository.name}' lies in."
        )
    found = sorted(entry.name for entry in repository.iterdir() if entry.is_dir() and _is_model(entry))
    if not found:
        raise InvalidInputError(
            f"'{repository}' is no Triton repository: none of its folders holds a {_CONFIG} or a numbered version."
        )
    return found


def _is_model(folder: Path) -> bool:
    return (folder / _CONFIG).is_file() or any(entry.is_dir() and entry.name.isdecimal() for entry in folder.iterdir())


def stage_repository(shop: Workshop, new_id: str, repository: Path) -> Staged:
    """Copy a Triton repository below ``staged/files/<id>`` of a workshop's folder and record it, empty folders too.

    Raises:
        InvalidInputError: It is no repository, or holds a link: where that leads is not the bundle's to say.
        StorageError: The disk is full or refuses.
    """
    root = shop.work / "staged"
    target = root / FILES / new_id
    with shop.step(f"take {new_id}") as detail:
        names = model_names(repository)
        _refuse_links(repository)
        with storage_errors(f"write '{target}'"):
            shutil.copytree(repository, target, symlinks=True)
        files = record_tree(root, f"{FILES}/{new_id}")
        variant = Variant(
            id=new_id,
            format="triton",
            precision=_UNKNOWN,
            device="any",
            entry=f"{FILES}/{new_id}",
            files=files,
            executables=tuple(file.path for file in files if os.access(root / file.path, os.X_OK)),
            folders=_empty_folders(root, target),
            created=now(),
            made_with=library_versions(),
        )
        if not variant.files:
            raise InvalidInputError(f"'{repository}' holds no file.")
        detail.append(f"{variant.size / 1e6:.0f} MB, {', '.join(names)}; served by Triton, so not checked here")
    return Staged(variant, root, Graph(target, _UNKNOWN))


def _refuse_links(repository: Path) -> None:
    for folder, folders, files in os.walk(repository):
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise InvalidInputError(
                    f"'{path.relative_to(repository)}' in '{repository}' is a link or no plain file. Put the file "
                    f"itself there."
                )


def _empty_folders(root: Path, target: Path) -> tuple[str, ...]:
    return tuple(
        sorted(
            Path(folder).relative_to(root).as_posix() for folder, below, files in os.walk(target) if not below + files
        )
    )
