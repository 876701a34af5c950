"""A version of a model as Triton models: the graph, which is loaded once, and the stable name in front of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError, NoVariantError, shown
from mlflow_tdeploy.core.manifest import MANIFEST
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays, numpy_dtype
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES, Runtime, TritonBackend
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.disk import link_own_or_copy, storage_errors
from mlflow_tdeploy.store.layout import safe_path
from mlflow_tdeploy.store.staging import staged_directory
from mlflow_tdeploy.triton.config import Warmup, batch_dim, front_config, graph_config, to_text
from mlflow_tdeploy.triton.library import library
from mlflow_tdeploy.triton.options import TritonOptions

CONFIG = "config.pbtxt"
#: In a version's folder of the stable name: what its front needs to know, and the configuration to answer with it.
FACTS, ROUTED = "front.json", "route.pbtxt"
#: Ends the name of the model in which a version's front is tried.
TRIAL = ".check"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_GRAPH_NAME = re.compile(r"(.+)\.v([1-9][0-9]*)")
_FRONT = Path(__file__).parent / "front" / "model.py"
#: Triton's versions are positive numbers of 63 bits.
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Deployable:
    """A version that may be rendered.

    Attributes:
        bundle: The model; the variant's files are there.
        variant: What serves.
        runtime: What would open it on a host like the server.
        name: The stable name.
        version: Its number.
        about: What it is and where it is from, for its configuration.
    """

    bundle: Bundle
    variant: Variant
    runtime: type[Runtime]
    name: str
    version: int
    about: Mapping[str, str]

    @property
    def graph_name(self) -> str:
        """Name of the Triton model that is this version's graph."""
        return f"{self.name}.v{self.version}"


def check_name(name: str) -> str:
    """Return a deployment's name, if it can be one.

    Raises:
        InvalidInputError: It is no plain folder name, or ends as the name of a version does.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise InvalidInputError(
            f"Invalid deployment name {shown(name)}: use 1 to 128 of A-Z, a-z, 0-9, '.', '_', '-', starting with a "
            f"letter or digit; no '/' and no '..'."
        )
    if name.endswith(TRIAL):
        raise InvalidInputError(
            f"Invalid deployment name {shown(name)}: names that end in '{TRIAL}' are for trying versions."
        )
    if _GRAPH_NAME.fullmatch(name):
        raise InvalidInputError(
            f"Invalid deployment name {shown(name)}: '{name}' is what version {name.rpartition('.v')[2]} of "
            f"'{name.rpartition('.v')[0]}' is called. Choose another one."
        )
    return name


def check_version(version: int) -> int:
    """Return a version, if Triton can have it.

    Raises:
        InvalidInputError: It is no positive number.
    """
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= _LARGEST:
        raise InvalidInputError(f"A version is a whole number from 1 on, got {shown(version)}.")
    return version


def triton_runtime(variant: Variant) -> type[Runtime]:
    """Return the runtime that stands for what opens a variant in Triton.

    Raises:
        NoVariantError: Nothing opens it there.
    """
    for runtime in RUNTIMES:
        opens = variant.format in runtime.formats and runtime.triton is not None
        if opens and (runtime.tier == 0) == (variant.device == "cuda"):
            return runtime
    raise NoVariantError(f"Variant '{variant.id}' ({variant.format}) is none that a Triton server opens.")


def render(what: Deployable, out: Path, options: TritonOptions | None = None) -> None:
    """Write a version and the stable name in front of it as a Triton repository.

    Files of this package's cache are hard links where that is possible: of a model from a remote store, a repository on
    the same file system takes no room. Files of anybody else are copied, as they may be changed.

    Args:
        what: The version.
        out: Folder to write; new or empty.
        options: How it is served.

    Raises:
        InvalidInputError: A name, version or option cannot be used.
        NoVariantError: Triton does not open the variant.
        IntegrityError: A file of it was changed.
        ConflictError: The folder is not empty.
        StorageError: The disk is full or refuses.
    """
    options = options or TritonOptions()
    check_name(what.name)
    check_version(what.version)
    with staged_directory(out) as fresh, storage_errors(f"write '{out}'"):
        write_graph(what, fresh / what.graph_name, options)
        write_front(what, fresh / what.name, options)
        (fresh / what.name / CONFIG).write_text(route_text(what, options))


def write_graph(what: Deployable, folder: Path, options: TritonOptions) -> None:
    """Write the Triton model that is a version's graph.

    Raises:
        NoVariantError: Triton does not open the variant.
        IntegrityError: A file of it was changed.
    """
    backend = _backend(what)
    what.bundle.verify(what.variant)
    files = folder / str(what.version)
    files.mkdir(parents=True)
    top = what.variant.entry.rpartition("/")[0]
    for record in what.variant.files:
        target = safe_path(files, record.path.removeprefix(f"{top}/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        link_own_or_copy(what.bundle.path(record.path), target)
    warmup = _write_warmup(what, folder / "warmup") if options.warmup else ()
    config = graph_config(
        what.graph_name,
        what.version,
        what.bundle.manifest.signature,
        what.variant,
        backend,
        options,
        gpu=what.runtime.tier == 0,
        warmup=warmup,
        about={"variant": what.variant.id, "digest": what.variant.digest, **what.about},
    )
    (folder / CONFIG).write_text(to_text(config))


def write_front(what: Deployable, folder: Path, options: TritonOptions) -> None:
    """Write what a version adds to the stable name's model, all but the configuration, which says the route."""
    lib = library()
    for source in sorted(path for path in lib.rglob("*") if path.is_file()):
        target = folder / lib.name / source.relative_to(lib)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_own_or_copy(source, target)
    own = folder / str(what.version)
    own.mkdir(parents=True)
    link_own_or_copy(_FRONT, own / "model.py")
    link_own_or_copy(what.bundle.path(MANIFEST), own / MANIFEST)
    for record in what.bundle.manifest.assets:
        target = safe_path(own, record.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_own_or_copy(what.bundle.path(record.path), target)
    runtime = what.runtime()
    facts = {
        "graph": what.graph_name,
        "library": lib.name,
        "batched": batch_dim(what.bundle.manifest.signature) is not None,
        "dtypes": dict(what.variant.dtypes),
        "token_budget": options.token_budget or what.variant.token_budget or runtime.token_budget,
        "workers": max(1, options.instances),
    }
    (own / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    (own / ROUTED).write_text(route_text(what, options))


def route_text(what: Deployable, options: TritonOptions) -> str:
    """Return the configuration of the stable name that has requests answered by a version."""
    task = what.bundle.task()
    return to_text(front_config(what.name, task, [what.version], options, _about(task)))


def _about(task: Task) -> dict[str, str]:
    """Return what a client has to know of a task to ask it as the loader is asked."""
    return {"task": task.name, "takes": task.input_kind, "answers": task.answer_form().kind}


def _backend(what: Deployable) -> TritonBackend:
    if what.variant.dropped:
        raise NoVariantError(f"Variant '{what.variant.id}' is over its budget, so its files were not kept.")
    if what.runtime.triton is None:
        raise NoVariantError(f"Triton has nothing like the runtime '{what.runtime.name}'.")
    if what.variant.shared:
        raise NoVariantError(
            f"Variant '{what.variant.id}' takes its weights from another graph, which Triton's TensorRT backend cannot "
            f"do. Build the engine with its weights."
        )
    return what.runtime.triton


def _write_warmup(what: Deployable, folder: Path) -> list[Warmup]:
    """Write the golden requests as raw tensors, one row each, or whole where requests are not batched."""
    signature = what.bundle.manifest.signature
    rows = batch_dim(signature)
    found = []
    for index, request in enumerate(what.bundle.golden()[:4]):
        feeds = {
            name: array.astype(numpy_dtype(what.variant.dtypes.get(name, array.dtype.name)))
            for name, array in request.feeds.items()
        }
        inputs: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for name, array in _of_one_row(feeds, rows).items():
            folder.mkdir(exist_ok=True)
            file = f"{index}-{re.sub(r'[^A-Za-z0-9_]', '_', name)}"
            (folder / file).write_bytes(np.ascontiguousarray(array).tobytes())
            inputs[name] = (array.dtype.name, array.shape, file)
        count = min(len(next(iter(feeds.values()))), signature.dim(rows).max) if rows else 0
        found.append(Warmup(f"golden-{index}", count, inputs))
    return found


def _of_one_row(feeds: Arrays, rows: str | None) -> Arrays:
    """Return a request without its rows, which Triton repeats by itself."""
    return {name: array[0] for name, array in feeds.items()} if rows else feeds


def graph_of(model: str) -> tuple[str, int] | None:
    """Return stable name and version of a Triton model that is a version's graph by its name, or None."""
    found: Any = _GRAPH_NAME.fullmatch(model)
    return (found[1], int(found[2])) if found else None
