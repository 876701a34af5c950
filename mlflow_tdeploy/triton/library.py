"""What a front carries so that a stock Triton runs it: the serving core and the tokenizer library, as they are here."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError, MissingDependencyError, SessionError
from mlflow_tdeploy.store.disk import own_folder, storage_errors
from mlflow_tdeploy.store.staging import staged_directory


@functools.cache
def library(packages: tuple[str, ...] = ()) -> Path:
    """Return a folder with the library, whose name says its content; put together once per host and version.

    Args:
        packages: What the task needs besides, see :func:`check_packages`. Pillow lies in a folder of its own, for
            servers that have none: it is for this Python's version.

    Raises:
        SessionError: This host's tokenizer library runs on no Triton server.
        MissingDependencyError: A package is not installed here.
        StorageError: The disk is full or refuses.
    """
    if sys.platform != "linux":
        raise SessionError(
            f"Triton runs on Linux, and the tokenizer library of this host is for {platform.system()}: it cannot be "
            f"handed to a server. Render and deploy on Linux."
        )
    files = dict(_files() + (_pillow() if "pillow" in packages else []))
    digest = hashlib.sha256()
    for name, source in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(source.read_bytes()).hexdigest()}\n".encode())
    target = own_folder("triton") / f"library-{digest.hexdigest()[:16]}"
    if not target.is_dir():
        with contextlib.suppress(ConflictError), staged_directory(target) as fresh:  # another process may be as far
            _write(files, fresh)
    return target


def check_packages(packages: Sequence[str]) -> None:
    """Make sure that a server has, or a front can carry, what a task needs besides.

    Raises:
        InvalidInputError: It takes transformers.
    """
    if "transformers" in packages:
        raise InvalidInputError(
            "The model's tokenizer has no fast form and takes transformers, and Triton's Python has none. Serve it "
            "with mlflow models serve, or log it with task='tensors' and tokenize in the client."
        )


def _files() -> list[tuple[str, Path]]:
    core = Path(__file__).parent.parent / "core"
    found = [(f"mlflow_tdeploy/core/{path.relative_to(core).as_posix()}", path) for path in sorted(core.rglob("*.py"))]
    return found + _below("tokenizers", _home("tokenizers", "tokenizers"))


def _pillow() -> list[tuple[str, Path]]:
    """Return Pillow and the libraries that its wheel brings, which lie beside it."""
    home = _home("PIL", "pillow")
    return _below("pillow/PIL", home) + _below("pillow/pillow.libs", home.parent / "pillow.libs")


def _home(module: str, distribution: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(distribution, "A front for Triton", f"pip install {distribution}")
    return Path(next(iter(found.submodule_search_locations)))


def _below(name: str, folder: Path) -> list[tuple[str, Path]]:
    there = [path for path in sorted(folder.rglob("*")) if path.suffix == ".py" or ".so" in path.suffixes]
    return [(f"{name}/{path.relative_to(folder).as_posix()}", path) for path in there]


def _write(files: dict[str, Path], folder: Path) -> None:
    with storage_errors(f"write '{folder}'"):
        for name, source in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        # the package's own __init__ is the flavor, which needs MLflow
        (folder / "mlflow_tdeploy" / "__init__.py").write_text('"""The serving core, apart from its package."""\n')
