"""A model's folder in a repository: what is there, what is not, and nothing that is another model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError
from mlflow_tdeploy.deploy.files import RepositoryFiles
from mlflow_tdeploy.store.hashing import record_file
from mlflow_tdeploy.store.layout import TEMPORARY

#: Lists a model's files with their hashes; who has it is ours, and whole if it says so.
INDEX = "tdeploy.json"


@dataclass(frozen=True)
class Index:
    """What a model's folder holds.

    Attributes:
        files: Hash by path; empty for a file that may change.
        whole: Whether all of them are there.
        sizes: Bytes by path, of those that do not change.
    """

    files: Mapping[str, str]
    whole: bool
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """What publishing has moved.

    Attributes:
        files: How many.
        size: Bytes.
    """

    files: int = 0
    size: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.files + other.files, self.size + other.size)


def read_index(files: RepositoryFiles, model: str) -> Index | None:
    """Return what a model's folder says that it holds; None where it is not ours, or not there.

    Raises:
        IntegrityError: It is damaged.
    """
    content = files.read(f"{model}/{INDEX}")
    if content is None:
        return None
    try:
        found = json.loads(content)
        listed = {str(path): str(digest) for path, digest in found["files"].items()}
        sizes = {str(path): int(size) for path, size in found.get("sizes", {}).items()}
        return Index(listed, found["whole"] is True, sizes)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise IntegrityError(
            f"'{model}/{INDEX}' in '{files.url}' is damaged ({error}): whose files these are is not known. Remove the "
            f"folder, and deploy again."
        ) from error


def require_ours(files: RepositoryFiles, model: str) -> Index | None:
    """Return a model's index, None where nothing is there.

    Raises:
        ConflictError: Somebody else's model is.
    """
    index = read_index(files, model)
    if index is None and files.below(model):
        raise ConflictError(
            f"'{files.url}' has a model '{model}' that was not deployed by mlflow-tdeploy. Deploy under another "
            f"name; what is there stays as it is."
        )
    return index


def publish(files: RepositoryFiles, model: str, folder: Path, *, keep: bool = False) -> Sent:
    """Make a model's folder what a folder of this host is; what is there already is not sent again.

    Every file appears whole, and the index says last that all are there: after a kill, the next call completes it.

    Args:
        files: The repository.
        model: Name of the model.
        folder: What it shall hold.
        keep: Leave other files of the model where they are.

    Raises:
        ConflictError: A model of somebody else has the name.
        StorageError: The storage is full or refuses.
    """
    before = require_ours(files, model)
    had: Mapping[str, str] = before.files if before is not None else {}
    lacking = set(missing(files, model))
    there = {path: digest for path, digest in had.items() if path not in lacking}
    there = there if before is not None and before.whole else {}
    wanted = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes = {**(before.sizes if before else {}), **{path: file.stat().st_size for path, file in wanted.items()}}
    digests = {path: record_file(folder, path).sha256 for path in wanted}
    changed = [path for path, digest in digests.items() if there.get(path) != digest]
    gone = [] if keep else [path for path in had if path not in wanted]
    if not changed and not gone:
        return Sent()
    _write_index(files, model, {**had, **digests}, sizes, whole=False)
    if before is not None and not before.whole:
        _sweep(files, model)
    for path in changed:
        files.put(f"{model}/{path}", wanted[path])
    for path in gone:
        files.remove(f"{model}/{path}")
    after = {path: digest for path, digest in {**had, **digests}.items() if path not in gone}
    _write_index(files, model, after, sizes, whole=True)
    return Sent(len(changed), sum(sizes[path] for path in changed))


def missing(files: RepositoryFiles, model: str) -> list[str]:
    """Return the files that a model's index names and that are not there, or of another size."""
    index = read_index(files, model)
    if index is None:
        return []
    there = files.below(model)
    return [path for path in index.files if path not in there or there[path] != index.sizes.get(path, there[path])]


def publish_copy(files: RepositoryFiles, source: str, model: str, folder: Path) -> None:
    """Make a model of files that another model of the repository has; nothing is sent.

    Args:
        files: The repository.
        source: The model that has them.
        model: The model to make.
        folder: A folder of this host with files of those names.

    Raises:
        ConflictError: A model of somebody else has the name.
        StorageError: The storage is full or refuses.
    """
    require_ours(files, model)
    index = read_index(files, source) or Index({}, whole=False)
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = {path: index.files[path] for path in paths}
    _write_index(files, model, listed, index.sizes, whole=False)
    for path in paths:
        files.copy(f"{source}/{path}", f"{model}/{path}")
    _write_index(files, model, listed, index.sizes, whole=True)


def _sweep(files: RepositoryFiles, model: str) -> None:
    """Remove what a killed deployer was writing."""
    for path in files.below(model):
        if path.rpartition("/")[2].startswith(TEMPORARY):
            files.remove(f"{model}/{path}")


def remove(files: RepositoryFiles, model: str, below: str = "") -> None:
    """Remove a model of ours, or what it holds below a folder; the index goes last, so that a second call ends it.

    Raises:
        ConflictError: It is somebody else's.
    """
    index = require_ours(files, model)
    if index is None:
        return
    gone = [path for path in index.files if path.startswith(below)]
    rest = {path: digest for path, digest in index.files.items() if path not in gone}
    if below:
        _write_index(files, model, index.files, index.sizes, whole=False)
    made = [path for path in files.below(model) if path.startswith(below) and path != INDEX]
    for path in dict.fromkeys([*gone, *made]):  # what the server has made of them (__pycache__), and a killed deployer
        files.remove(f"{model}/{path}")
    if below:
        _write_index(files, model, rest, index.sizes, whole=True)
    else:
        files.remove(f"{model}/{INDEX}")


def write_file(files: RepositoryFiles, model: str, path: str, content: bytes) -> None:
    """Write a small file of a model that may change, such as its configuration, and have the index name it."""
    index = require_ours(files, model) or Index({}, whole=True)
    if index.files.get(path) != "":
        sizes = {name: size for name, size in index.sizes.items() if name != path}
        _write_index(files, model, {**index.files, path: ""}, sizes, whole=index.whole)
    files.write(f"{model}/{path}", content)


def _write_index(
    files: RepositoryFiles, model: str, listed: Mapping[str, str], sizes: Mapping[str, int], *, whole: bool
) -> None:
    known = {path: sizes[path] for path in sorted(listed) if path in sizes}
    content = json.dumps({"files": dict(sorted(listed.items())), "sizes": known, "whole": whole}, indent=1) + "\n"
    files.write(f"{model}/{INDEX}", content.encode())
