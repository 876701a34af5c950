"""Source to bundle: write what the model is, make every variant, check each, keep those within the budget."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow_tdeploy.build.engine_options import Engine, EngineOptions, EnginePlan
from mlflow_tdeploy.build.engine_variant import stage_engine, stage_plan
from mlflow_tdeploy.build.joined_rows import rows_depend
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.parents import other_answer
from mlflow_tdeploy.build.plan import HF, PORTABLE, Plan, plan_variants
from mlflow_tdeploy.build.recipes import RECIPES, Graph, NothingWithinBudgetError, Recipe
from mlflow_tdeploy.build.reference import ReferenceAnswers
from mlflow_tdeploy.build.report import BuildReport, Step
from mlflow_tdeploy.build.stage import Staged, opened, runtime_for, stage_graph
from mlflow_tdeploy.build.triton_repository import stage_repository
from mlflow_tdeploy.build.verify import ZEROS, Verified
from mlflow_tdeploy.build.workshop import Progress, Workshop, brief
from mlflow_tdeploy.core.errors import BudgetError, BuildError, ConflictError, NoVariantError, SessionError
from mlflow_tdeploy.core.evidence import Evidence, now
from mlflow_tdeploy.core.manifest import SCHEMA_VERSION, Manifest
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.thread_lock import one_at_a_time
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.latency import Contender
from mlflow_tdeploy.runtime.probe import library_versions
from mlflow_tdeploy.source.base import Source
from mlflow_tdeploy.store.disk import temporary
from mlflow_tdeploy.store.external_data import external_files
from mlflow_tdeploy.store.layout import ASSETS, SOURCE
from mlflow_tdeploy.store.writer import BundleDraft

__all__ = ["BuildOptions", "BuildReport", "Step", "build_bundle"]


@one_at_a_time()
def build_bundle(
    source: Source, draft: BundleDraft, options: BuildOptions | None = None, progress: Progress | None = None
) -> BuildReport:
    """Make a bundle of a model.

    Args:
        source: The model.
        draft: Where the bundle is written; a failure leaves it incomplete, so it lies in a staged directory.
        options: What to make and how.
        progress: Told of every step that ended, well or not.

    Raises:
        InvalidInputError: The options do not fit the source.
        BuildError: A step that the bundle cannot do without failed.
        BudgetError: The portable graph is over budget and there is nothing else to serve, or a variant is and
            ``on_budget`` is ``raise``.
    """
    with _folder(draft.root) as work:
        return _Build(source, draft, options or BuildOptions(), work, progress).run()


class _Build:
    """One build: the state that its steps share."""

    def __init__(
        self, source: Source, draft: BundleDraft, options: BuildOptions, work: Path, progress: Progress | None
    ) -> None:
        assets = draft.root / ASSETS
        assets.mkdir(exist_ok=True)
        source.write_assets(assets)
        task = TASKS.get(source.task)(source.task_config, source.signature, assets)
        budget = options.budget or task.usual_budget()
        self.shop = Workshop(task, budget, options, work, source=source, progress=progress)
        self.source = source
        self.draft = draft
        self.options = options
        self.variants: dict[str, Variant] = {}
        self.evidence: dict[str, list[Evidence]] = {}
        self.skipped: dict[str, str] = {}
        self.tried: dict[str, tuple[Mapping[str, Any], ...]] = {}
        self.graphs: dict[str, Graph] = {}
        self.kept: dict[str, Staged] = {}
        self.reference = HF
        self.task_config = dict(source.task_config)

    def run(self) -> BuildReport:
        has_source = self._write_source()
        plan = self._plan(has_source)
        given = self._given()
        self.reference = HF if has_source else self.source.reference_id or PORTABLE
        answers = self.shop.ask_reference(self.source.reference, _parameters(self.source), self.source.shaken)
        self._say_whether_rows_depend(answers)
        for variant_id, path in given.items():
            self._take(variant_id, path, answers)
        for recipe in plan.order:
            self._make(recipe, plan, answers)
        for engine in self.options.engines:
            self._add_engine(engine, answers)
        for variant_id, folder in self.source.repositories.items():
            self._keep_unchecked(stage_repository(self.shop, variant_id, folder))
        self._measure()
        manifest = self._manifest()
        self._write(manifest)
        return BuildReport(
            manifest,
            tuple(self.variants.values()),
            {variant_id: tuple(records) for variant_id, records in self.evidence.items()},
            tuple(self.shop.steps),
        )

    def _write_source(self) -> bool:
        folder = self.draft.root / SOURCE
        with self.shop.step("write the source") as detail:
            folder.mkdir()
            try:
                written = self.source.write_source(folder)
            except BuildError as error:
                return self._without_source(folder, detail, str(error))
            if not written:
                shutil.rmtree(folder)
                detail.append(
                    "none: the graphs are what is kept" if self.source.graphs else "none: its code is not stored"
                )
                return False
            files = self.draft.add_tree(SOURCE)
            variant = Variant(
                id=HF, format="hf", precision=Precision(), device="any", entry=SOURCE, files=files, created=now(),
                made_with=library_versions(), session={"task": self.source.task},
                requires={name: importlib.metadata.version(name) for name in self.source.packages},
            )  # fmt: skip
            if why := self._differs(variant):
                return self._without_source(folder, detail, why)
            self.variants[HF] = variant
            detail.append(f"{variant.size / 1e6:.0f} MB")
        return True

    def _without_source(self, folder: Path, detail: list[str], why: str) -> bool:
        shutil.rmtree(folder)
        self.skipped[HF] = why
        detail.append(f"not kept: {why}")
        return False

    def _differs(self, variant: Variant) -> str | None:
        """Return why the saved original is not the one at hand, or None.

        A head that was replaced, or a forward that was patched, is not in its config: whoever loads it gets another
        model, without an error. Later variants would be held against that one.
        """
        requests = self.shop.golden()
        try:
            with opened(self.draft.root, variant, self.source.signature, self.shop.host) as (session, _):
                why = other_answer(requests, session)
        except (SessionError, NoVariantError) as error:
            return f"what was saved of the original cannot be opened again: {brief(error)}"
        return why and f"what was saved of the original is another model when it is loaded: {why}"

    def _say_whether_rows_depend(self, answers: ReferenceAnswers) -> None:
        if self.shop.task.input_kind != "tensors":
            return  # texts are asked alone and in batches anyway, and held against each other
        with self.shop.step("rows by themselves") as detail:
            if rows_depend(answers, self.source.reference):
                self.task_config["independent_rows"] = False
                detail.append("a row's answer depends on the others: servers must not join requests")

    def _given(self) -> Mapping[str, Path]:
        """Return the graphs that are taken as they are; a single portable one is simplified by its recipe."""
        graphs = self.source.graphs
        return {} if set(graphs) == {PORTABLE} else graphs

    def _plan(self, has_source: bool) -> Plan:
        given = self._given()
        ready_made = len(given) > 0 and self.source.module is None
        exportable = self.source.module is not None or PORTABLE in self.source.graphs
        required = [] if has_source or given else [PORTABLE]  # something must be the reference
        precisions = () if ready_made and self.options.precisions is None else self.options.precisions
        if taken := {*self.source.repositories} & {*given, *RECIPES.names(), HF}:
            raise ConflictError(f"'{min(taken)}' is the id of a variant that is made: give the repository another one.")
        parents = [engine.parent for engine in self.options.engines if isinstance(engine, EngineOptions)]
        return plan_variants(
            precisions,
            given=given,
            exportable=exportable,
            required=required,
            parents=parents,
            gpu=self.shop.host.gpu is not None,
        )

    def _take(self, variant_id: str, path: Path, answers: ReferenceAnswers) -> None:
        with self.shop.step(f"take {variant_id}"):
            staged = stage_graph(variant_id, path, self.shop.work / "staged", self.source.signature)
        try:
            self._use(self._judge(staged, answers))
        except BuildError as error:  # such as a graph for another kind of host
            if variant_id == self.reference:
                raise
            self.skipped[variant_id] = brief(error)

    def _make(self, recipe: type[Recipe], plan: Plan, answers: ReferenceAnswers) -> None:
        try:
            self._need_parent(recipe)
            staged = self.shop.make(recipe, self.graphs.get(recipe.parent or ""), answers)
            if recipe.id in plan.keep:
                staged = self._judge(staged, answers) if self.shop.can_ask(recipe) else self._keep_unchecked(staged)
        except NothingWithinBudgetError as error:
            if self.options.on_budget == "raise":
                raise
            self.skipped[recipe.id], self.tried[recipe.id] = brief(error), error.trials
            return
        except BuildError as error:
            self._skip(recipe, plan, error)
            return
        self._use(staged)

    def _add_engine(self, engine: Engine, answers: ReferenceAnswers) -> None:
        """Build or take an engine; where there is no GPU to run it, nothing vouches for it yet."""
        if isinstance(engine, EnginePlan):
            staged = stage_plan(self.shop, engine)
        elif (parent := self.variants.get(engine.parent)) is not None and parent.dropped:
            _, engine_id = engine.settled(self.shop.host)
            self.skipped[engine_id] = f"'{parent.id}', which it is made from, is over budget"
            return
        elif (graph := self.graphs.get(engine.parent)) is None:
            raise BuildError(f"No engine can be built of '{engine.parent}': that variant is not usable.")
        else:
            staged = stage_engine(self.shop, engine, self.variants[engine.parent], graph)
        if self.shop.host.gpu is not None and staged.variant.id not in self.variants:
            self._judge(staged, answers)
        else:
            self._keep_unchecked(staged)

    def _keep_unchecked(self, staged: Staged) -> Staged:
        if staged.variant.id in self.variants:
            raise ConflictError(f"There is a variant '{staged.variant.id}' already: choose another id.")
        moved = staged.move_to(self.draft.root)
        self.variants[staged.variant.id] = moved.variant
        return moved

    def _need_parent(self, recipe: type[Recipe]) -> None:
        if recipe.parent is not None and recipe.parent not in self.graphs:
            with self.shop.step(f"make {recipe.id}"):
                raise BuildError(
                    f"Variant '{recipe.id}' cannot be made: '{recipe.parent}', which it is made from, is not usable."
                )

    def _use(self, staged: Staged) -> None:
        """Let other variants be made from this one."""
        if not staged.variant.dropped:
            self.graphs[staged.variant.id] = staged.graph

    def _skip(self, recipe: type[Recipe], plan: Plan, error: BuildError) -> None:
        """Go on without a variant that nobody asked for by name, or whose parent is over the budget."""
        parent = self.variants.get(recipe.parent or "")
        if parent is not None and parent.dropped:
            self.skipped[recipe.id] = f"'{parent.id}', which it is made from, is over budget"
            return
        if recipe.id in plan.explicit or recipe.id == PORTABLE:
            raise error
        self.skipped[recipe.id] = brief(error)

    def _judge(self, staged: Staged, answers: ReferenceAnswers) -> Staged:
        """Check a variant and keep it, or only its record."""
        variant_id = staged.variant.id
        verified = self.shop.check(staged, answers)
        self.evidence[variant_id] = self.shop.evidence(staged, verified, "source")
        if verified.passed:
            staged = staged.move_to(self.draft.root)
            self.kept[variant_id] = staged
        else:
            self._refuse_last(staged, verified)
            staged = staged.drop()
        self.variants[variant_id] = staged.variant
        return staged

    def _refuse_last(self, staged: Staged, verified: Verified) -> None:
        """The reference of a bundle without its source must be the source, or nothing can be relied on."""
        variant_id = staged.variant.id
        if variant_id == self.reference:
            found = "is over the model's budget" if verified.metrics and not verified.failed else "fails"
            mend = "State a wider budget=…, or look why it differs."
            if not verified.is_close:
                mend = (
                    "No budget allows that. Where values are made up, show what the model takes with example=… or "
                    "verify_with=… (rows that end in padding show what they are padded with), narrow its ranges with "
                    "shapes=…, and call a mask or padding '…mask'."
                )
            elif any(ZEROS in one for one in verified.violations):
                mend = (
                    "Zeros are held against the budget's limits for one request (worst_cosine, max_norm_difference, of "
                    f"whole numbers exact_share): where they mean nothing to the model, state wider ones. {mend}"
                )
            mend = f"{_traced(staged)}{mend}"
            raise BudgetError(
                f"Variant '{variant_id}' {found}: {'; '.join(dict.fromkeys(verified.violations))}. It is the only form "
                f"this model can be kept in (a torch module's code is not stored), so it cannot be dropped. {mend}"
            )

    def _measure(self) -> None:
        others: list[Contender] = []
        if HF in self.variants:
            runtime = runtime_for(self.variants[HF], self.shop.host)
            others.append(Contender.served(self.variants[HF], runtime, self.source.reference))
        for record in self.shop.latencies(self.kept, others):
            self.evidence.setdefault(record.variant, []).append(record)

    def _manifest(self) -> Manifest:
        with self.shop.step("golden requests") as detail:
            requests = self.shop.golden()
            golden = self.draft.write_golden(requests)
            detail.append(f"{len(requests)}")
        return Manifest(
            schema_version=SCHEMA_VERSION,
            task=self.source.task,
            task_config=self.task_config,
            source=self.source.record,
            signature=self.source.signature,
            budget=self.shop.budget,
            reference=self.reference,
            assets=self.draft.add_tree(ASSETS),
            golden=golden,
            skipped=self.skipped,
            tried=self.tried,
            created=now(),
            made_with=library_versions(),
        )

    def _write(self, manifest: Manifest) -> None:
        with self.shop.step("write the records"):
            self.draft.write_manifest(manifest)
            for records in self.evidence.values():
                for record in records:
                    self.draft.write_evidence(record)
            for variant in self.variants.values():
                self.draft.write_variant(variant)


def _traced(staged: Staged) -> str:
    """Say what a graph has lost that was traced; empty for any other."""
    if staged.variant.precision.settings.get("exporter") != "torchscript":
        return ""
    decided = [note for note in staged.graph.notes if note.startswith("decides by values")]
    why = f" The module {'; '.join(decided)}." if decided else ""
    return (
        "torch.export does not take this module, so TorchScript has traced it: of an `if` on values a graph has the "
        f"way that the example takes, and a Python loop over a dimension is as long as there (fix it: shapes=…).{why} "
    )


def _parameters(source: Source) -> int:
    """Return the number of weights: of the module, or as its graph's size says; 0 where unknown."""
    if source.module is not None:
        return sum(math.prod(parameter.shape) for parameter in source.module.parameters())
    return max(map(_graph_size, source.graphs.values()), default=0) // 4


def _graph_size(path: Path) -> int:
    return sum((path.parent / name).stat().st_size for name in (path.name, *external_files(path)))


@contextmanager
def _folder(root: Path) -> Iterator[Path]:
    """Yield a folder inside the bundle that no reader sees: on the same disk, gone with the bundle after a kill."""
    work = temporary(root)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
