"""What became of the steps of a plan, and what the registry is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlflow_tdeploy.core.errors import PromotionError
from mlflow_tdeploy.promotion.history import Decision, Event, event
from mlflow_tdeploy.promotion.plan import Plan, Step


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        step: The step.
        state: ``done``; ``failed``, and what served serves on; ``taken back``, as another server of its target failed;
            ``left``: not begun, as one before it failed.
        seconds: How long it took.
        why: Why it failed, in one line.
        seen: What was seen when it was tried out, in one line.
        worse: Whether it failed as it did worse than the version that serves: it would again.
        ended: Whether the server has gone away while the version came, or may have.
        unsure: Whether nobody knows what answers there, as the server could not be asked any more.
    """

    step: Step
    state: Literal["done", "failed", "taken back", "left"]
    seconds: float = 0.0
    why: str = ""
    seen: str = ""
    worse: bool = False
    ended: bool = False
    unsure: bool = False


def by_place(steps: Iterable[Step]) -> dict[tuple[str, str], list[Step]]:
    """Return the steps of each target and stable name, in their order."""
    found: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        found.setdefault((step.target, step.name), []).append(step)
    return found


def refusals(plan: Plan, trigger: str) -> Iterable[Event]:
    """Return what is to be told of versions that may not serve; a server that is away says nothing about them."""
    for (target, name), steps in by_place(plan.steps).items():
        refused = [one for one in steps if one.action == "refuse"]
        if refused and (version := refused[0].after) is not None:
            yield _event(refused, trigger, target, name, version, "refused", refused[0].why)


def events_of(outcomes: Iterable[Outcome], trigger: str, done: Decision = "deployed") -> Iterable[Event]:
    """Return what is to be told of versions that were brought, or were not.

    Args:
        outcomes: What became of the steps.
        trigger: What was called.
        done: What to call it where all went well.
    """
    known = {id(one.step): one for one in outcomes}
    for (target, name), steps in by_place(one.step for one in known.values()).items():
        ours = [known[id(one)] for one in steps]
        states = {one.state for one in ours}
        if (version := steps[0].after) is None or states == {"left"}:
            continue
        why = next((one.why for one in ours if one.state == "failed"), next((one.why for one in ours if one.why), ""))
        decision: Decision = done if states == {"done"} else "failed" if "failed" in states else "taken back"
        if decision == done:
            why = "; ".join(filter(None, (steps[0].why, *(one.seen for one in ours))))
        yield _event(steps, trigger, target, name, version, decision, why, sum(one.seconds for one in ours))


def _event(
    steps: Sequence[Step], trigger: str, target: str, name: str, version: int, decision: Decision, why: str,
    seconds: float = 0.0,
) -> Event:  # fmt: skip
    first, servers = steps[0], tuple(one.server for one in steps)
    return event(
        trigger, target, name, first.model, version, decision, why=why, before=first.before,
        variant=first.variants[1], seconds=round(seconds, 3), servers=servers,
    )  # fmt: skip


def require_done(outcomes: Iterable[Outcome], what: str) -> None:
    """Make sure that all steps were done.

    Args:
        outcomes: What became of them.
        what: What was not done else, for people.

    Raises:
        PromotionError: One failed.
    """
    found = tuple(outcomes)
    bad = next(
        (one for one in found if one.state == "failed"), next((one for one in found if one.state != "done"), None)
    )
    if bad is None:
        return
    stays = ", ".join(one.step.server for one in found if one.state == "done")
    back = f"These could not be given back what they had: {stays}." if stays else "Everything is as it was."
    if unknown := ", ".join(one.step.server for one in found if one.unsure):
        back = f"{back if stays else ''} What answers at {unknown} is not known: see tdeploy status.".strip()
    raise PromotionError(f"{what}: '{bad.step.name}' at {bad.step.server} failed: {bad.why.rstrip('.')}. {back}")
