"""What should answer, and what does: drift, told for each name and server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlflow_tdeploy.promotion.plan import Plan, Step

State = Literal["in sync", "drift", "refused", "not wanted", "unknown"]
_STATES: dict[str, State] = {
    "none": "in sync",
    "create": "drift",
    "update": "drift",
    "refuse": "refused",
    "keep": "not wanted",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Standing:
    """A stable name on a server.

    Attributes:
        state: ``in sync``; ``drift``: another version should answer, or it does not, or not as is said; ``refused``: it
            should, and may not; ``not wanted``: the registry says nothing, what serves serves on; ``unknown``: the
            server does not answer, or there is no such registered model.
        target: The target.
        server: The server's address.
        name: The stable name.
        model: The registered model.
        wants: The version that should answer; None for none.
        serves: The version that does, or would if the server were there; None for none.
        variant: Its variant.
        since: When it was switched to, UTC in ISO format.
        by: Who did that.
        why: Why they are not the same, in one line.
    """

    state: State
    target: str
    server: str
    name: str
    model: str
    wants: int | None
    serves: int | None
    variant: str = ""
    since: str = ""
    by: str = ""
    why: str = ""

    @property
    def right(self) -> bool:
        """Whether there is nothing to do and nothing to know: it is as the registry says, or that says nothing."""
        return self.state in ("in sync", "not wanted")


def status_of(plan: Plan) -> tuple[Standing, ...]:
    """Return how names stand, from what would have to be done."""
    return tuple(_standing(step) for step in plan.steps)


def _standing(step: Step) -> Standing:
    state: State = "drift" if step.silent and step.action == "keep" else _STATES[step.action]
    serves = None if step.silent else step.before
    return Standing(
        state, step.target, step.server, step.name, step.model, step.after, serves, step.variants[0],
        step.since, step.by, _why(step, state),
    )  # fmt: skip


def _why(step: Step, state: State) -> str:
    """Return why a server is not as the registry says; a plan tells which variant would come instead."""
    if state == "in sync":
        return ""
    if state == "drift" and step.why == step.decision:
        deployed = f"version {step.before} is deployed" if step.before else "nothing is deployed"
        return f"{deployed}, and version {step.after} is wanted"
    return step.why
