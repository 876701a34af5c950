"""The contract of a recipe."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlflow_tdeploy.build.calibration import Calibration
from mlflow_tdeploy.build.quantize_options import Quantize
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BudgetError, BuildError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.variant import Format
from mlflow_tdeploy.source.base import Source

if TYPE_CHECKING:
    from mlflow_tdeploy.build.judge import Judge


@dataclass(frozen=True)
class Graph:
    """An ONNX graph that a recipe made.

    Attributes:
        path: The graph; external data lie beside it. Nothing else lies in that folder.
        precision: What it computes with.
        session: Hints for the runtime, see :attr:`mlflow_tdeploy.core.variant.Variant.session`.
        dtypes: Tensors whose dtype differs from the signature's.
        notes: What a reader should know.
    """

    path: Path
    precision: Precision
    session: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class NothingWithinBudgetError(BudgetError):
    """A recipe that looks for a graph within the budget has found none.

    Args:
        message: Why, and what to do.
        trials: Records of all graphs that were tried.
        budget: What they were held against.
    """

    def __init__(self, message: str, trials: Sequence[Mapping[str, Any]] = (), budget: Budget | None = None) -> None:
        super().__init__(message)
        self.trials, self.budget = tuple(trials), budget


#: Times graphs in turn, within so many seconds: shape name → graph name → durations in seconds.
Measure = Callable[[Mapping[str, Graph], float], dict[str, dict[str, list[float]]]]

#: Opens a graph and runs it: says why it cannot be served here, or None.
Opens = Callable[[Graph], str | None]


@dataclass(frozen=True)
class RecipeContext:
    """What a recipe works with.

    Attributes:
        task: The task, which holds the signature.
        data: Verification data in the task's form: real items to trace or tune with.
        workdir: An empty folder of this recipe's own; what it returns lies in it.
        parent: The graph it starts from; None for a recipe without parent.
        source: The model itself; None when a bundle is extended and the source is not at hand.
        measure: Times graphs on this host; None when nothing shall be measured.
        trial: Opens graphs on this host; None when that shall not be tried.
        judge: Holds graphs against the source's answers; None where nobody has asked it.
        calibration: What activations are looked at on; None where all that is there is made up.
        options: What the caller said about this recipe alone; None for nothing.
        tried: Told of each graph that is tried, and how long that took.
        search_seconds: After which a recipe looks for nothing better, from the start of its work.
        search_trials: After so many graphs, too.
        opset: Version of the standard operators for exports.
        exporter: ``auto``, ``dynamo`` or ``torchscript``.
        started: When its work began, on the clock of ``time.monotonic``.
    """

    task: Task
    data: VerifyData
    workdir: Path
    parent: Graph | None = None
    source: Source | None = None
    measure: Measure | None = None
    trial: Opens | None = None
    judge: Judge | None = None
    calibration: Calibration | None = None
    options: Any = None
    tried: Callable[[str, float], None] = lambda what, seconds: None
    search_seconds: float = math.inf
    search_trials: float = math.inf
    opset: int = 18
    exporter: str = "auto"
    started: float = field(default_factory=time.monotonic)

    def required_judge(self, recipe: str) -> Judge:
        """Return what holds graphs against the source's answers, for recipes that look for one.

        Raises:
            BuildError: Nobody has asked the source.
        """
        if self.judge is None:
            raise BuildError(f"'{recipe}' is looked for beside the source's answers, and nobody has asked it.")
        return self.judge

    def required_calibration(self, recipe: str) -> Calibration:
        """Return what activations are looked at on, for recipes that take ranges from it.

        Raises:
            BuildError: All that is there is made up.
        """
        if self.calibration is None:
            raise BuildError(
                f"'{recipe}' takes its ranges from data, and there is none: what it takes would be made up. Give "
                f"calibrate_with=… or verify_with=… (on the command line --calibrate or --data), or for a torch module "
                f"example=…."
            )
        self.calibration.warn_of_few()
        return self.calibration

    def quantize(self, recipe: str) -> Quantize:
        """Return what the caller has said about a recipe that quantizes; where nothing was said, it looks for it."""
        return self.options if isinstance(self.options, Quantize) else Quantize(recipe)

    def required_module(self, recipe: str) -> Any:
        """Return the torch module, with attention written out, for recipes that are made of it.

        Raises:
            BuildError: It is not here.
        """
        module = self.source.module_for("eager") if self.source is not None else None
        if module is None:
            raise BuildError(
                f"'{recipe}' is made of the torch module, and that is not here: make it where the model is logged."
            )
        return module

    def base(self) -> Graph:
        """Return the parent graph, for recipes that have one."""
        assert self.parent is not None
        return self.parent

    def output(self) -> Path:
        """Return where the graph is to be written."""
        return self.workdir / "graph" / "model.onnx"


class Recipe(ABC):
    """Makes one variant. Instances hold nothing."""

    #: Id of the variant it makes, also its name in the registry.
    id: ClassVar[str]
    #: The alias users ask for it by, shared by recipes of the same precision.
    precision: ClassVar[str]
    #: Id of the variant it starts from; None when it starts from the source.
    parent: ClassVar[str | None]
    format: ClassVar[Format]
    #: ``any``, ``cpu`` or ``cuda``.
    device: ClassVar[str]
    #: Whether it is made when nobody says which variants to make.
    default: ClassVar[bool] = True
    #: Whether it is then made where there is a GPU, too.
    default_on_gpu: ClassVar[bool] = False
    #: Whether it looks for the fastest graph within the budget: ``auto`` means those.
    searches: ClassVar[bool] = False
    #: Ways to find ranges, or to round weights, of which a :class:`Quantize` may name one; else all are tried.
    calibrators: ClassVar[tuple[str, ...]] = ()
    #: Whether it looks for what has to stay in fp32; a :class:`Quantize` may say what does in any case.
    looks: ClassVar[bool] = False
    #: Whether a CPU can run what it makes: else that is kept unchecked where there is no GPU.
    runs_on_cpu: ClassVar[bool] = True
    #: Whether choices in it were measured on, and so hold for, this kind of host.
    tuned: ClassVar[bool] = False

    @abstractmethod
    def run(self, context: RecipeContext) -> Graph:
        """Make the graph.

        Raises:
            BuildError: It cannot be made.
            NothingWithinBudgetError: Not within the budget.
        """
