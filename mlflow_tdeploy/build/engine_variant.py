"""A TensorRT engine as one more variant of a bundle."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from mlflow_tdeploy.build.engine import BuildProgress, build_engine
from mlflow_tdeploy.build.engine_options import Engine, EngineOptions, EnginePlan, tensorrt_module
from mlflow_tdeploy.build.extend import Built, refuse_taken
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.parents import Here, open_reference, shaken_reference
from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.stage import Staged
from mlflow_tdeploy.build.workshop import Progress, Workshop
from mlflow_tdeploy.core.engine import EngineRecord
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.thread_lock import one_at_a_time
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.probe import library_versions
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.disk import link_or_copy, storage_errors
from mlflow_tdeploy.store.hashing import record_tree
from mlflow_tdeploy.store.layout import FILES, safe_path

PLAN = "model.plan"


@one_at_a_time()
def build_engine_variant(
    bundle: Bundle,
    engine: Engine,
    workdir: Path,
    options: BuildOptions | None = None,
    *,
    fetch: Fetch | None = None,
    progress: Progress | None = None,
    builder_progress: BuildProgress | None = None,
) -> Built:
    """Build an engine from a bundle's portable graph, or take one as it is, and check it where there is a GPU.

    Without a GPU the engine is only built (TensorRT-RTX can) or taken: it has no evidence, and serves nowhere until a
    host with one has verified it.

    Args:
        bundle: The bundle; it is only read.
        engine: Which engine, and how to build it.
        workdir: An empty folder for everything; what is returned lies in it.
        options: How to check.
        fetch: Brings a variant's files where the bundle was downloaded without them.
        progress: Told of every finished step.
        builder_progress: Told of every step of TensorRT's builder.

    Raises:
        ConflictError: The bundle has a variant of that id.
        InvalidInputError: The bundle has no such graph.
        MissingDependencyError: The module is not installed.
        BuildError: The engine cannot be built or opened.
        BudgetError: It is over budget and ``on_budget`` is ``raise``.
    """
    options, manifest = options or BuildOptions(), bundle.manifest
    budget = manifest.budget.tightened(options.budget) if options.budget else manifest.budget
    shop = Workshop(bundle.task(), budget, options, workdir, golden=bundle.golden(), progress=progress)
    _, new_id = engine.settled(shop.host)
    refuse_taken(bundle, new_id, "Choose another id.")
    here = Here(bundle, fetch)
    if isinstance(engine, EnginePlan):
        staged = stage_plan(shop, engine)
    else:
        graph = _parent_graph(bundle, here, engine, workdir / "parent")
        staged = stage_engine(shop, engine, bundle.variants[engine.parent], graph, builder_progress)
    if shop.host.gpu is None:
        return Built(staged.variant, staged.root, (), tuple(shop.steps))
    return _checked(shop, bundle, here, staged)


def _parent_graph(bundle: Bundle, here: Here, engine: EngineOptions, folder: Path) -> Graph:
    if not here.available(engine.parent):
        graphs = [v.id for v in bundle.variants.values() if v.format == "onnx" and here.available(v.id)]
        raise InvalidInputError(
            f"Engines are built from portable graphs, and this model has no '{engine.parent}' to be had. "
            f"It has: {', '.join(graphs) or 'none'}."
        )
    return here.graph(engine.parent, folder)


def stage_plan(shop: Workshop, plan: EnginePlan) -> Staged:
    """Copy a plan that was built elsewhere below ``staged/files/<id>`` of a workshop's folder and record it.

    Raises:
        NotFoundError: There is no such file.
        IntegrityError: It is no plan, or not whole.
        StorageError: The disk is full.
    """
    root = shop.work / "staged"
    target = root / FILES / plan.id / PLAN
    with shop.step(f"take {plan.id}") as detail:
        record = plan.record()
        with storage_errors(f"write '{target}'"):
            target.parent.mkdir(parents=True)
            shutil.copyfile(plan.path, target)
        precision = Precision(plan.precision, plan.precision)
        variant = _variant(plan.id, root, precision, record)
        detail.append(f"{variant.size / 1e6:.0f} MB, {record.module} {record.version}")
        if shop.host.gpu is None:
            detail.append("not checked: there is no GPU here")
    return Staged(variant, root, Graph(target, precision))


def stage_engine(
    shop: Workshop,
    engine: EngineOptions,
    parent: Variant,
    graph: Graph,
    builder_progress: BuildProgress | None = None,
) -> Staged:
    """Build an engine below ``staged/files/<id>`` of a workshop's folder and record it.

    Args:
        shop: Where it is built.
        engine: Which engine.
        parent: The variant of the graph that it is built from.
        graph: That graph.
        builder_progress: Told of every step of TensorRT's builder.

    Raises:
        InvalidInputError: Profiles or flags that cannot be.
        MissingDependencyError: TensorRT is not installed.
        BuildError: No engine can be built.
    """
    module, new_id = engine.settled(shop.host)
    root = shop.work / "staged"
    plan = root / FILES / new_id / PLAN
    with shop.step(f"build {new_id}") as detail:
        trt = tensorrt_module(module)
        record = build_engine(trt, graph.path, plan, shop.task.signature, shop.host, engine, builder_progress)
        digest = next(file.sha256 for file in parent.files if file.path == parent.entry)
        stripped = "STRIP_PLAN" in engine.flags
        record = replace(record, onnx_sha256=digest, weights=parent.entry if stripped else "")
        variant = replace(
            _variant(new_id, root, parent.precision, record),
            parent=parent.id,
            built_for=shop.host if shop.host.gpu else None,
            shared=parent.needed if stripped else (),
        )
        if stripped:
            _lend(parent, graph, root)
        detail.append(f"{variant.size / 1e6:.0f} MB, {module} {record.version}")
        if shop.host.gpu is None:
            detail.append("not checked: there is no GPU here")
    return Staged(variant, root, replace(graph, path=plan))


def _lend(parent: Variant, graph: Graph, root: Path) -> None:
    """Have the graph that a stripped engine takes its weights from where the bundle will have it."""
    top = parent.entry.rpartition("/")[0]
    for record in parent.files:
        target = safe_path(root, record.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(safe_path(graph.path.parent, record.path.removeprefix(f"{top}/")), target)


def _variant(new_id: str, root: Path, precision: Precision, record: EngineRecord) -> Variant:
    return Variant(
        id=new_id,
        format="trt",
        precision=precision,
        device="cuda",
        entry=f"{FILES}/{new_id}/{PLAN}",
        files=record_tree(root, f"{FILES}/{new_id}"),
        engine=record,
        created=now(),
        made_with=library_versions(),
    )


def _checked(shop: Workshop, bundle: Bundle, here: Here, staged: Staged) -> Built:
    with open_reference(bundle, here) as (name, infer, weights):
        answers = shop.ask_reference(infer, weights, shaken_reference(bundle, name))
    verified = shop.check(staged, answers)
    evidence = shop.evidence(staged, verified, name)
    if not verified.passed:
        dropped = staged.drop()
        return Built(dropped.variant, None, tuple(evidence), tuple(shop.steps))
    evidence += shop.latencies({staged.variant.id: staged}, [])
    return Built(staged.variant, staged.root, tuple(evidence), tuple(shop.steps))
