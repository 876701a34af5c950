"""From a graph to a variant that was opened by the runtime that will serve it, and checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_tdeploy.build.inspect_graph import differing_dtypes, is_portable, precision_of, requirements
from mlflow_tdeploy.build.recipes import Graph, Measure, Opens, Recipe
from mlflow_tdeploy.build.reference import ReferenceAnswers, corner_sizes
from mlflow_tdeploy.build.verify import Verified, verify
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BuildError, NoVariantError, SessionError
from mlflow_tdeploy.core.evidence import now, recorded_shapes
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.measure import interleave
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays, Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES, Runtime, Session
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.probe import library_versions
from mlflow_tdeploy.source._survival import deadly
from mlflow_tdeploy.store.external_data import copy_graph
from mlflow_tdeploy.store.hashing import record_tree
from mlflow_tdeploy.store.layout import FILES

#: Most elements of the batch that choices are measured with; larger ones say the same and take longer.
_TUNE_ELEMENTS = 512


@dataclass(frozen=True)
class Staged:
    """A variant whose files lie in a folder laid out like a bundle.

    Attributes:
        variant: Its record.
        root: The folder.
        graph: The graph it consists of.
    """

    variant: Variant
    root: Path
    graph: Graph

    def move_to(self, root: Path) -> Staged:
        """Move the files into another such folder."""
        target = root / FILES / self.variant.id
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.root / FILES / self.variant.id, target)
        graph = replace(self.graph, path=root / self.variant.entry)
        return replace(self, root=root, graph=graph)

    def drop(self) -> Staged:
        """Remove the files; the record stays, without them."""
        shutil.rmtree(self.root / FILES / self.variant.id)
        return replace(self, variant=replace(self.variant, files=()))


def stage_recipe(recipe: type[Recipe], graph: Graph, root: Path, host: Fingerprint) -> Staged:
    """Move what a recipe made below ``root/files/<id>`` and record it."""
    folder = root / FILES / recipe.id
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(graph.path.parent, folder)
    moved = replace(graph, path=folder / graph.path.name)
    variant = _variant(recipe.id, moved, root)
    tuned = host if recipe.tuned else None
    variant = replace(variant, format=recipe.format, device=recipe.device, parent=recipe.parent, built_for=tuned)
    return Staged(variant, root, moved)


def stage_graph(variant_id: str, path: Path, root: Path, signature: Signature) -> Staged:
    """Copy a graph that somebody gave, as it is, below ``root/files/<id>`` and record it.

    Raises:
        InvalidInputError: Its tensors are not the signature's.
        IntegrityError: It or its external data cannot be read.
    """
    folder = root / FILES / variant_id
    copied = folder / copy_graph(path, folder)[0]
    graph = Graph(copied, precision_of(copied), dtypes=differing_dtypes(copied, signature))
    return Staged(_variant(variant_id, graph, root), root, graph)


def _variant(variant_id: str, graph: Graph, root: Path) -> Variant:
    entry = graph.path.relative_to(root).as_posix()
    precision = graph.precision
    if graph.notes:
        precision = replace(precision, settings={**precision.settings, "notes": list(graph.notes)})
    return Variant(
        id=variant_id,
        format="onnx" if is_portable(graph.path) else "ort",
        precision=precision,
        device="any",
        entry=entry,
        files=record_tree(root, f"{FILES}/{variant_id}"),
        requires=requirements(graph.path),
        session=graph.session,
        dtypes=graph.dtypes,
        created=now(),
        made_with=library_versions(),
    )


@contextmanager
def opened(
    staged_root: Path, variant: Variant, signature: Signature, host: Fingerprint, options: SessionOptions | None = None
) -> Iterator[tuple[Session, Runtime]]:
    """Open a variant with the best runtime of this host; yields the session and the runtime.

    Raises:
        NoVariantError: No runtime here opens it.
        SessionError: The runtime cannot open it.
    """
    runtime = runtime_for(variant, host)
    session = runtime.open(staged_root, variant, signature, options or SessionOptions())
    try:
        yield session, runtime
    finally:
        session.close()


def lone(host: Fingerprint) -> SessionOptions:
    """Return the options of a session that answers one batch after the other: every core works on each."""
    return SessionOptions(intra_op_threads=host.cores)


def runtime_for(variant: Variant, host: Fingerprint) -> Runtime:
    """Return the runtime that opens a variant here.

    Raises:
        NoVariantError: None does.
    """
    reasons = []
    for runtime in sorted((cls() for cls in RUNTIMES), key=lambda runtime: (runtime.tier, runtime.preference)):
        if variant.format not in runtime.formats:
            continue
        why = runtime.missing()
        compat = runtime.probe(host, variant) if why is None else None
        if compat is not None and compat.can_open:
            return runtime
        reasons.append(f"{runtime.name}: {why or (compat.reason if compat else '')}")
    raise NoVariantError(
        f"No runtime on this host opens variant '{variant.id}' (format '{variant.format}'). "
        + ("; ".join(reasons) or "No runtime knows that format")
    )


def check(
    staged: Staged,
    answers: ReferenceAnswers,
    budget: Budget,
    host: Fingerprint,
    golden: Sequence[GoldenRequest] = (),
) -> Verified:
    """Open a variant and ask it everything, golden requests included.

    A graph for CUDA is asked on the CPU where there is no GPU: that tells whether it is right, and counts for no GPU.

    Raises:
        BuildError: It cannot be opened: nothing is known about how close it is.
    """
    variant = staged.variant if serves_on(staged.variant, host) else replace(staged.variant, device="any")
    try:
        _require_survival(staged)
        with opened(staged.root, variant, answers.task.signature, host, lone(host)) as (session, runtime):
            found = verify(answers, session.infer, budget, golden)
            return replace(found, runtime=runtime.name, facts=session.facts())
    except (SessionError, NoVariantError) as error:
        why = without_folder(error, staged.root)
        raise BuildError(f"Variant '{staged.variant.id}' was made and cannot be opened here: {why}") from error


def _require_survival(staged: Staged) -> None:
    """Open a graph in half precision in a child first: of some, ONNX Runtime ends the process.

    Raises:
        SessionError: It does of this one.
    """
    variant = staged.variant
    without = variant.session.get("disabled_optimizers", ())
    if variant.format in ("onnx", "ort") and (end := deadly(staged.root / variant.entry, without)):
        raise SessionError(f"ONNX Runtime does not survive opening it ({end})")


def serves_on(variant: Variant, host: Fingerprint) -> bool:
    """Tell whether a host has the device that a variant was made for."""
    return variant.device != "cuda" or host.gpu is not None


def without_folder(error: Exception, folder: Path) -> str:
    """Return an error's message without the folder of this build: it ends up in records, which name no such place."""
    return str(error).replace(f"{folder}{os.sep}", "")


def make_measure(task: Task, data: VerifyData, host: Fingerprint) -> Measure:
    """Return the function that recipes time graphs with: one intra-op thread, the CPU runtime that will serve."""
    shapes = _tune_feeds(task, data)

    def measure(graphs: Mapping[str, Graph], seconds: float) -> dict[str, dict[str, list[float]]]:
        sessions: dict[str, Session] = {}
        try:
            for name, graph in graphs.items():
                sessions[name] = open_candidate(graph, task, host)
            return {
                shape: interleave(
                    {name: lambda s=session, f=feeds: s.infer(f) for name, session in sessions.items()},  # type: ignore[misc]
                    rounds=40,
                    seconds=seconds / 2,
                )
                for shape, feeds in shapes.items()
            }
        finally:
            for session in sessions.values():
                session.close()

    return measure


def make_trial(task: Task, data: VerifyData, host: Fingerprint) -> Opens:
    """Return the function that opens a graph as :func:`make_measure` does and asks it once at each size."""
    shapes = _tune_feeds(task, data)

    def trial(graph: Graph) -> str | None:
        try:
            session = open_candidate(graph, task, host)
            try:
                for feeds in shapes.values():
                    session.infer(feeds)
            finally:
                session.close()
        except (SessionError, NoVariantError) as error:
            return without_folder(error, graph.path.parent)
        return None

    return trial


def _tune_feeds(task: Task, data: VerifyData) -> dict[str, Arrays]:
    short, _ = recorded_shapes(task.signature)
    opt = corner_sizes(task.signature, "opt", _TUNE_ELEMENTS)[-1]
    return {
        name: task.example_feeds("opt", ragged=False, sizes=sizes, items=data.real)
        for name, sizes in (("short", short), ("opt", opt))
    }


def open_candidate(graph: Graph, task: Task, host: Fingerprint, options: SessionOptions | None = None) -> Session:
    """Open a graph in the making as a variant of it would be.

    Raises:
        NoVariantError: No runtime here opens it.
        SessionError: The runtime cannot open it.
    """
    variant = Variant(
        "candidate", "ort", Precision(), "cpu", graph.path.name, (), session=graph.session, dtypes=graph.dtypes
    )
    return runtime_for(variant, host).open(graph.path.parent, variant, task.signature, options or SessionOptions())
