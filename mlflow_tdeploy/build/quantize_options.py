"""What the caller of a quantization of a graph decides: how ranges are found, and what is left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, shown

#: Names that an error shows.
_SHOWN = 8


@dataclass(frozen=True)
class Quantize:
    """A variant whose recipe is told what it would look for otherwise.

    Attributes:
        recipe: Id of the variant, such as ``onnx-int8``.
        calibrator: How ranges of activations are found (``max``, ``percentile``, ``mse``, ``entropy``), or weights are
            rounded (``awq_clip``), as far as the recipe has it; None for the one whose graph is closest to the source.
        keep: What stays in fp32 in any case: names of products, as ``tdeploy inspect --products`` shows them (of
            ``onnx-int8-torch``: of layers), or regular expressions that whole names match. More of them stay so where
            the budget needs it.

    Raises:
        InvalidInputError: A value that is not supported.
    """

    recipe: str
    calibrator: str | None = None
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str) or not self.recipe:
            raise InvalidInputError(f"recipe is the id of a variant, such as 'onnx-int8', got {shown(self.recipe)}.")
        patterns = tuple(self.keep) if isinstance(self.keep, Iterable) and not isinstance(self.keep, str) else (None,)
        if not all(isinstance(one, str) and one for one in patterns):
            raise InvalidInputError(f"keep is a list of names or regular expressions, got {shown(self.keep)}.")
        object.__setattr__(self, "keep", patterns)
        for pattern in self.keep:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InvalidInputError(f"{shown(pattern)} is no regular expression: {error}.") from error

    def methods(self, known: Iterable[str]) -> tuple[str, ...]:
        """Return the calibrators to try.

        Args:
            known: Those that the recipe has.

        Raises:
            InvalidInputError: It has not the one that is wanted.
        """
        found = tuple(known)
        if self.calibrator is None:
            return found
        if self.calibrator not in found:
            has = f"its calibrators are {', '.join(found)}" if found else "it has no calibrators to choose from"
            raise InvalidInputError(f"'{self.recipe}' cannot take the calibrator '{self.calibrator}': {has}.")
        return (self.calibrator,)

    def kept(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return which of a graph's parts stay as they are.

        Args:
            names: Those that could be quantized, in the order of the graph.

        Raises:
            InvalidInputError: A pattern matches none, or nothing would be left to quantize.
        """
        found = {pattern: {one for one in names if meant(pattern, one)} for pattern in self.keep}
        if nothing := next((pattern for pattern, those in found.items() if not those), None):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise InvalidInputError(
                f"Nothing that '{self.recipe}' could quantize is called {shown(nothing)} (keep=). There are "
                f"{', '.join(names[:_SHOWN])}{more}."
            )
        kept = tuple(one for one in names if any(one in those for those in found.values()))
        if kept and len(kept) == len(names):
            raise InvalidInputError(f"keep= leaves nothing for '{self.recipe}' to quantize: it means every product.")
        return kept

    def record(self) -> dict[str, Any]:
        """Return what a variant's record says of it; nothing where nothing was said."""
        said = {"calibrator": self.calibrator, "keep": list(self.keep)}
        return {"said": {name: one for name, one in said.items() if one}} if any(said.values()) else {}


def meant(pattern: str, name: str) -> bool:
    """Tell whether a name is meant by a pattern: the name itself, or a regular expression that all of it matches."""
    return pattern == name or re.fullmatch(pattern, name) is not None
