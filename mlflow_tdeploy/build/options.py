"""What the caller of a build decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlflow_tdeploy.build.calibration import CalibrationData
from mlflow_tdeploy.build.engine_options import Engine
from mlflow_tdeploy.build.fake_quant.options import FakeQuant
from mlflow_tdeploy.build.quantize_options import Quantize
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError, shown

#: How long a recipe looks for the best graph, unless the caller says it.
SEARCH_SECONDS = 900.0


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        precisions: Aliases (``fp32``, ``fp16``, ``int8``) or variant ids to make; None for all. The source itself is
            kept in any case where it can be.
        budget: How far a variant may be from the source; None for the task's default.
        on_budget: Over budget, ``drop`` keeps a variant's record and evidence without its files, ``raise`` fails.
        data: What to verify on; None for the default.
        calibrate: What ranges of activations are found on.
        recipe_options: What is said about single recipes, by their ids.
        engines: TensorRT engines to build, or to take, besides.
        opset: Version of the standard operators for exports.
        exporter: ``auto``, ``dynamo`` or ``torchscript``.
        measure: Whether to measure: which fusions pay, and the latency of each variant.
        seconds: For the latency of all variants together.
        search_seconds: After which a recipe that looks for the best graph within the budget takes the best it knows:
            then it only looks for how many parts have to be spared, those first that were found to matter by then.
        search_trials: After so many graphs, too.
    """

    precisions: tuple[str, ...] | None = None
    budget: Budget | None = None
    on_budget: Literal["drop", "raise"] = "drop"
    data: VerifyData | None = None
    calibrate: CalibrationData = field(default_factory=CalibrationData)
    recipe_options: Mapping[str, Any] = field(default_factory=dict)
    engines: tuple[Engine, ...] = ()
    opset: int = 18
    exporter: str = "auto"
    measure: bool = True
    seconds: float = field(default=6.0)
    search_seconds: float = SEARCH_SECONDS
    search_trials: float = math.inf

    def __post_init__(self) -> None:
        if self.on_budget not in ("drop", "raise"):
            raise InvalidInputError(f"on_budget must be 'drop' or 'raise', got {self.on_budget!r}.")
        if self.exporter not in ("auto", "dynamo", "torchscript"):
            raise InvalidInputError(f"exporter must be 'auto', 'dynamo' or 'torchscript', got {self.exporter!r}.")
        if isinstance(self.opset, bool) or not isinstance(self.opset, int) or not 13 <= self.opset <= 23:
            raise InvalidInputError(f"opset must be an integer from 13 to 23, got {self.opset!r}.")
        for name, least in (("search_seconds", 0), ("search_trials", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                raise InvalidInputError(f"{name} must be a number of at least {least}, got {shown(value)}.")


_SAID = (FakeQuant, Quantize)
#: What is asked for: precisions and ids, or what is said about a recipe.
Precisions = Iterable[str | FakeQuant | Quantize]


def precisions_of(given: Precisions | None) -> tuple[tuple[str, ...] | None, dict[str, FakeQuant | Quantize]]:
    """Return what is meant by ``precisions=``: names, and what is said about recipes, by their ids.

    Raises:
        InvalidInputError: Two of them are about one recipe, or one says what its recipe cannot take.
    """
    if given is None:
        return None, {}
    if isinstance(given, _SAID):
        raise InvalidInputError(f"precisions is a list: precisions=['fp32', {type(given).__name__}(…)].")
    wanted = list(given)
    if kind := next((kind for kind in _SAID if kind in wanted), None):
        raise InvalidInputError(f"precisions has the class {kind.__name__}: make one of it, {kind.__name__}(…).")
    options = [one for one in wanted if isinstance(one, _SAID)]
    names = [one.recipe if isinstance(one, _SAID) else one for one in wanted]
    if twice := next((one.recipe for one in options if names.count(one.recipe) > 1), None):
        raise InvalidInputError(f"precisions names '{twice}' twice: there is one variant of that id.")
    for one in options:
        if isinstance(one, Quantize):
            check_quantize(one)
    return tuple(names), {one.recipe: one for one in options}


def check_quantize(said: Quantize) -> None:
    """Make sure that a recipe can take what is said about it.

    Raises:
        InvalidInputError: There is no such recipe, or it cannot.
    """
    recipe = next((one for one in RECIPES if one.id == said.recipe), None)
    if recipe is None or not recipe.looks:
        those = ", ".join(sorted(one.id for one in RECIPES if one.looks))
        what = "is no recipe" if recipe is None else "takes neither a calibrator nor what to keep"
        raise InvalidInputError(f"{shown(said.recipe)} {what}. Those that do: {those}.")
    said.methods(recipe.calibrators)
