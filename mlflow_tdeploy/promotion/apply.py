"""What a plan says is done: server by server, and taken back where it fails on one of them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import (
    ConflictError,
    NotFoundError,
    TDeployError,
    TryoutError,
    UnreachableError,
    first_line,
)
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.found import TDEPLOY, LoggedBundle
from mlflow_tdeploy.deploy.plan import key_of
from mlflow_tdeploy.deploy.route import Route
from mlflow_tdeploy.deploy.settings import DeploySettings
from mlflow_tdeploy.deploy.wanted import Wanted
from mlflow_tdeploy.promotion.actual import sum_of_manifest
from mlflow_tdeploy.promotion.candidate import is_model
from mlflow_tdeploy.promotion.ends import Load, forget, noted, settle
from mlflow_tdeploy.promotion.gates import metric_gate
from mlflow_tdeploy.promotion.history import History
from mlflow_tdeploy.promotion.lease import places_held
from mlflow_tdeploy.promotion.look import make_plan, plan_for
from mlflow_tdeploy.promotion.outcome import Outcome, by_place, events_of, refusals
from mlflow_tdeploy.promotion.place import rule_of, server_of
from mlflow_tdeploy.promotion.plan import Plan, Step
from mlflow_tdeploy.promotion.records import opened
from mlflow_tdeploy.promotion.registry import desired
from mlflow_tdeploy.promotion.revive import revived
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import MANIFEST
from mlflow_tdeploy.triton.bundle_version import BundleVersion

_log = logging.getLogger("mlflow_tdeploy")
#: Seconds between two looks at the registry while a version is tried out.
_LOOK_S = 3.0
#: Seconds to wait for who promotes next, who does the same in the end.
_PATIENCE_S = 5.0
#: Servers whose requests are waited for at once.
_AT_ONCE = 8
_OTHERWISE = (
    "Version {version} of '{name}' is kept at {server} with other files or options, or not all of its files are there "
    "any more, and a version is not changed in place: register it once more and move the alias, or say what was said "
    "when it came."
)
#: Does a step, and returns what was seen; it may ask whether it shall go on.
Do = Callable[[Step, Spec, Callable[[], None]], str]


def apply(
    plan: Plan,
    spec: Spec,
    told: Callable[[Outcome], None] = lambda outcome: None,
    *,
    client: MlflowClient | None = None,
) -> tuple[Outcome, ...]:
    """Do what a plan says; what it refuses is left alone, and a second call finds nothing to do.

    The servers of a target get a version one by one. Where one fails, those before it get back what they had: a target
    never serves two versions for longer than that takes. Other names and targets are not affected. What is deployed
    and does not answer is brought back first, whatever the registry wants.

    Args:
        plan: What to do.
        spec: What it was made from.
        told: Called with each outcome.
        client: Whose registry is told what became of it; the current one by default.

    Returns:
        An outcome for each step that changes something, in the order of the plan; those that brought back what was
        deployed come before.
    """
    history = History(client)
    history.add(refusals(plan, "apply"))
    found: list[Outcome] = []

    def note(outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            told(outcome)
        found.extend(outcomes)
        history.add(events_of(outcomes, "apply"))

    settle(plan.steps, spec)
    for steps in by_place(plan.steps).values():
        note(_revived(steps, spec))
    if any(one.ends for one in plan.steps):
        with contextlib.suppress(Exception):  # a registry that is away, say: the next time, then
            forget(make_plan(spec, client).steps, spec)
    for steps in by_place(plan.changes).values():
        ended = next((one for one in found if one.ended and _is_about(one, steps)), None)
        note(_alone(steps, spec, client) if ended is None else _spared(steps, ended.step))
    return tuple(found)


def _revived(steps: Sequence[Step], spec: Spec) -> tuple[Outcome, ...]:
    if not any(one.silent for one in steps):
        return ()
    try:
        with places_held(spec, {(one.target, one.name) for one in steps}):
            return revived(steps, spec)
    except Exception as error:  # somebody else is at it, or the repository refuses: who brings versions finds out
        _log.warning("'%s' on '%s' was left: %s", steps[0].name, steps[0].target, first_line(error))
        return ()


def _is_about(one: Outcome, steps: Sequence[Step]) -> bool:
    """Tell whether what has ended a server is what steps bring; having it back there says something of that server."""
    there = any(step.server == one.step.server for step in steps)
    return (one.step.model, one.step.after) == (steps[0].model, steps[0].after) and (there or not one.step.again)


def _spared(steps: Iterable[Step], ended: Step) -> list[Outcome]:
    why = f"{ended.server} went away while version {ended.after} came: it does not come here as well"
    return [Outcome(one, "left", why=why) for one in steps]


def _alone(steps: list[Step], spec: Spec, client: MlflowClient | None) -> list[Outcome]:
    """Do the steps while nobody else promotes to the target, if the registry wants them still."""
    try:
        with places_held(spec, {(one.target, one.name) for one in steps}):
            _require_wanted(spec, client, steps)
            _require_not_spared(spec, client, steps)
            done = together(steps, spec, go_on=wanted_still(spec, client, steps))
    except Exception as error:  # somebody else is at it, or the repository refuses: nothing was begun
        return [Outcome(one, "left", why=first_line(error)) for one in steps]
    retire(done, spec)
    return done


def _require_wanted(spec: Spec, client: MlflowClient | None, steps: Iterable[Step]) -> None:
    now = {(one.target, one.name): one.version for one in desired(spec, client)}
    if old := [one for one in steps if now.get((one.target, one.name)) != one.after]:
        raise ConflictError(f"The registry does not want version {old[0].after} any more. Plan again.")


def _require_not_spared(spec: Spec, client: MlflowClient | None, steps: Sequence[Step]) -> None:
    """Make sure that no server has been ended by it since the plan was made."""
    wanted = [one for one in desired(spec, client) if one.model == steps[0].model]
    places = {(one.target, one.name, one.server) for one in steps}
    for one in plan_for(spec, wanted).refused:
        if one.action == "refuse" and (one.target, one.name, one.server) in places:
            raise ConflictError(f"It may not serve there any more: {one.why}. Plan again.")


def wanted_still(spec: Spec, client: MlflowClient | None, steps: Iterable[Step]) -> Callable[[], None]:
    """Return what raises a ConflictError where the registry wants another version by now; it may be called often."""
    looked, meant = time.monotonic(), tuple(steps)

    def go_on() -> None:
        nonlocal looked
        if time.monotonic() - looked < _LOOK_S:
            return
        looked = time.monotonic()
        with contextlib.suppress(MlflowException):  # a registry that is away says nothing
            _require_wanted(spec, client, meant)

    return go_on


@dataclass
class _Done:
    """A step that was done, or begun, and what undoes it."""

    outcome: Outcome
    route: Route | None


def together(
    steps: Sequence[Step], spec: Spec, do: Do | None = None, go_on: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Do all steps, one by one, or none of them: where one fails, those before it are as they were.

    What is not kept any more stays, so that every server can go back; :func:`retire` removes it. Who is interrupted
    takes back what was done, too.

    Args:
        steps: The steps. Who calls holds their places, see :func:`places_held`.
        spec: What they were made from.
        do: Does a step and retires nothing; brings the version by default.
        go_on: Called again and again while a version is tried out; what it raises ends that.
    """
    # before anything is done: servers may have one repository, which says the same of all of them
    routes = [server_of(step, spec).route(step.name) for step in steps]
    done: list[_Done] = []
    for place, step in enumerate(steps):
        started, load = time.perf_counter(), Load()
        try:
            with noted(step, step.after, spec) as load:
                seen = (do or _bring)(step, spec, go_on)
        except BaseException as error:  # whatever a gate throws: what served serves on
            why, seconds, worse = _why(error, step), time.perf_counter() - started, isinstance(error, TryoutError)
            begun = _Done(Outcome(step, "failed", seconds, why, worse=worse, ended=load.ended), routes[place])
            found = _all_taken_back([*done, begun], spec, why)
            if not isinstance(error, Exception):
                raise
            return [*found, *(Outcome(rest, "left", why=why) for rest in steps[place + 1 :])]
        done.append(_Done(Outcome(step, "done", time.perf_counter() - started, seen=seen), routes[place]))
    return [one.outcome for one in done]


def _why(error: BaseException, step: Step) -> str:
    if isinstance(error, (TDeployError, MlflowException)):
        return first_line(error)
    if isinstance(error, Exception):
        _log.exception("Version %s of '%s' at %s", step.after, step.name, step.server)
    return f"{type(error).__name__}: {first_line(error)}"


def retire(outcomes: Iterable[Outcome], spec: Spec) -> None:
    """Remove what is not kept any more where all is as it shall be; what cannot be removed now is the next time.

    It takes seconds, as requests that are being answered are waited for, on all servers at once. So it comes when
    nothing can be taken back any more, and nobody is held up meanwhile: who calls holds no place. Whoever promotes next
    while requests are waited for retires what is left here, too.
    """
    done = [one.step for one in outcomes if one.state == "done"]
    try:
        while done and not _retired_if_drained(done, spec):
            pass
    except Exception as error:
        first = done[0]
        _log.info("What is not kept of '%s' on '%s' stays for now: %s", first.name, first.target, first_line(error))


def _retired_if_drained(steps: Sequence[Step], spec: Spec) -> bool:
    """Wait for requests, then remove what is not kept; False where somebody has switched in between: wait for theirs.

    Raises:
        ConflictError: Somebody promotes there, and takes long.
        StorageError: The repository cannot be written.
    """
    in_time = _all_drained(steps, spec)
    with places_held(spec, {(one.target, one.name) for one in steps}, wait=_PATIENCE_S):
        if in_time and not all(_is_drained(step, spec) for step in steps):
            return False
        _retired(steps, spec)
    return True


def _all_drained(steps: Sequence[Step], spec: Spec) -> bool:
    """Wait for requests on all servers at once."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="tdeploy-drain") as pool:
        return all(list(pool.map(lambda step: _drain(step, spec), steps)))


def _drain(step: Step, spec: Spec) -> bool:
    try:
        return server_of(step, spec).drain(step.name, DeploySettings.of(rule_of(step, spec).serve).grace)
    except Exception:  # who retires finds out
        return False


def _is_drained(step: Step, spec: Spec) -> bool:
    try:
        return server_of(step, spec).is_drained(step.name)
    except UnreachableError:  # nothing is answered there
        return True


def _retired(steps: Sequence[Step], spec: Spec) -> None:
    """Unload what is not kept on all servers, and then remove it: they may have one repository."""
    for unload_only in (True, False) if len(steps) > 1 else (False,):
        for step in steps:
            try:
                server_of(step, spec).retire(step.name, unload_only=unload_only)
            except Exception as error:
                _log.warning("What is not kept of '%s' stays at %s: %s", step.name, step.server, first_line(error))


def _bring(step: Step, spec: Spec, go_on: Callable[[], None]) -> str:
    """Have a version answer on a server, with what the plan has seen; return what was seen where it was tried out.

    Raises:
        ConflictError: The plan is older than what is there, or the variant would be another one now.
        TDeployError: See :meth:`Deployments.deploy`.
    """
    found, rule = server_of(step, spec), rule_of(step, spec)
    try:
        before: dict[str, Any] | None = found.describe(step.name)
    except NotFoundError:
        before = None
    version = before["version"] if before else None
    if version not in (step.before, step.after):
        raise ConflictError(f"Version {version} of '{step.name}' answers, the plan has seen {step.before}. Plan again.")
    if before:
        before = {**before, "config": {}}  # what the file says counts, and nothing that was said before it
    uri = f"models:/{step.model}/{step.after}"
    records = opened(uri)
    known = LoggedBundle(TDEPLOY, records.bundle, records.fetch)
    wanted = Wanted(found, step.name, uri, "", dict(rule.serve), before, known)
    back = step.after in (*before["previous"], *before["ahead"]) if before else False
    kept = back or version == step.after
    lies_there = kept and _lies_there(found, step, records.bundle)
    if back and lies_there:  # as it came, however it would be made now: nothing is fetched
        found.rollback(step.name, step.after, said=wanted.said, retire=False)
        return ""
    what, how = wanted.for_server()
    if kept and found.published_key(f"{step.name}.v{step.after}") not in ("", key_of(what, how)):
        if not lies_there:
            raise ConflictError(_OTHERWISE.format(version=step.after, name=step.name, server=step.server))
        found.rollback(step.name, step.after, said=how, retire=False)
        return ""
    if rule.variants == "pinned" and isinstance(what, BundleVersion) and what.variant.digest != step.digest:
        raise ConflictError(
            f"'{what.variant.id}' would serve '{step.name}' at {step.server}, and the plan has seen "
            f"'{step.variants[1]}'. Plan again, or say variants: auto."
        )
    judge = None if kept else metric_gate(rule.gates.metric, found, step.name)  # it has passed
    tryout = rule.strategy.tryout(go_on) if step.strategy else None
    return found.deploy(what, how, judge=judge, tryout=tryout, retire=False).seen


def _lies_there(found: Deployments, step: Step, bundle: Bundle) -> bool:
    """Tell whether a version that is kept is this very model, and all of its files are there."""
    graph = f"{step.name}.v{step.after}"
    manifest = sum_of_manifest(found.files.read(f"{step.name}/{step.after}/{MANIFEST}") or b"")
    there = is_model(bundle, manifest, found.published(graph).get("digest", ""))
    return there and found.is_whole(step.name, graph)


def _all_taken_back(done: Sequence[_Done], spec: Spec, why: str) -> list[Outcome]:
    """Give all servers back what they had, and then remove what was new."""
    found = [_taken_back(one, spec, why) for one in done]
    steps = [one.outcome.step for one in done if one.route is not None]
    _all_drained(steps, spec)
    _retired(steps, spec)
    return found


def _taken_back(done: _Done, spec: Spec, why: str) -> Outcome:
    """Give a server back what it had; one that failed has it already, as far as that could be done there."""
    outcome, started = done.outcome, time.perf_counter()
    step, failed = outcome.step, outcome.state == "failed"
    try:
        found = server_of(step, spec)
        if failed and not _has_come(step, found):
            return outcome
        if done.route is None:
            found.delete(step.name)
        else:
            found.restore(step.name, done.route, retire=False)
    except Exception as error:  # the others are taken back all the same
        _log.warning("Version %s of '%s' may stay at %s: %s", step.after, step.name, step.server, first_line(error))
        if failed:
            return replace(outcome, unsure=not isinstance(error, ConflictError))  # else another one knows
        return Outcome(step, "done", outcome.seconds, f"not taken back: {first_line(error)}")
    seconds = outcome.seconds + time.perf_counter() - started
    return outcome if failed else Outcome(step, "taken back", seconds, f"another server failed: {why}")


def _has_come(step: Step, found: Deployments) -> bool:
    """Tell whether a version that failed answers all the same: who is interrupted may be so right after the switch."""
    routes = (found.route(step.name), found.serving(step.name))
    return step.before != step.after and any(route is not None and route.active == step.after for route in routes)
