"""From what a user passes as ``model`` to a bundle in a folder."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError, shown
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.copy import copy_bundle
from mlflow_tdeploy.store.layout import MANIFEST, ROOT
from mlflow_tdeploy.store.writer import BundleDraft

if TYPE_CHECKING:
    from mlflow_tdeploy.build.engine_options import Engine
    from mlflow_tdeploy.build.options import BuildOptions, Precisions
    from mlflow_tdeploy.build.report import BuildReport
    from mlflow_tdeploy.source.base import Source

_log = logging.getLogger("mlflow_tdeploy")

OnBudget = Literal["drop", "raise"]
#: Called with each finished step.
Progress = Callable[[Any], None]


@dataclass(frozen=True)
class BundleRequest:
    """What the build parameters of ``save_model`` say; see there."""

    task: str | None = None
    tokenizer: Any = None
    shapes: Mapping[str, Any] | None = None
    example: Any = None
    labels: Any = None
    precisions: Precisions | None = None
    engines: Iterable[str | Engine] | None = None
    budget: Any = None
    on_budget: OnBudget = "drop"
    verify_with: Any = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    opset: int = 18
    progress: Progress | None = None
    calibrate_with: Any = None
    search_seconds: float | None = None
    search_trials: int | None = None
    image_processor: Any = None

    def __post_init__(self) -> None:
        if self.on_budget not in ("drop", "raise"):
            raise InvalidInputError(f"on_budget must be 'drop' or 'raise', got {self.on_budget!r}.")

        if isinstance(self.precisions, str):
            raise InvalidInputError(f"precisions is a list like ['fp32', 'int8'], got {self.precisions!r}.")

    @functools.cached_property
    def options(self) -> BuildOptions:
        """What the build is asked for, worked out once: an iterator is used up by looking at it.

        Raises:
            InvalidInputError: The budget, the data or another option cannot be used.
        """
        from mlflow_tdeploy.build.calibration import CalibrationData
        from mlflow_tdeploy.build.engine_options import engines_of
        from mlflow_tdeploy.build.options import SEARCH_SECONDS, BuildOptions, precisions_of
        from mlflow_tdeploy.build.verify_data import VerifyData

        data = None if self.verify_with is None else VerifyData.of(self.verify_with)
        precisions, recipe_options = precisions_of(self.precisions)
        return BuildOptions(
            precisions=precisions,
            recipe_options=recipe_options,
            engines=engines_of(self.engines),
            budget=None if self.budget is None else Budget.of(self.budget),
            on_budget=self.on_budget,
            data=data,
            calibrate=CalibrationData.of(self.calibrate_with),
            opset=self.opset,
            search_seconds=SEARCH_SECONDS if self.search_seconds is None else self.search_seconds,
            search_trials=math.inf if self.search_trials is None else self.search_trials,
        )

    def check(self) -> None:
        """Refuse what cannot be used before anything is made.

        Raises:
            InvalidInputError: See :attr:`options`.
            MissingDependencyError: An engine is asked for and no TensorRT is installed.
        """
        if engines := self.options.engines:
            from mlflow_tdeploy.build.engine_options import check_engines
            from mlflow_tdeploy.runtime import probe

            check_engines(engines, probe.host())

    def prepare(self, model: Any) -> Prepared:
        """Read what was passed as ``model``, as far as nothing is written for it; to be closed, or used with ``with``.

        Raises:
            TDeployError: It is nothing that can be logged.
        """
        bundle = bundle_at(model)
        if bundle is not None:
            return Prepared(bundle)
        from mlflow_tdeploy.source.resolve import resolve

        self.check()  # before the model is loaded: what is wrong shows at once
        _require_packages()
        source = resolve(
            model,
            task=self.task,
            tokenizer=self.tokenizer,
            shapes=self.shapes,
            example=self.example,
            labels=self.labels,
            revision=self.revision,
            token=self.token,
            trust_remote_code=self.trust_remote_code,
            image_processor=self.image_processor,
        )
        return Prepared(source)

    def write(self, prepared: Prepared, root: Path, forced: str | None = None) -> None:
        """Make the bundle of a model in the new folder ``root``.

        Args:
            prepared: The model.
            root: The folder.
            forced: A variant that the model will be opened with, refused at once where there cannot be one of that id.
        """
        if isinstance(prepared.model, Bundle):
            self._copy(prepared.model, root)
        else:
            self._build(prepared.model, root, forced)

    def _build(self, source: Source, root: Path, forced: str | None) -> None:
        from mlflow_tdeploy.build.pipeline import build_bundle
        from mlflow_tdeploy.build.plan import HF
        from mlflow_tdeploy.build.recipes import RECIPES

        _check_forced(forced, {HF, *RECIPES.names(), *source.graphs})
        report = build_bundle(source, BundleDraft(root), self.options, self.progress)
        for variant_id, why in report.skipped.items():
            _log.warning("The model is logged without variant '%s': %s", variant_id, why)
        if all(one.dropped for one in report.variants if one.id != HF):
            _log.warning("No variant but the original is kept: serving needs torch. %s", _advice(report))

    def _copy(self, bundle: Bundle, root: Path) -> None:
        """Take a finished bundle as it is, after checking every file of it."""
        default = BundleRequest(progress=self.progress)
        names = (option.name for option in fields(self))
        changed = [name for name in names if not _same(getattr(self, name), getattr(default, name))]
        if changed:
            raise InvalidInputError(
                f"'{bundle.root}' is a finished bundle and is logged as it is: leave out {', '.join(changed)}, "
                f"or pass the original model."
            )
        copy_bundle(bundle, root)


@dataclass(frozen=True)
class Prepared:
    """A model that was read and is not written yet.

    Attributes:
        model: What to build from, or a finished bundle.
    """

    model: Source | Bundle

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        if not isinstance(self.model, Bundle):
            self.model.close()


def _advice(report: BuildReport) -> str:
    """Return what to do where nothing but the original is within the budget."""
    from mlflow_tdeploy.build.plan import PORTABLE

    if any(one.dropped and one.id == PORTABLE for one in report.variants):
        return (
            "Its exported graph answers otherwise than it does, in the same precision: unless the budget is narrower "
            "than rounding, a wider one would only hide that. Export it yourself and log the graph, or serve the "
            "original."
        )
    return "State a wider budget=…."


def _require_packages() -> None:
    """Make sure that what every build needs is installed, before minutes are spent.

    Raises:
        MissingDependencyError: Something is not.
    """
    for module in ("onnx", "onnxscript", "onnxruntime", "torch"):
        if importlib.util.find_spec(module) is None:
            extra = "cpu,build" if module == "onnxruntime" else "build"
            raise MissingDependencyError(module, "Logging a model", f"pip install 'mlflow-tdeploy[{extra}]'")


def _check_forced(forced: str | None, possible: Collection[str]) -> None:
    if forced is not None and forced not in possible:
        raise InvalidInputError(
            f"model_config names the variant {shown(forced)}, which this model cannot have. "
            f"Possible: {', '.join(sorted(possible))}."
        )


def _same(given: Any, default: Any) -> bool:
    """Tell whether an option was left as it is; tables and arrays do not compare to one truth value."""
    return given is default or (isinstance(given, (str, bool, int)) and given == default)


def bundle_at(model: Any) -> Bundle | None:
    """Return the bundle in a folder that was passed as a model, or None if it is something else."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    path = Path(model)
    if (path / ROOT / MANIFEST).is_file() or (path / MANIFEST).is_file():
        return Bundle.open(path)
    return None
