"""Ranges of a model's quantizers, from data: by the calibrators that graphs are quantized with as well.

Those of pytorch-quantization 2.1.3 count in histograms that cannot be joined, need a GPU for the mean squared error,
and are slow by entropy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlflow_tdeploy.build.fake_quant.layers import Replaced
from mlflow_tdeploy.build.fake_quant.options import Quantizer
from mlflow_tdeploy.build.ranges import CALIBRATORS, Histogram
from mlflow_tdeploy.core.errors import BuildError


@dataclass(frozen=True)
class Met:
    """What a quantizer has met.

    Attributes:
        counted: One histogram, or one for each index of its axis.
        ndim: Axes of the tensors.
    """

    counted: tuple[Histogram, ...]
    ndim: int

    @classmethod
    def of(cls, array: np.ndarray, axis: int | None) -> Met:
        """Count a tensor.

        Raises:
            BuildError: It is not finite.
        """
        slices = [array] if axis is None else list(np.moveaxis(array, axis, 0))
        return cls(tuple(Histogram.of(one) for one in slices), array.ndim)

    def __add__(self, other: Met) -> Met:
        """Return what was met in both."""
        return Met(tuple(a + b for a, b in zip(self.counted, other.counted, strict=True)), other.ndim)

    def limits(self, calibrator: str, axis: int | None) -> Any:
        """Return the ends of the ranges, in the form that a quantizer takes; None where all was 0."""
        most = max((one.most for one in self.counted), default=0.0)
        if not most:
            return None
        # a channel of nothing but 0 needs a range all the same, and any will do
        found = [CALIBRATORS[calibrator](one) if one.most else most for one in self.counted]
        if axis is None:
            return found[0]
        return np.array(found, np.float32).reshape([-1 if index == axis else 1 for index in range(self.ndim)])


def observe(replaced: Sequence[Replaced], run: Callable[[], object]) -> dict[torch.nn.Module, Met]:
    """Return what quantizers meet while a model runs; none of them rounds meanwhile.

    Args:
        replaced: The layers.
        run: Runs the model on all data.

    Raises:
        BuildError: What one meets is not finite.
    """
    met: dict[torch.nn.Module, Met] = {}
    with ExitStack() as stack, torch.no_grad():
        for layer in replaced:
            for one in _enabled((*layer.inputs, *layer.weights)):
                one.disable_quant()
                stack.callback(one.enable_quant)
                hook = functools.partial(_collect, met, layer.name, once=one in layer.weights)
                stack.callback(one.register_forward_pre_hook(hook).remove)
        run()
    return met


def _enabled(quantizers: Sequence[Any]) -> list[Any]:
    return [one for one in quantizers if not one._disabled]


def _collect(met: dict[Any, Met], layer: str, module: Any, args: Any, *, once: bool) -> None:
    if (once and module in met) or not args[0].numel():
        return  # weights are the same in every batch
    try:
        new = Met.of(args[0].detach().cpu().float().numpy(), module.axis)
    except BuildError as error:
        raise BuildError(
            f"What '{layer}' takes on the calibration data is {error}: it has no range. Leave that data out, or look "
            f"at its values."
        ) from error
    met[module] = met[module] + new if module in met else new


def set_ranges(replaced: Sequence[Replaced], met: Mapping[torch.nn.Module, Met], usual: str) -> tuple[str, ...]:
    """Give quantizers their ranges.

    Args:
        replaced: The layers.
        met: What they met.
        usual: The calibrator of inputs whose rule names none.

    Returns:
        Layers whose input or weights were nothing but 0, or were never there: they stay as they were.
    """
    return tuple(layer.name for layer in replaced if not _ranged(layer, met, usual))


def _ranged(layer: Replaced, met: Mapping[torch.nn.Module, Met], usual: str) -> bool:
    sides: list[tuple[Sequence[Any], Quantizer | None, str]] = [
        (layer.inputs, layer.rule.input, usual),
        (layer.weights, layer.rule.weight, "max"),
    ]
    for quantizers, how, calibrator in sides:
        for one in _enabled(quantizers):
            known = met.get(one)
            limits = known and how and known.limits(how.calibrator or calibrator, one.axis)
            if limits is None:
                layer.leave()
                return False
            one.amax = limits
    return True
