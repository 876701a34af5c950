"""A TensorRT engine as one more variant of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlflow_tdeploy.build.engine import EngineOptions, build_engine, tensorrt_module
from mlflow_tdeploy.build.extend import Built
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.parents import Here, open_reference
from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.stage import Staged
from mlflow_tdeploy.build.workshop import Progress, Workshop
from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.variant import Variant, check_variant_id
from mlflow_tdeploy.runtime.probe import library_versions
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import record_tree
from mlflow_tdeploy.store.layout import ASSETS, FILES

PLAN = "model.plan"


def engine_id(module: str, precision: str, host: Fingerprint) -> str:
    """Return the id of an engine that is built here: ``trt-fp16-sm90``, ``trt-rtx-fp16``."""
    if module == "tensorrt_rtx":
        return f"trt-rtx-{precision}"
    capability = host.gpu.compute_capability.replace(".", "") if host.gpu else "unknown"
    return f"trt-{precision}-sm{capability}"


def build_engine_variant(
    bundle: Bundle,
    workdir: Path,
    *,
    module: str = "tensorrt",
    precision: str = "fp16",
    engine: EngineOptions | None = None,
    options: BuildOptions | None = None,
    variant_id: str | None = None,
    fetch: Callable[[Variant], None] | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build an engine from a bundle's portable graph and check it, where there is a GPU to run it.

    Without one the engine is only built (TensorRT-RTX can): it has no evidence, and serves nowhere until a host with
    a GPU has verified it.

    Args:
        bundle: The bundle; it is only read.
        workdir: An empty folder for everything; what is returned lies in it.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        precision: Of the graph to build from: ``fp32`` for ``onnx-fp32`` and so on.
        engine: How to build.
        options: How to check.
        variant_id: Id of the variant; made of module, precision and GPU when None.
        fetch: Brings a variant's files where the bundle was downloaded without them.
        progress: Told of every finished step.

    Raises:
        ConflictError: The bundle has a variant of that id.
        InvalidInputError: The bundle has no such graph.
        MissingDependencyError: The module is not installed.
        BuildError: The engine cannot be built or opened.
        BudgetError: It is over budget and ``on_budget`` is ``raise``.
    """
    manifest = bundle.manifest
    task = TASKS.get(manifest.task)(manifest.task_config, manifest.signature, bundle.root / ASSETS)
    shop = Workshop(task, manifest.budget, options or BuildOptions(), workdir, progress=progress)
    new_id = check_variant_id(variant_id or engine_id(module, precision, shop.host))
    if new_id in bundle.variants:
        raise ConflictError(f"The model has a variant '{new_id}' already; variants are never replaced.")
    here, parent_id = Here(bundle, fetch), f"onnx-{precision}"
    if not here.available(parent_id):
        graphs = [v.id for v in bundle.variants.values() if v.format == "onnx" and here.available(v.id)]
        raise InvalidInputError(
            f"Engines are built from portable graphs, and this model has no '{parent_id}' to be had. "
            f"It has: {', '.join(graphs) or 'none'}."
        )
    graph = here.graph(parent_id, workdir / "parent")
    staged = _build(shop, bundle, new_id, parent_id, graph, module, engine or EngineOptions())
    if shop.host.gpu is None:
        return Built(staged.variant, staged.root, (), tuple(shop.steps))
    return _checked(shop, bundle, here, staged)


def _build(
    shop: Workshop, bundle: Bundle, new_id: str, parent_id: str, graph: Graph, module: str, options: EngineOptions
) -> Staged:
    root = shop.work / "staged"
    plan = root / FILES / new_id / PLAN
    parent = bundle.variants[parent_id]
    with shop.step(f"build {new_id}") as detail:
        trt = tensorrt_module(module)
        record = build_engine(trt, graph.path, plan, bundle.manifest.signature, shop.host, options)
        digest = next(file.sha256 for file in parent.files if file.path == parent.entry)
        variant = Variant(
            id=new_id,
            format="trt",
            precision=parent.precision,
            device="cuda",
            entry=f"{FILES}/{new_id}/{PLAN}",
            files=record_tree(root, f"{FILES}/{new_id}"),
            parent=parent_id,
            built_for=shop.host if shop.host.gpu else None,
            engine=replace(record, onnx_sha256=digest),
            created=now(),
            made_with=library_versions(),
        )
        detail.append(f"{variant.size / 1e6:.0f} MB, {module} {record.version}")
        if shop.host.gpu is None:
            detail.append("not checked: there is no GPU here")
    return Staged(variant, root, replace(graph, path=plan))


def _checked(shop: Workshop, bundle: Bundle, here: Here, staged: Staged) -> Built:
    with open_reference(bundle, here) as (name, infer, weights):
        answers = shop.ask_reference(infer, weights)
    verified = shop.check(staged, answers)
    evidence = [shop.evidence(staged, verified, name)]
    if not verified.passed:
        dropped = staged.drop()
        return Built(dropped.variant, None, tuple(evidence), tuple(shop.steps))
    evidence += shop.latencies({staged.variant.id: staged}, [])
    return Built(staged.variant, staged.root, tuple(evidence), tuple(shop.steps))
