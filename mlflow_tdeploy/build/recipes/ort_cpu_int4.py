"""Weights in four bits: the smallest graph within the budget."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlflow_tdeploy.build.applied import FP32, blocks, read_back
from mlflow_tdeploy.build.graphs import CPU_INT8_FUSIONS
from mlflow_tdeploy.build.judge import Judge
from mlflow_tdeploy.build.quantize import BLOCK, can_be_blocks, prepare, products
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.sensitivity import by_sensitivity, fewest
from mlflow_tdeploy.build.trials import Trials
from mlflow_tdeploy.build.tune import Fused, choose_fusions
from mlflow_tdeploy.build.weights_only import BLOCK_OF_FOUR, quantize_weights, tables
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format

#: Most graphs that are tried to find out which products matter.
_TRIALS = 48


@RECIPES.register("ort-cpu-int4")
class OrtCpuInt4(Recipe):
    """Has weights and tables in four bits, and as few products as the budget needs in eight.

    For models that are to be small: beside int8 it is slower, above all in bulk.
    """

    id: ClassVar[str] = "ort-cpu-int4"
    precision: ClassVar[str] = "int4"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "ort"
    device: ClassVar[str] = "cpu"
    default: ClassVar[bool] = False
    looks: ClassVar[bool] = True

    def run(self, context: RecipeContext) -> Graph:
        """Fuse, order, spare, check."""
        judge = context.required_judge(self.id)
        # packed attention has no products of four bits
        fused = choose_fusions(
            context.base(), context.workdir, None, fusions=CPU_INT8_FUSIONS, question=(), trial=context.trial
        )
        search = _Search(fused, context, judge)
        found = search.run()
        settings = {
            **context.quantize(self.id).record(),
            "block_size": BLOCK_OF_FOUR,
            "eight_bits": list(found.eight),
            "eight_bits_block_size": BLOCK,
            "tables": list(search.tables) if found.tables else [],
            **search.trials.settings(found),
            **read_back(search.path, search.asked(found)),
            **fused.settings,
        }
        precision = Precision("int4", "int8", recipe=self.id, kept=(*search.fixed, *found.eight), settings=settings)
        return Graph(search.path, precision, session=fused.session)


@dataclass(frozen=True)
class _Choice:
    """What a graph is made of.

    Attributes:
        four: Products in four bits.
        eight: And in eight; the others are fp32.
        tables: Whether tables are in four bits.
    """

    four: tuple[str, ...]
    eight: tuple[str, ...] = ()
    tables: bool = True


class _Search:
    """One search: the graph that was tried last lies at :attr:`path`."""

    def __init__(self, fused: Fused, context: RecipeContext, judge: Judge) -> None:
        workdir = context.workdir
        self.path, self._plain = workdir / "graph" / "model.onnx", workdir / "plain" / "model.onnx"
        prepare(fused.path, self._plain)
        shutil.rmtree(fused.path.parent)
        self._session = fused.session
        fitting = can_be_blocks(self._plain)
        names = tuple(name for name in products(self._plain) if name in fitting)  # in the order of the graph
        self.fixed = context.quantize(OrtCpuInt4.id).kept(names)
        self._names = tuple(name for name in names if name not in self.fixed)
        self.tables = tables(self._plain)
        self.trials = Trials[_Choice](context, judge, self._made, self.said)

    def run(self) -> _Choice:
        """Return what the graph is made of that is left.

        Raises:
            BuildError: There is nothing to quantize.
            NothingWithinBudgetError: Nothing is within the budget.
        """
        if not self._names:
            raise BuildError("There is nothing to quantize: the graph has no matrix product with weights.")
        found = next((one for with_tables in (True, False) if (one := self._fewest(tables=with_tables))), None)
        if found is None:
            what = "Not even with all weights in eight bits is this graph within the budget"
            raise self.trials.nothing_within(OrtCpuInt4.id, what)
        self._made(found, external_data=None)
        shutil.rmtree(self._plain.parent)
        return found

    def _fewest(self, *, tables: bool) -> _Choice | None:
        """Return the choice with the fewest products in eight bits; None where all of them are too few."""

        def sparing(names: Collection[str]) -> _Choice:
            eight = tuple(name for name in self._names if name in names)
            return _Choice(tuple(name for name in self._names if name not in names), eight, tables)

        if self.trials.passes(sparing(())):
            return sparing(())
        if not self.trials.passes(sparing(self._names)):
            return None
        order = by_sensitivity(self._names, self._distance, trials=_TRIALS, enough=self.trials.order_known)
        count = fewest(len(order), lambda count: self.trials.passes(sparing(set(order[:count]))), self.trials.late)
        return None if count is None else sparing(set(order[:count]))

    def _distance(self, names: Sequence[str]) -> float:
        four = tuple(name for name in self._names if name in names)
        return self.trials.distance(_Choice(four, tables=False), alone=four)

    def asked(self, choice: _Choice) -> dict[str, str]:
        """Return the form that each product, and each table, was to have."""
        four, eight = blocks(4, BLOCK_OF_FOUR), blocks(8, BLOCK)
        forms = {name: eight if name in choice.eight else four for name in self._names}
        forms |= dict.fromkeys(self.fixed, FP32)
        return forms | dict.fromkeys(self.tables if choice.tables else (), four)

    def said(self, choice: _Choice) -> str:
        """Say what a graph is made of."""
        of = len(self._names) + len(self.fixed)
        rest = of - len(choice.four) - len(choice.eight)
        tables = f", {len(self.tables)} tables" if choice.tables else ""
        return f"{len(choice.four)} in four bits, {len(choice.eight)} in eight, {rest} in fp32 of {of} products{tables}"

    def _made(self, choice: _Choice, *, external_data: bool | None = False) -> Graph:
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        four = (*choice.four, *(self.tables if choice.tables else ()))
        quantize_weights(self._plain, self.path, four=four, eight=choice.eight, external_data=external_data)
        return Graph(self.path, Precision(), session=self._session)
