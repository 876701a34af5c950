"""Where a step is done, and by which rule."""

from __future__ import annotations

from mlflow_tdeploy.core.errors import ConflictError
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.plan import Step
from mlflow_tdeploy.promotion.spec import Rule, Server, Spec, Target


def server_of(step: Step, spec: Spec) -> Deployments:
    """Return the deployments of a step's server.

    Raises:
        ConflictError: There is no such server any more.
    """
    target, server = _server(step, spec)
    return deployments_at(target, server)


def _server(step: Step, spec: Spec) -> tuple[Target, Server]:
    target = spec.targets.get(step.target)
    server = next((one for one in target.servers if one.url == step.server), None) if target else None
    if target is None or server is None:
        raise ConflictError(f"There is no server {step.server} in target '{step.target}' any more. Plan again.")
    return target, server


def rule_of(step: Step, spec: Spec) -> Rule:
    """Return the rule that a step is made from.

    Raises:
        ConflictError: There is no such rule any more.
    """
    of_target = (one for one in spec.models if one.matches(step.model) and step.target in one.to)
    found = next((one for one in of_target if one.served_as(step.model) == step.name), None)
    if found is None:
        raise ConflictError(
            f"No rule is about '{step.model}' as '{step.name}' on target '{step.target}' any more. Plan again."
        )
    return found
