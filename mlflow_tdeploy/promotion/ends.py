"""What follows from a server that went away while a version was loaded, see ``deploy.ends``."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mlflow_tdeploy.core.errors import LateError, ServerError, StorageError, UnreachableError
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.ends import Notes
from mlflow_tdeploy.deploy.files import RepositoryFiles
from mlflow_tdeploy.deploy.settings import as_record
from mlflow_tdeploy.promotion.outcome import by_place
from mlflow_tdeploy.promotion.place import rule_of, server_of
from mlflow_tdeploy.promotion.plan import CHANGES, Plan, Step
from mlflow_tdeploy.promotion.spec import Rule, Spec
from mlflow_tdeploy.triton.names import owner

#: So often in a row a server may go away while a version is loaded, for which others may be to blame.
MOST_ENDS = 2


def notes(files: RepositoryFiles, server: str, name: str, rule: Rule) -> Notes:
    """Return what is noted of versions under a name, as long as nothing else is said about serving them."""
    return Notes(files, server, name, hashlib.sha256(as_record(rule.serve).encode()).hexdigest()[:16])


@dataclass
class Load:
    """A load that is noted.

    Attributes:
        ended: Whether the server has gone away with it, or may have.
    """

    ended: bool = False


@contextlib.contextmanager
def noted(step: Step, version: int | None, spec: Spec) -> Iterator[Load]:
    """Note that a version is loaded, and tried out, on a step's server, and how that ends.

    A server that goes away under requests counts as one that its load ends: others may be to blame for either, which is
    why the first time is not the last, and it is lost with all that it has either way. What fails without the server
    leaves the count as it is: it may not have come to the load.

    Args:
        step: What is done there. Who calls holds its place.
        version: The version; None for none.
        spec: What the step was made from.
    """
    load, found = Load(), server_of(step, spec)
    if version is None or (before := _look(found, step)) is None:
        yield load  # a server that is away before is not ended
        return
    known = _notes(step, spec)
    times = known.begin(version, gone=before.empty or (step.before is not None and not before.own))
    try:
        yield load
    except BaseException as error:
        interrupted = not isinstance(error, Exception)  # who is has no time to find out
        gone = None if interrupted else _has_gone(before, _after(found, step), step.before != version)
        late = isinstance(error, LateError)  # it may be loading on, and end the server yet
        was_closed = isinstance(error, UnreachableError) and not late
        load.ended = gone or (gone is None and was_closed)
        # what the next look goes by: what is deployed, or others where nothing is
        tells = step.before == version or before.own or (step.before is None and bool(before.others))
        if (gone is None and (interrupted or was_closed)) or (late and not gone and tells):
            raise  # what was begun stays noted: who comes next sees whether the server has what it had
        with contextlib.suppress(StorageError, OSError):  # the error that counts is on its way
            known.end(version, times, server_gone=gone or None)
        raise
    with contextlib.suppress(StorageError, OSError):  # what is left counts where the server is away alone
        known.end(version, times, server_gone=False)


def _notes(step: Step, spec: Spec) -> Notes:
    return notes(server_of(step, spec).files, step.server, step.name, rule_of(step, spec))


@dataclass(frozen=True)
class _Had:
    """What a server has loaded, or is loading: who asked for it may be gone.

    Attributes:
        own: Whether that is the graph of what is deployed under a name: nobody else unloads it.
        others: Models of other names.
        empty: Whether it is nothing at all.
    """

    own: bool
    others: frozenset[str]
    empty: bool


def _look(found: Deployments, step: Step) -> _Had | None:
    """Return what a server has loaded; None where it is not there."""
    try:
        names = {one.name for one in found.client.models() if one.is_there}
    except ServerError:
        return None
    others = frozenset(one for one in names if owner(one) != step.name)
    return _Had(step.before is not None and f"{step.name}.v{step.before}" in names, others, not names)


def _after(found: Deployments, step: Step) -> _Had | Literal["gone", "unknown"]:
    """Return what a server has loaded after something failed.

    One that answers and cannot list its models (its store is away, say) has not gone.
    """
    if (had := _look(found, step)) is not None:
        return had
    try:
        return "unknown" if found.client.live() else "gone"
    except ServerError:
        return "gone"


def _has_gone(before: _Had, now: _Had | Literal["gone", "unknown"], own_stays: bool) -> bool | None:
    """Tell whether a server is not there, or has not any more what it had: one that is only late has.

    Args:
        before: What it had.
        now: What it has.
        own_stays: Whether what is deployed stays loaded whatever becomes of what is brought. Then that tells: others
            may have been loaded anew meanwhile.

    Returns:
        None for one that had nothing, and is there, or does not say what it has: nobody knows.
    """
    if not isinstance(now, _Had):
        return True if now == "gone" else None
    if own_stays and before.own:
        return not now.own
    return not before.others & now.others if before.others else None


def settle(steps: Iterable[Step], spec: Spec) -> None:
    """Count what was begun on servers that have nothing, of names of which nothing is deployed or answers.

    Before anything is had back there: then nothing would tell any more. Who is at it right now may be counted as well,
    and says in the end how it was.

    Args:
        steps: How names stand on the servers.
        spec: What that was made from.
    """
    for one in steps:
        if (one.before is None or one.silent) and one.ends:
            with contextlib.suppress(Exception):  # the next look, then
                had = _look(server_of(one, spec), one)
                if had is not None and had.empty:
                    _notes(one, spec).settle()


def forget(steps: Iterable[Step], spec: Spec) -> None:
    """Forget what is noted of versions that nobody wants now, and that do not have to be had back either."""
    for step in steps:
        wanted = step.after if step.action not in ("none", "keep") else None
        deployed = step.before if step.silent or step.action == "unknown" else None
        if step.ends and set(step.ends) - {wanted, deployed}:
            with contextlib.suppress(Exception):  # the next look, then
                _notes(step, spec).keep((wanted, deployed))


def forgive(plan: Plan, spec: Spec) -> Plan:
    """Forget all that is noted, so that everything is tried again; return the plan without it.

    Raises:
        StorageError: A repository refuses.
    """
    for step in plan.steps:
        if step.ends:
            _notes(step, spec).keep(())
    return Plan(tuple(replace(one, ends={}) for one in plan.steps))


def spared(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return steps of which none brings a version that has ended a server to another one before it has come there.

    Where a server went away while a version came, that very server gets it first, once more: it is the first of its
    target, whose others get back what they had where it fails there. Other targets wait for that. Where it happened
    twice in a row, nobody gets it, until something else is wanted there or said.

    Args:
        steps: Those of all servers that a model is served on.
    """
    found = _noted_first(steps)
    ended = _ended(found)
    first_of = {place: of[0].server for place, of in by_place(found).items() if of[0].action in CHANGES}

    def of(one: Step) -> Step:
        if one.silent and is_left_alone(one):
            one = replace(one, why=f"{_left_alone(one.server, one.ends[one.before or 0], one.before)}; {one.why}")
        servers = _blaming(one, ended) if one.action in CHANGES else {}
        if not servers:
            return one
        worst = max(servers, key=servers.__getitem__)
        if servers[worst] >= MOST_ENDS:
            return replace(one, action="refuse", strategy="", why=_left_alone(worst, servers[worst], one.after))
        if one.server in servers or first_of.get((one.target, one.name)) in servers:
            return one
        why = (
            f"{worst} went away while version {one.after} came: it gets it first, once more, when it is there "
            f"(tdeploy apply --again insists)"
        )
        return replace(one, action="refuse", strategy="", why=why)

    return _wholly(tuple(map(of, found)), found)


def _wholly(decided: Sequence[Step], before: Sequence[Step]) -> tuple[Step, ...]:
    """Return steps of which a place takes a version on all of its servers, or on none that it is spared.

    Args:
        decided: The steps, each by itself.
        before: What they were.
    """
    spared_at = {
        (now.target, now.name, now.after): now.why
        for now, was in zip(decided, before, strict=True)
        if now.action == "refuse" and was.action in CHANGES and was.before != was.after
    }

    def of(one: Step) -> Step:
        why = spared_at.get((one.target, one.name, one.after))
        if why is None or one.action not in CHANGES or one.before == one.after:
            return one
        return replace(one, action="refuse", strategy="", why=why)

    return tuple(map(of, decided))


def _noted_first(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return steps in an order in which, of a target, the server comes first that went away with what is to come."""
    of_places = by_place(steps).values()
    return tuple(one for of in of_places for one in sorted(of, key=lambda step: step.after not in step.ends))


def _ended(steps: Iterable[Step]) -> dict[tuple[str, int], dict[str, int]]:
    """Return by model and version which servers went away with it, and how often, of those that are to get it.

    A version that is deployed there has been good: what became of having it back says nothing about others.
    """
    found: dict[tuple[str, int], dict[str, int]] = {}
    for one in steps:
        is_to_get_it = one.action in (*CHANGES, "unknown") and one.after != one.before
        if is_to_get_it and one.after is not None and (times := one.ends.get(one.after)):
            known = found.setdefault((one.model, one.after), {})
            known[one.server] = max(times, known.get(one.server, 0))
    return found


def _blaming(one: Step, ended: Mapping[tuple[str, int], Mapping[str, int]]) -> dict[str, int]:
    """Return which servers speak against what a step brings, and how often they went away with it."""
    if one.after is None:
        return {}
    servers = {} if one.before == one.after else dict(ended.get((one.model, one.after), {}))
    if one.kept:  # it has been good there
        servers = {server: times for server, times in servers.items() if times >= MOST_ENDS}
    if one.after in one.ends:
        servers[one.server] = max(one.ends[one.after], servers.get(one.server, 0))
    return servers


def is_left_alone(step: Step) -> bool:
    """Tell whether what is deployed on a server that has nothing is not loaded any more."""
    return step.before is not None and step.ends.get(step.before, 0) >= MOST_ENDS


def _left_alone(server: str, times: int, version: int | None) -> str:
    return (
        f"{server} went away {times} times in a row while version {version} came, and with it all that it has: the "
        f"version is left alone until something else is wanted or said (tdeploy apply --again insists)"
    )
