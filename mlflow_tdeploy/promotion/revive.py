"""What is deployed answers again where nothing does, whatever becomes of the version that should."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from mlflow_tdeploy.core.errors import ConflictError, UnreachableError, first_line
from mlflow_tdeploy.promotion.ends import Load, is_left_alone, noted
from mlflow_tdeploy.promotion.outcome import Outcome
from mlflow_tdeploy.promotion.place import server_of
from mlflow_tdeploy.promotion.plan import Step
from mlflow_tdeploy.promotion.spec import Spec

_log = logging.getLogger("mlflow_tdeploy")


def revived(steps: Iterable[Step], spec: Spec) -> tuple[Outcome, ...]:
    """Load what is deployed on servers where nothing answers, such as those that came back empty.

    The version that is to come may be refused, or fail, or take long; what served before needs none of that: it lies in
    the repository. Where its files are gone it cannot be had, and the version that is to come is waited for. What has
    ended the server time and again is left alone.

    Args:
        steps: What is planned; the others are left alone. Who calls holds their places.
        spec: What it was made from.

    Returns:
        An outcome for each that was silent and had to be done something about.
    """
    due = (step for step in steps if step.silent and not is_left_alone(step))
    return tuple(one for step in due if (one := _revived(step, spec)) is not None)


def _revived(step: Step, spec: Spec) -> Outcome | None:
    started, load = time.perf_counter(), Load()
    meant = _again(step, step.before, step.variants[0])
    try:
        found = server_of(step, spec)
        found.client.require_live()
    except UnreachableError as error:  # it is on its way down: the next look
        _log.info("%s", first_line(error))
        return None
    try:
        with noted(step, step.before, spec) as load:
            version = found.revive(step.name)
        if version is None:
            return None
        meant = _again(step, version, str(found.describe(step.name).get("variant", "")))
    except ConflictError as error:  # somebody is at it
        _log.info("%s", first_line(error))
        return None
    except Exception as error:  # files that are gone, a server that the load ends: the others are others
        why = first_line(error)
        _log.warning("Version %s of '%s' cannot be had back at %s: %s", step.before, step.name, step.server, why)
        return Outcome(meant, "failed", time.perf_counter() - started, why, ended=load.ended)
    return Outcome(meant, "done", time.perf_counter() - started)


def _again(step: Step, version: int | None, variant: str) -> Step:
    """Return having a version again that is deployed."""
    why = f"version {version} is deployed there, and it does not answer"
    return replace(step, action="update", before=version, after=version, variants=(variant, variant), why=why)
