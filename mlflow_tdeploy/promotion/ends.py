"""What follows from a server that went away while a version was loaded, see ``deploy.ends``."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from mlflow_tdeploy.core.errors import ServerError, StorageError
from mlflow_tdeploy.deploy.apply import Deployments
from mlflow_tdeploy.deploy.ends import Notes
from mlflow_tdeploy.deploy.files import RepositoryFiles
from mlflow_tdeploy.deploy.settings import as_record
from mlflow_tdeploy.promotion.place import rule_of, server_of
from mlflow_tdeploy.promotion.plan import CHANGES, Plan, Step
from mlflow_tdeploy.promotion.spec import Rule, Spec

#: So often in a row a server may go away while a version is loaded, for which others may be to blame.
MOST_ENDS = 2


def notes(files: RepositoryFiles, server: str, name: str, rule: Rule) -> Notes:
    """Return what is noted of versions under a name, as long as nothing else is said about serving them."""
    return Notes(files, server, name, hashlib.sha256(as_record(rule.serve).encode()).hexdigest()[:16])


@dataclass
class Load:
    """A load that is noted.

    Attributes:
        times: How often in a row the server has gone away with it, once it has ended.
        came: Whether the version is there, and only tried out: what becomes of the server then may be others' doing.
        gone: Whether the server went away while it was tried out.
    """

    times: int = 0
    came: bool = False
    gone: bool = False


@contextlib.contextmanager
def noted(step: Step, version: int | None, spec: Spec) -> Iterator[Load]:
    """Note that a version is loaded on a step's server, and how that ends.

    What fails without the server leaves the count as it is, whatever it was: it may not have come to the load.

    Args:
        step: What is done there. Who calls holds its place, and says with :attr:`Load.came` when it is loaded.
        version: The version; None for none.
        spec: What the step was made from.
    """
    load, found = Load(), server_of(step, spec)
    if version is None or (before := _ready(found)) is None:
        yield load  # a server that is away before is not ended
        return
    known = _notes(step, spec)
    known.begin(version)
    try:
        yield load
    except BaseException as error:
        gone = _has_gone(found, before) if isinstance(error, Exception) else None  # who is interrupted does not know
        with contextlib.suppress(StorageError, OSError):  # the error that counts is on its way
            load.gone = load.came and bool(gone)
            if load.came:
                known.end(version, server_gone=bool(gone), most=1)  # it may be others' doing: not for good
            else:
                load.times = known.end(version, server_gone=gone or None)
        raise
    with contextlib.suppress(StorageError, OSError):  # what is left counts where the server is away alone
        known.end(version, server_gone=False)


def _notes(step: Step, spec: Spec) -> Notes:
    return notes(server_of(step, spec).files, step.server, step.name, rule_of(step, spec))


def _ready(found: Deployments) -> set[tuple[str, str]] | None:
    """Return what a server has loaded; None where it is not there."""
    try:
        return {(one.name, one.version) for one in found.client.models() if one.state == "READY"}
    except ServerError:
        return None


def _has_gone(found: Deployments, before: set[tuple[str, str]]) -> bool | None:
    """Tell whether a server is not there, or has nothing any more of what it had: one that is only late has.

    Returns:
        None for one that had nothing, and is there: nobody knows.
    """
    now = _ready(found)
    return now is None or (not before & now if before else None)


def settle(step: Step, spec: Spec) -> None:
    """Count what was begun on a server that came back empty, and of which nobody has seen the end.

    What is deployed is loaded there next: whether the server was silent before its load was begun is not known.
    """
    with contextlib.suppress(StorageError, OSError):
        _notes(step, spec).settle(step.before)


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
    """Return steps of which none brings a version that has ended a server to another one.

    Where a server went away while a version came, that very server gets it first, once more. Where that happened twice
    in a row, nobody gets it, until something else is wanted there or said.

    Args:
        steps: Those of all servers that a model is served on.
    """
    found = tuple(steps)
    ended = _ended(found)

    def of(one: Step) -> Step:
        if one.silent and is_left_alone(one):
            one = replace(one, why=f"{_left_alone(one.server, one.ends[one.before or 0], one.before)}; {one.why}")
        servers = _blaming(one, ended) if one.action in CHANGES else {}
        if not servers:
            return one
        worst = max(servers, key=servers.__getitem__)
        if servers[worst] >= MOST_ENDS:
            return replace(one, action="refuse", strategy="", why=_left_alone(worst, servers[worst], one.after))
        if one.server in servers:
            return one
        why = (
            f"{worst} went away while version {one.after} came: it gets it first, once more, when it is there "
            f"(tdeploy apply --again insists)"
        )
        return replace(one, action="refuse", strategy="", why=why)

    return tuple(map(of, found))


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
        f"{server} went away {times} times in a row while version {version} was loaded, and with it all that it has: "
        f"the version is left alone until something else is wanted or said (tdeploy apply --again insists)"
    )
