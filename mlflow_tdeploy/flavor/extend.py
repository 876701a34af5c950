"""``extend_model``: one more variant for a model that is logged or registered already."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, TDeployError
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.flavor.source import BundleRequest, OnBudget, Progress
from mlflow_tdeploy.registry_io import (
    Location,
    append,
    describe,
    locate,
    mlflow_errors,
    open_records,
    searches,
    tag_logged_model,
)
from mlflow_tdeploy.registry_io.searches import Search
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.lock import host_lock
from mlflow_tdeploy.store.staging import workspace

if TYPE_CHECKING:
    from mlflow_tdeploy.build.engine_options import Engine
    from mlflow_tdeploy.build.options import Precisions

_log = logging.getLogger("mlflow_tdeploy")


@mlflow_errors()
def extend_model(
    model_uri: str,
    *,
    precisions: Precisions | None = None,
    engines: Iterable[str | Engine] | None = None,
    variants: Mapping[str, str | Path] | None = None,
    verify_with: Any = None,
    calibrate_with: Any = None,
    search_seconds: float | None = None,
    search_trials: int | None = None,
    on_budget: OnBudget = "drop",
    budget: Any = None,
    opset: int = 18,
    progress: Progress | None = None,
    builder_progress: Callable[[str, int, int], None] | None = None,
) -> list[Variant]:
    """Make variants of a logged or registered model, check each, and add them to that very version.

    Files of the version are never changed: a variant is added with its evidence, its record last, so readers see it
    wholly or not at all. Each is added as soon as it is checked; a later failure keeps the earlier ones. Of several
    threads of a process, one after the other builds.

    Args:
        model_uri: The model: ``models:/name/1``, ``models:/name@alias``, ``models:/m-…``, ``runs:/…`` or a folder.
        precisions: What to make: precisions (``int8``), ids (``ort-cpu-int8``), ``auto``, a ``Quantize`` or a
            ``FakeQuant``, see :func:`save_model`.
        engines: TensorRT engines to build: precisions of the model's graphs (``fp16``) or
            :class:`~mlflow_tdeploy.EngineOptions`, or ready-made ones to take, each an
            :class:`~mlflow_tdeploy.EnginePlan`. Where another process on this host builds the same one, its result is
            waited for and returned.
        variants: Ready-made variants by id: the path of an ONNX graph, which is checked like any other, or the folder
            of a Triton repository, which is kept as it is.
        verify_with: Data to check with, see :func:`save_model`.
        calibrate_with: Data that int8 variants find ranges on, see :func:`save_model`.
        search_seconds: See :func:`save_model`.
        search_trials: See :func:`save_model`.
        on_budget: ``drop`` records a variant over budget without its files, ``raise`` fails. A recipe that looks for
            one and finds none records nothing: ``drop`` goes on with the others, and fails where nothing was added.
        budget: A stricter budget for these variants; the model's own, fixed when it was logged, holds in any case.
        opset: Opset of exported graphs.
        progress: Called with each finished step.
        builder_progress: Called with each step of TensorRT's builder: the phase, how far it is and its number of steps.

    Returns:
        The records of the added variants.

    Raises:
        MlflowException: There is no such model, it has such a variant already, or a variant cannot be made.
    """
    request = BundleRequest(
        precisions=precisions, engines=engines, verify_with=verify_with, on_budget=on_budget, budget=budget,
        opset=opset, calibrate_with=calibrate_with, search_seconds=search_seconds, search_trials=search_trials,
    )  # fmt: skip
    request.check()
    engines = request.options.engines
    location = locate(model_uri)
    bundle, fetch = open_records(location)
    named, auto = _named(bundle, request.options.precisions)
    wanted = {
        **named,
        **{name: Path(path) for name, path in (variants or {}).items()},
    }
    if not wanted and not engines:
        raise InvalidInputError(
            "Nothing to add: name precisions=['int8'], engines=['fp16'] or variants={'my-id': 'model.onnx'}."
        )
    outcome = _Outcome(on_budget)
    try:
        for name, path in wanted.items():
            with outcome.looked_for(name, auto=name in auto):
                outcome.added.append(_add(location, bundle, fetch, name, path, request, progress))
        if wanted and engines:
            bundle, _ = open_records(location)  # engines may be built from what was just added
        for engine in engines:
            outcome.added.append(_add_engine(location, bundle, engine, request, progress, builder_progress))
    finally:
        if outcome.added or outcome.nothing:  # what is in the version stays there, whatever comes after it
            update_tags(location, outcome.nothing)
    return outcome.result()


class _Outcome:
    """What became of what was wanted.

    Args:
        on_budget: See :func:`extend_model`.
    """

    def __init__(self, on_budget: OnBudget) -> None:
        self._on_budget = on_budget
        self.added: list[Variant] = []
        self.nothing: list[Search] = []
        self._errors: list[TDeployError] = []

    @contextlib.contextmanager
    def looked_for(self, name: str, *, auto: bool) -> Iterator[None]:
        """Note a search that finds nothing within the budget, and go on with what else is wanted.

        Args:
            name: Of the recipe.
            auto: Nobody has asked for it by name: it need not be possible.
        """
        from mlflow_tdeploy.build.recipes import NothingWithinBudgetError

        try:
            yield
        except NothingWithinBudgetError as error:
            if error.trials and error.budget is not None:
                self.nothing.append(Search(name, "", error.budget.limits, error.trials))
            if self._on_budget == "raise":
                raise
            self._errors.append(error)
        except BuildError as error:
            if not auto:
                raise
            self._errors.append(error)

    def result(self) -> list[Variant]:
        """Return what was added.

        Raises:
            BudgetError: That is nothing, and nothing was within the budget.
            BuildError: That is nothing, and nothing of what ``auto`` means is possible.
        """
        if self._errors and not self.added:
            raise self._errors[0]
        for error in self._errors:
            _log.warning("Not added: %s", error)
        return self.added


def _named(bundle: Bundle, precisions: Iterable[str] | None) -> tuple[dict[str, Path | None], set[str]]:
    """Return the ids of the recipes behind precisions, and which of them ``auto`` alone means.

    A precision means those that the model has not.
    """
    from mlflow_tdeploy.build.plan import AUTO, recipes_of
    from mlflow_tdeploy.runtime import probe

    found, asked = dict[str, Path | None](), set[str]()
    for name in precisions or ():
        ids = sorted(recipes_of(name, gpu=probe.host().gpu is not None))
        new = [variant_id for variant_id in ids if variant_id not in {*bundle.variants, *bundle.unreadable}]
        found |= dict.fromkeys(new or ids)  # where the model has them all, the build says so
        asked |= set() if name == AUTO else {*new, *ids}
    return found, found.keys() - asked


def _add(
    location: Location,
    bundle: Bundle,
    fetch: Fetch | None,
    name: str,
    graph: Path | None,
    request: BundleRequest,
    progress: Progress | None,
) -> Variant:
    from mlflow_tdeploy.build.extend import build_variant

    with workspace() as folder:
        built = build_variant(
            bundle,
            graph or name,
            folder,
            request.options,
            variant_id=name if graph else None,
            fetch=fetch,
            progress=progress,
        )
        return append(location, built.variant, built.staged, built.evidence)


def _add_engine(
    location: Location,
    bundle: Bundle,
    engine: Engine,
    request: BundleRequest,
    progress: Progress | None,
    builder_progress: Callable[[str, int, int], None] | None,
) -> Variant:
    from mlflow_tdeploy.build.engine_variant import build_engine_variant
    from mlflow_tdeploy.runtime import probe

    _, new_id = engine.settled(probe.host())
    known = bundle.variants.keys()
    place = location.local.resolve() if location.local is not None else location.root
    with host_lock(f"{place} {new_id}"):
        bundle, fetch = open_records(location)
        if new_id not in known and (there := bundle.variants.get(new_id)) is not None:
            return there  # another process has built it in the meantime
        with workspace() as folder:
            built = build_engine_variant(
                bundle,
                engine,
                folder,
                request.options,
                fetch=fetch,
                progress=progress,
                builder_progress=builder_progress,
            )
            return append(location, built.variant, built.staged, built.evidence)


def update_tags(location: Location, nothing: Sequence[Search] = ()) -> None:
    """Write tags and metrics anew after something was added; a failure is a warning, as the model itself is whole.

    Args:
        location: The model.
        nothing: Searches that found nothing, which no record tells of.
    """
    if location.model_id is None:
        return  # a folder outside MLflow
    try:
        bundle, _ = open_records(location)
        tag_logged_model(location.model_id, *describe(bundle), searches(bundle), again=nothing)
    except Exception as error:
        _log.warning("%s has what was added, but its tags and metrics were not updated: %s", location.uri, error)
