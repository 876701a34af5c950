"""What a front carries so that a stock Triton runs it: the serving core and the tokenizer library, as they are here."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import platform
import shutil
import sys
from pathlib import Path

from mlflow_tdeploy.core.errors import ConflictError, MissingDependencyError, SessionError
from mlflow_tdeploy.store.disk import own_folder, storage_errors
from mlflow_tdeploy.store.staging import staged_directory


@functools.cache
def library() -> Path:
    """Return a folder with the library, whose name says its content; put together once per host and version.

    Raises:
        SessionError: This host's tokenizer library runs on no Triton server.
        StorageError: The disk is full or refuses.
    """
    if sys.platform != "linux":
        raise SessionError(
            f"Triton runs on Linux, and the tokenizer library of this host is for {platform.system()}: it cannot be "
            f"handed to a server. Render and deploy on Linux."
        )
    files = dict(_files())
    digest = hashlib.sha256()
    for name, source in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(source.read_bytes()).hexdigest()}\n".encode())
    target = own_folder("triton") / f"library-{digest.hexdigest()[:16]}"
    if not target.is_dir():
        with contextlib.suppress(ConflictError), staged_directory(target) as fresh:  # another process may be as far
            _write(files, fresh)
    return target


def _files() -> list[tuple[str, Path]]:
    core = Path(__file__).parent.parent / "core"
    found = [(f"mlflow_tdeploy/core/{path.relative_to(core).as_posix()}", path) for path in sorted(core.rglob("*.py"))]
    tokenizers = importlib.util.find_spec("tokenizers")
    if tokenizers is None or not tokenizers.submodule_search_locations:
        raise MissingDependencyError("tokenizers", "A front for Triton", "pip install tokenizers")
    home = Path(next(iter(tokenizers.submodule_search_locations)))
    there = [path for path in sorted(home.rglob("*")) if path.suffix in (".py", ".so")]
    return found + [(f"tokenizers/{path.relative_to(home).as_posix()}", path) for path in there]


def _write(files: dict[str, Path], folder: Path) -> None:
    with storage_errors(f"write '{folder}'"):
        for name, source in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        # the package's own __init__ is the flavor, which needs MLflow
        (folder / "mlflow_tdeploy" / "__init__.py").write_text('"""The serving core, apart from its package."""\n')
