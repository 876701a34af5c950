"""What the caller of a fake quantization decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from mlflow_tdeploy.build.quantize_options import meant
from mlflow_tdeploy.build.ranges import CALIBRATORS
from mlflow_tdeploy.core.errors import InvalidInputError, shown

#: What QuantizeLinear of opset 18 has, and what int8 products take.
_BITS = (8,)


@dataclass(frozen=True)
class Quantizer:
    """How a tensor becomes integers.

    Attributes:
        bits: Of the integers.
        axis: A range for each index of this axis; ``output`` is that of a weight's output channels. None: one range.
        calibrator: How a range is found: ``max``, ``percentile``, ``mse`` or ``entropy``; None for the one whose graph
            is closest to the source (of weights: ``max``).

    Raises:
        InvalidInputError: A value that is not supported.
    """

    bits: int = 8
    axis: int | Literal["output"] | None = None
    calibrator: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise InvalidInputError(
                f"bits must be 8, got {shown(self.bits)}: QuantizeLinear of ONNX has no other integers that products "
                f"take. For weights in four bits there are 'ort-cpu-int4' and 'onnx-int4-modelopt'."
            )
        if isinstance(self.axis, bool) or not (self.axis is None or self.axis == "output" or _is_axis(self.axis)):
            raise InvalidInputError(f"axis must be the number of an axis, 'output' or None, got {shown(self.axis)}.")
        if self.calibrator is not None and self.calibrator not in CALIBRATORS:
            raise InvalidInputError(f"Unknown calibrator {shown(self.calibrator)}. Known: {', '.join(CALIBRATORS)}.")


def _is_axis(axis: Any) -> bool:
    return isinstance(axis, int) and axis >= 0


@dataclass(frozen=True)
class Layers:
    """How some layers are quantized.

    Attributes:
        match: Name of a class (``Linear``), a layer's name as ``named_modules()`` says it, or a regular expression that
            whole names match. Products and sums between activations are ``MatMul`` and ``Add``.
        input: How their inputs are; None: not at all.
        weight: How their weights are; None: not at all.

    Raises:
        InvalidInputError: No regular expression, or one range for each of an input's channels: a product cannot take
            them out of its sum.
    """

    match: str
    input: Quantizer | None = field(default_factory=Quantizer)
    weight: Quantizer | None = field(default_factory=lambda: Quantizer(axis="output"))

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise InvalidInputError(f"match must be a class, a name or a regular expression, got {shown(self.match)}.")
        try:
            re.compile(self.match)
        except re.error as error:
            raise InvalidInputError(f"{shown(self.match)} is no regular expression: {error}.") from error
        for name in ("input", "weight"):
            if not isinstance(one := getattr(self, name), Quantizer) and one is not None:
                raise InvalidInputError(
                    f"{name} of {shown(self.match)} is a Quantizer, such as Quantizer(calibrator='percentile'), or "
                    f"None, got {shown(one)}."
                )
        if self.input is not None and self.input.axis is not None:
            raise InvalidInputError(
                f"Inputs of {shown(self.match)} have one range, not one along axis {self.input.axis!r}: a product adds "
                f"up channels, so that it cannot take their scales out of the sum."
            )

    def matches(self, name: str, kind: str) -> bool:
        """Tell whether a layer is meant.

        Args:
            name: Of the layer.
            kind: Of its class.
        """
        return self.match == kind or meant(self.match, name)


@dataclass(frozen=True)
class FakeQuant:
    """A variant ``onnx-int8-torch``: int8 that torch finds the ranges of, and can train under.

    Attributes:
        layers: How layers are quantized; of several that match the last one counts. Layers that none matches, and that
            can be quantized, have the default of :class:`Layers`.
        only: Whether layers that none matches stay as they are instead.
        attention: Whether products of activations are quantized as well, such as queries by keys.
        residuals: Whether what goes around a block is, before it is added and normalized.
        train: Called with the quantized model to fine-tune it, or a ``transformers.Trainer`` that was made for the
            model and has not trained yet. Either trains a copy; the model itself stays as it is.
        seed: Of torch's random numbers while it trains.

    Raises:
        InvalidInputError: ``train`` is neither.
    """

    layers: Sequence[Layers] = ()
    only: bool = False
    attention: bool = False
    residuals: bool = False
    train: Any = None
    seed: int = 0
    #: Id of the variant that these options are of.
    recipe: ClassVar[str] = "onnx-int8-torch"

    def __post_init__(self) -> None:
        if isinstance(self.layers, Layers) or not all(isinstance(one, Layers) for one in self.layers):
            raise InvalidInputError(f"layers is a list like [Layers('Linear')], got {shown(self.layers)}.")
        if self.train is not None and not callable(self.train) and not callable(getattr(self.train, "train", None)):
            raise InvalidInputError(
                f"train is a function that fine-tunes the model it is called with, or a Trainer, got "
                f"{shown(self.train)}."
            )

    def record(self) -> dict[str, Any]:
        """Return what a variant's record says of it: all that can be written down."""
        by = None if self.train is None else getattr(self.train, "__qualname__", type(self.train).__name__)
        return {
            "layers": [asdict(one) for one in self.layers],
            "only": self.only,
            "attention": self.attention,
            "residuals": self.residuals,
            "trained_by": by,
            "seed": self.seed,
        }

    def rule(self, name: str, kind: str) -> Layers | None:
        """Return how a layer is quantized, or None where it is not.

        Args:
            name: Of the layer.
            kind: Of its class; ``MatMul`` or ``Add`` of what is between activations.
        """
        found = [one for one in self.layers if one.matches(name, kind)]
        if found:
            return found[-1]
        usual = {"MatMul": self.attention, "Add": self.residuals}.get(kind, True)
        return Layers(kind) if usual and not self.only else None
