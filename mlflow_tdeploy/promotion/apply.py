"""What a plan says is done: server by server, and taken back where it fails on one of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import ConflictError, NotFoundError, TDeployError, first_line
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.wanted import Wanted
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.plan import Plan, Step
from mlflow_tdeploy.promotion.spec import Rule, Server, Spec, Target
from mlflow_tdeploy.triton.bundle_version import BundleVersion

_log = logging.getLogger("mlflow_tdeploy")


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        step: The step.
        state: ``done``; ``failed``, and what served serves on; ``taken back``, as another server of its target failed;
            ``left``: not begun, as one before it failed.
        seconds: How long it took.
        why: Why it failed, in one line.
    """

    step: Step
    state: Literal["done", "failed", "taken back", "left"]
    seconds: float = 0.0
    why: str = ""


def apply(plan: Plan, spec: Spec, told: Callable[[Outcome], None] = lambda outcome: None) -> tuple[Outcome, ...]:
    """Do what a plan says; what it refuses is left alone, and a second call finds nothing to do.

    The servers of a target get a version one by one. Where one fails, those before it get back what they had: a target
    never serves two versions for longer than that takes. Other names and targets are not affected.

    Args:
        plan: What to do.
        spec: What it was made from.
        told: Called with each outcome.

    Returns:
        An outcome for each step that changes something, in the order of the plan.
    """
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in plan.changes:
        groups.setdefault((step.target, step.name), []).append(step)
    found: list[Outcome] = []
    for steps in groups.values():
        for outcome in _together(steps, spec):
            told(outcome)
            found.append(outcome)
    return tuple(found)


def _together(steps: list[Step], spec: Spec) -> list[Outcome]:
    """Do the steps of one name on the servers of a target, or none of them."""
    found: list[Outcome] = []
    for place, step in enumerate(steps):
        started = time.perf_counter()
        try:
            _bring(step, spec)
        except (TDeployError, MlflowException) as error:
            why = first_line(error)
            back = [_taken_back(one, spec, why) for one in found]
            failed = Outcome(step, "failed", time.perf_counter() - started, why)
            return [*back, failed, *(Outcome(rest, "left", why=why) for rest in steps[place + 1 :])]
        found.append(Outcome(step, "done", time.perf_counter() - started))
    return found


def _bring(step: Step, spec: Spec) -> None:
    """Have a version answer on a server, with what the plan has seen.

    Raises:
        ConflictError: The plan is older than what is there, or the variant would be another one now.
        TDeployError: See :meth:`Deployments.deploy`.
    """
    found, rule = _there(step, spec), _rule(step, spec)
    try:
        before: dict[str, Any] | None = found.describe(step.name)
    except NotFoundError:
        before = None
    version = before["version"] if before else None
    if version not in (step.before, step.after):
        raise ConflictError(f"Version {version} of '{step.name}' answers, the plan has seen {step.before}. Plan again.")
    if before:
        before = {**before, "config": {}}  # what the file says counts, and nothing that was said before it
    wanted = Wanted(found, step.name, f"models:/{step.model}/{step.after}", "", dict(rule.serve), before)
    what, how = wanted.for_server()
    if rule.variants == "pinned" and isinstance(what, BundleVersion) and what.variant.digest != step.digest:
        raise ConflictError(
            f"'{what.variant.id}' would serve '{step.name}' at {step.server}, and the plan has seen "
            f"'{step.variants[1]}'. Plan again, or say variants: auto."
        )
    found.deploy(what, how)


def _taken_back(outcome: Outcome, spec: Spec, why: str) -> Outcome:
    """Give a server back what it had."""
    step, started = outcome.step, time.perf_counter()
    try:
        found = _there(step, spec)
        if step.before is None:
            found.delete(step.name)
        else:
            found.rollback(step.name, step.before)
    except TDeployError as error:
        _log.warning("Version %s of '%s' stays at %s: %s", step.after, step.name, step.server, first_line(error))
        return Outcome(step, "done", outcome.seconds, f"not taken back: {first_line(error)}")
    seconds = outcome.seconds + time.perf_counter() - started
    return Outcome(step, "taken back", seconds, f"another server failed: {why}")


def _there(step: Step, spec: Spec) -> Deployments:
    target, server = _server(step, spec)
    return deployments_at(target, server)


def _server(step: Step, spec: Spec) -> tuple[Target, Server]:
    target = spec.targets.get(step.target)
    server = next((one for one in target.servers if one.url == step.server), None) if target else None
    if target is None or server is None:
        raise ConflictError(f"There is no server {step.server} in target '{step.target}' any more. Plan again.")
    return target, server


def _rule(step: Step, spec: Spec) -> Rule:
    of_target = (one for one in spec.models if one.matches(step.model) and step.target in one.to)
    found = next((one for one in of_target if one.served_as(step.model) == step.name), None)
    if found is None:
        raise ConflictError(
            f"No rule is about '{step.model}' as '{step.name}' on target '{step.target}' any more. Plan again."
        )
    return found
