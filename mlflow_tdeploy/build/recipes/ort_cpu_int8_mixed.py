"""Dynamic int8 within the budget: the products that cost most accuracy are quantized by blocks, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from mlflow_tdeploy.build.applied import CHANNELS, FP32, blocks, read_back
from mlflow_tdeploy.build.judge import Judge
from mlflow_tdeploy.build.quantize import BLOCK, can_be_blocks, products, quantize_mixed
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe, RecipeContext
from mlflow_tdeploy.build.recipes.ort_cpu_int8 import Whole, whole_for_int8
from mlflow_tdeploy.build.sensitivity import by_sensitivity, fewest
from mlflow_tdeploy.build.smooth import Scale, smooth
from mlflow_tdeploy.build.sparing import HOPELESS
from mlflow_tdeploy.build.trials import Trials
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Format

#: Most graphs that are tried to find out which products matter.
_TRIALS = 64
#: By blocks a product has to be off by no more than this share of what it is off by channels.
_MUCH = 0.5


@RECIPES.register("ort-cpu-int8-mixed")
class OrtCpuInt8Mixed(Recipe):
    """Quantizes as ``ort-cpu-int8`` does, and spares as few products as the budget needs.

    Products are put in the order of what quantizing them by channels does to the answers. Of those that do most, as
    many as it takes are spared: quantized by blocks where that is much closer, else left in fp32. Where it does not do
    to spare all, as many as it takes are left in fp32.
    """

    id: ClassVar[str] = "ort-cpu-int8-mixed"
    precision: ClassVar[str] = "int8"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar[Format] = "ort"
    device: ClassVar[str] = "cpu"
    default: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    tuned: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    def run(self, context: RecipeContext) -> Graph:
        """Fuse, order, spare, check."""
        judge = context.required_judge(self.id)
        whole = whole_for_int8(context)
        search = _Search(whole, context, judge)
        mix = search.run()
        shutil.rmtree(whole.path.parent)
        said = context.quantize(self.id).record()
        settings = {"dynamic": True, "per_channel": True, **said, **mix.settings, **whole.fused.settings}
        precision = Precision("int8", "int8", recipe=self.id, kept=mix.kept, settings=settings)
        return Graph(search.path, precision, session=whole.fused.session)


@dataclass(frozen=True)
class _Mix:
    """Which products are not quantized by channels.

    Attributes:
        blocks: By blocks.
        kept: Not at all.
        settings: How that was found; no part of which one it is.
    """

    blocks: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)


class _Search:
    """One search: the graph that was tried last lies at :attr:`path`."""

    def __init__(self, whole: Whole, context: RecipeContext, judge: Judge) -> None:
        self._whole = whole
        self._names, self._by_blocks = products(whole.path), can_be_blocks(whole.path)
        self.path = context.workdir / "mixed" / "model.onnx"
        self._fixed = context.quantize(OrtCpuInt8Mixed.id).kept(self._names)
        self._suits: dict[str, bool] = {}
        self._trials = Trials[_Mix](context, judge, self._made, self._said)

    def run(self) -> _Mix:
        """Return the mix of the graph that is left.

        Raises:
            BuildError: There is nothing to quantize.
            NothingWithinBudgetError: Nothing is left to quantize within the budget.
        """
        if not self._names:
            raise BuildError("There is nothing to quantize: the graph has no matrix product with weights.")
        if self._trials.passes(all_of := _Mix((), self._fixed)):
            return self._found(all_of)
        if not self._trials.passes(_Mix((), self._names)):
            raise self._trials.nothing_within(OrtCpuInt8Mixed.id, HOPELESS)
        order = by_sensitivity(
            [name for name in self._names if name not in self._fixed],
            lambda names: self._distance(channels=names),
            trials=_TRIALS,
            enough=self._trials.order_known,
        )
        mix = self._least(order, lambda count: self._spared(order[:count]))
        mix = mix or self._least(order, lambda count: self._spared(order, whole=order[:count]))
        if mix is None or len(mix.kept) == len(self._names):
            raise self._trials.nothing_within(OrtCpuInt8Mixed.id)
        return self._found(mix)

    def _least(self, order: Sequence[str], mix: Callable[[int], _Mix]) -> _Mix | None:
        count = fewest(len(order), lambda count: self._trials.passes(mix(count)), self._trials.late)
        return None if count is None else mix(count)

    def _spared(self, names: Collection[str], whole: Collection[str] = ()) -> _Mix:
        """Return the mix that spares some products, each as suits it, and some of them as a whole."""
        blocks = {name for name in names if name not in whole and self._suits_blocks(name)}
        kept = {*names, *whole, *self._fixed} - blocks
        return _Mix(self._in_order(blocks), self._in_order(kept))

    def _in_order(self, which: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self._names if name in which)

    def _suits_blocks(self, name: str) -> bool:
        """Tell whether a product is much closer by blocks than by channels; else it is spared as a whole.

        Where there is no time to find out it is by blocks: that may be too little, and is never slower than fp32.
        """
        if name not in self._suits and name in self._by_blocks and self._trials.late():
            return True
        if name not in self._suits:
            self._suits[name] = name in self._by_blocks and (
                self._distance(blocks=[name]) < _MUCH * self._distance(channels=[name])
            )
        return self._suits[name]

    def _distance(self, *, channels: Sequence[str] = (), blocks: Sequence[str] = ()) -> float:
        """Return how far answers are off where only these products are quantized."""
        quantized = {*channels, *blocks}
        kept = tuple(name for name in self._names if name not in quantized)
        return self._trials.distance(_Mix(tuple(blocks), kept), alone=[*channels, *blocks])

    def _found(self, mix: _Mix) -> _Mix:
        """Write the graph of a mix, and return it with how it was found."""
        self._made(mix, external_data=True)
        settings = {
            "blocks": list(mix.blocks),
            "block_size": BLOCK,
            **self._trials.settings(mix),
            **read_back(self.path, self._asked(mix)),
            **self._whole.smoothed(self._scales(mix)),
        }
        return replace(mix, settings=settings)

    def _asked(self, mix: _Mix) -> dict[str, str]:
        special = {**dict.fromkeys(mix.blocks, blocks(8, BLOCK)), **dict.fromkeys(mix.kept, FP32)}
        return {name: special.get(name, CHANNELS) for name in self._names}

    def _said(self, mix: _Mix) -> str:
        return f"{len(mix.blocks)} by blocks and {len(mix.kept)} in fp32 of {len(self._names)} products"

    def _scales(self, mix: _Mix) -> dict[str, Scale]:
        """Return those of products that are quantized; what stays fp32 is left as it is."""
        return {name: scale for name, scale in self._whole.scales.items() if name not in mix.kept}

    def _made(self, mix: _Mix, *, external_data: bool = False) -> Graph:
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.parent.mkdir()
        source = self._whole.path
        if scales := self._scales(mix):
            source = source.parent / "smoothed.onnx"
            smooth(self._whole.path, source, scales)
        quantize_mixed(source, self.path, blocks=mix.blocks, kept=mix.kept, external_data=external_data)
        return Graph(self.path, Precision(), session=self._whole.fused.session)
