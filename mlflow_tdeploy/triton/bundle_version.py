"""A version of a logged model: a variant's graph, and our front with the task's tokenizer and post-processing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.columns import Column
from mlflow_tdeploy.core.errors import NoVariantError
from mlflow_tdeploy.core.hardware import Fingerprint, host_cpu
from mlflow_tdeploy.core.manifest import MANIFEST
from mlflow_tdeploy.core.records import to_json, to_plain
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays, numpy_dtype
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES, Runtime, TritonBackend
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.disk import link_own_or_copy
from mlflow_tdeploy.store.layout import safe_path
from mlflow_tdeploy.triton.config import Warmup, front_config, graph_config, most_rows, rows_dim, to_text
from mlflow_tdeploy.triton.library import library
from mlflow_tdeploy.triton.names import CONFIG, FACTS, ROUTED
from mlflow_tdeploy.triton.options import TritonOptions
from mlflow_tdeploy.triton.repository import Deployable

_FRONT = Path(__file__).parent / "front" / "model.py"


@dataclass(frozen=True)
class BundleVersion(Deployable):
    """A version of a logged model.

    Attributes:
        bundle: The model; the variant's files are there.
        variant: What serves.
        runtime: What would open it on a host like the server.
        host: What the server's host is, as far as it is known; a CPU like this one where nobody says.
        cores: The server's processors where it or the user says so, else 0. What a version is made of does not depend
            on them: a server may move to another host.
    """

    bundle: Bundle
    variant: Variant
    runtime: type[Runtime]
    host: Fingerprint = field(default_factory=host_cpu)
    cores: int = 0

    def most_rows(self, options: TritonOptions) -> int:
        """Return how many rows a run of the graph has at most; 0 where Triton joins no requests."""
        signature = self.bundle.manifest.signature
        return most_rows(signature, self.rows_dim(options), options)

    def rows_dim(self, options: TritonOptions) -> str | None:
        """Return the dimension along which Triton joins requests of the graph, or None."""
        return rows_dim(self.bundle.manifest.signature, options, joins=self.joins)

    @property
    def joins(self) -> bool:
        """Whether rows of several requests may be in one run of the graph.

        Dynamic quantization takes its ranges over all rows of a run: those of somebody else, of other sizes, would take
        from mine what tells them apart. Texts are not so: what a model makes of them it brings to one size itself.
        """
        task, precision = self.bundle.task(), self.variant.precision
        dynamic = precision.name == "int8" and precision.settings.get("dynamic", True)
        ranges = task.input_kind == "tensors" and dynamic and self.variant.format in ("onnx", "ort")
        return task.independent_rows and not ranges

    def made_of(self, options: TritonOptions) -> str:
        """Return what is served and how: nothing of when, where and with what else it was logged."""
        manifest = self.bundle.manifest
        return to_json(
            {
                "variant": self.variant.id,
                "digest": self.variant.digest,
                "runtime": self.runtime.name,
                "options": options,
                "task": manifest.task,
                "task_config": manifest.task_config,
                "signature": manifest.signature,
                "assets": manifest.assets,
            }
        )

    def write_graph(self, folder: Path, options: TritonOptions) -> None:
        """Write the variant's files and its configuration; golden requests warm it up."""
        backend = _backend(self)
        self.bundle.verify(self.variant)
        files = folder / str(self.version)
        files.mkdir(parents=True)
        top = self.variant.entry.rpartition("/")[0]
        for record in self.variant.files:
            target = safe_path(files, record.path.removeprefix(f"{top}/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            link_own_or_copy(self.bundle.path(record.path), target)
        warmup = _write_warmup(self, folder / "warmup", self.most_rows(options)) if options.warmup else ()
        config = graph_config(
            self.graph_name,
            self.version,
            self.bundle.manifest.signature,
            self.variant,
            backend,
            options,
            joins=self.joins,
            gpu=self.runtime.tier == 0,
            cores=self.cores,
            warmup=warmup,
            about={"variant": self.variant.id, "digest": self.variant.digest, **self.about},
        )
        (folder / CONFIG).write_text(to_text(config))

    def write_front(self, folder: Path, options: TritonOptions) -> None:
        """Write this package's core, the model's assets and what the front needs to know."""
        lib = library(self.bundle.task().packages)
        for source in sorted(path for path in lib.rglob("*") if path.is_file()):
            target = folder / lib.name / source.relative_to(lib)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_own_or_copy(source, target)
        own = folder / str(self.version)
        own.mkdir(parents=True)
        link_own_or_copy(_FRONT, own / "model.py")
        link_own_or_copy(self.bundle.path(MANIFEST), own / MANIFEST)
        for record in self.bundle.manifest.assets:
            target = safe_path(own, record.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_own_or_copy(self.bundle.path(record.path), target)
        runtime = self.runtime()
        facts = {
            "graph": self.graph_name,
            "library": lib.name,
            "batched": self.most_rows(options) > 0,
            "most_rows": self.most_rows(options),
            "dtypes": dict(self.variant.dtypes),
            "token_budget": options.token_budget or self.variant.token_budget or runtime.token_budget,
            "workers": max(1, options.instances),
            "tries_out": True,
        }
        (own / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        (own / ROUTED).write_text(self.route_text(options))

    def route_text(self, options: TritonOptions) -> str:
        """Return the configuration of a front that is a Python model and asks this version's graph."""
        task = self.bundle.task()
        return to_text(front_config(self.name, task, [self.version], options, _about(task)))


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


def _about(task: Task) -> dict[str, str]:
    """Return what a client has to know of a task to ask it as the loader is asked."""
    columns = [_as_told(column) for column in task.columns]
    reads = {"columns": json.dumps(columns)} if columns else {}
    return {"task": task.name, "takes": task.input_kind, "answers": task.answer_form().kind, **reads}


def _as_told(column: Column) -> dict[str, Any]:
    """Return a column without what is as usual: older clients refuse keys that they do not know."""
    usual = {one.name: one.default for one in fields(Column)}
    return {name: value for name, value in to_plain(column).items() if value != to_plain(usual[name])}


def _backend(what: BundleVersion) -> TritonBackend:
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


def _write_warmup(what: BundleVersion, folder: Path, most: int) -> list[Warmup]:
    """Write the golden requests as raw tensors, one row each, or whole where requests are not batched (most is 0)."""
    found = []
    for index, request in enumerate(what.bundle.golden()[:4]):
        feeds = {
            name: array.astype(numpy_dtype(what.variant.dtypes.get(name, array.dtype.name)))
            for name, array in request.feeds.items()
        }
        inputs: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for name, array in _of_one_row(feeds, most).items():
            folder.mkdir(exist_ok=True)
            file = f"{index}-{re.sub(r'[^A-Za-z0-9_]', '_', name)}"
            while (folder / file).exists():  # another input's, whose name differs in what a file's cannot have
                file += "_"
            (folder / file).write_bytes(np.ascontiguousarray(array).tobytes())
            inputs[name] = (array.dtype.name, array.shape, file)
        count = min(len(next(iter(feeds.values()))), most)
        found.append(Warmup(f"golden-{index}", count, inputs))
    return found


def _of_one_row(feeds: Arrays, rows: int) -> Arrays:
    """Return a request without its rows, which Triton repeats by itself."""
    return {name: array[0] for name, array in feeds.items()} if rows else feeds
