"""The public functions of promotion: ``mlflow.tdeploy.plan``, ``apply``, ``promote`` and so on."""

from __future__ import annotations

from pathlib import Path

from mlflow_tdeploy.promotion import apply as _apply
from mlflow_tdeploy.promotion import look as _look
from mlflow_tdeploy.promotion import promote as _promote
from mlflow_tdeploy.promotion import rollback as _rollback
from mlflow_tdeploy.promotion.ends import forgive
from mlflow_tdeploy.promotion.history import Event, History
from mlflow_tdeploy.promotion.outcome import Outcome, by_place
from mlflow_tdeploy.promotion.plan import Plan, Step
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.promotion.status import Standing, status_of
from mlflow_tdeploy.registry_io import mlflow_errors

FILE = "tdeploy.yaml"


def _spec(file: str | Path | Spec) -> Spec:
    return file if isinstance(file, Spec) else Spec.read(file)


@mlflow_errors()
def plan(file: str | Path | Spec = FILE) -> Plan:
    """Return what would have to change for the servers to agree with the registry; nothing moves.

    Args:
        file: Says which models are served where.

    Raises:
        MlflowException: The file is wrong, or the registry does not answer.
    """
    return _look.make_plan(_spec(file))


@mlflow_errors()
def apply(plan: Plan | None = None, file: str | Path | Spec = FILE, *, again: bool = False) -> tuple[Outcome, ...]:
    """Have the servers agree with the registry; twice is fine.

    Args:
        plan: What to do, as :func:`plan` has said it; made now where it is left out.
        file: Says which models are served where.
        again: Whether versions are tried again that are left alone, as a server went away twice while they came; also
            those that the plan refuses for that.

    Returns:
        What became of each step that changes something: ``state`` is ``done``, ``failed``, ``taken back`` or ``left``.

    Raises:
        MlflowException: The file is wrong, or the registry does not answer.
    """
    spec = _spec(file)
    if again:
        insisted = _look.make_plan(spec, sparing=False)
        plan = forgive(insisted if plan is None else _insisting(plan, insisted), spec)
    return _apply.apply(plan or _look.make_plan(spec), spec)


def _insisting(plan: Plan, insisted: Plan) -> Plan:
    """Return a plan in which names that are refused somewhere, or would be now, are as where nobody is spared.

    As a whole: which server tries a version out depends on all of them. What is wanted otherwise by now stays refused.
    """
    fresh = by_place(insisted.steps)

    def of(place: tuple[str, str], steps: list[Step]) -> list[Step]:
        new = fresh.get(place, [])
        refused = any(one.action == "refuse" for one in steps) or any(one.ends for one in new)
        return new if refused and {one.after for one in new} == {one.after for one in steps} else steps

    return Plan(tuple(one for place, steps in by_place(plan.steps).items() for one in of(place, steps)))


@mlflow_errors()
def promote(model_uri: str, *, alias: str = "", stage: str = "", file: str | Path | Spec = FILE) -> tuple[Outcome, ...]:
    """Give a version an alias or a stage, and have it answer wherever that is served; or leave everything as it was.

    Args:
        model_uri: ``models:/<name>/<version>``.
        alias: The alias.
        stage: The stage; other versions in it are archived.
        file: Says which models are served where.

    Returns:
        What became of each server that had to change.

    Raises:
        MlflowException: It may not serve (INVALID_STATE, with the reason), nothing serves that model by that alias
            (RESOURCE_DOES_NOT_EXIST), or a step failed: everything is as it was.
    """
    return _promote.promote(model_uri, _spec(file), alias=alias, stage=stage)


@mlflow_errors()
def rollback(
    name: str, version: int | None = None, *, alias: str = "", stage: str = "", file: str | Path | Spec = FILE
) -> tuple[Outcome, ...]:
    """Go back to the version that answered before, alias or stage included; or leave everything as it was.

    Args:
        name: A registered model, or the name that it is served by.
        version: Which version; the one before by default.
        alias: By which alias it is served, where there are several.
        stage: Or by which stage.
        file: Says which models are served where.

    Returns:
        What became of each server; one that is away is ``left``.

    Raises:
        MlflowException: There is nothing to go back to, or a server failed: everything is as it was.
    """
    return _rollback.rollback(name, _spec(file), version=version, alias=alias, stage=stage)


@mlflow_errors()
def status(file: str | Path | Spec = FILE) -> tuple[Standing, ...]:
    """Return what should answer and what does, for each name and server.

    Args:
        file: Says which models are served where.

    Raises:
        MlflowException: The file is wrong, or the registry does not answer.
    """
    return status_of(_look.make_plan(_spec(file)))


@mlflow_errors()
def history(name: str, most: int = 50) -> tuple[Event, ...]:
    """Return what was decided about the versions of a registered model, the newest first.

    Args:
        name: The registered model.
        most: How many at most.

    Raises:
        MlflowException: There is no such model, or the registry does not answer.
    """
    return History().of(name, most)
