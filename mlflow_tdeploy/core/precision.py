"""What numbers a variant computes with, and how it came to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Names of precisions, the most precise first.
PRECISIONS = ("fp64", "fp32", "bf16", "fp16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class Precision:
    """Precision of a variant.

    Attributes:
        weights: Type of the stored weights: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4``, ``fp8``.
        activations: Type the heavy products compute with.
        recipe: Name of the recipe that made it; empty for what was logged as it is.
        kept: Nodes or layers kept in higher precision, by name.
        settings: The recipe's settings, enough to make it again.
    """

    weights: str = "fp32"
    activations: str = "fp32"
    recipe: str = ""
    kept: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The short name users filter by: the lower of the two types."""
        return self.weights if _BITS.get(self.weights, 32) <= _BITS.get(self.activations, 32) else self.activations

    @property
    def bits(self) -> int:
        """Bits of the lower type, for ranking: lower precision is tried first."""
        return _BITS.get(self.name, 32)


_BITS = {"fp64": 64, "fp32": 32, "tf32": 19, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}
