"""A plan of what is there: the registry and the servers are read, nothing is changed and no weights are fetched."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from mlflow import MlflowClient

from mlflow_tdeploy.deploy.ends import resolved
from mlflow_tdeploy.deploy.files import open_files
from mlflow_tdeploy.promotion.actual import Observed, There, ask_server, asked_at, observe, published_at
from mlflow_tdeploy.promotion.candidate import candidate, evidence
from mlflow_tdeploy.promotion.ends import notes, spared
from mlflow_tdeploy.promotion.plan import Before, Plan, Step, all_or_none, at_first, settled, step
from mlflow_tdeploy.promotion.records import FRESH_S
from mlflow_tdeploy.promotion.registry import Desired, desired
from mlflow_tdeploy.promotion.spec import Server, Spec, Target

_ANOTHER = (
    "version {version} is kept there, and it is another model that had this number, or has other files: register the "
    "model once more and move the alias, or delete the deployment first"
)
#: Servers that are asked at once.
_AT_ONCE = 8


def make_plan(spec: Spec, client: MlflowClient | None = None, *, within: float = FRESH_S, sparing: bool = True) -> Plan:
    """Return what would have to change for a target's servers to agree with the registry.

    Args:
        spec: What should be served where.
        client: Whose registry; the current one by default.
        within: Seconds for which the records of a version that does not answer are good enough.
        sparing: See :func:`plan_for`.

    Raises:
        MlflowException: The registry does not answer.
    """
    return plan_for(spec, desired(spec, client), within=within, sparing=sparing)


def plan_for(spec: Spec, wanted: Iterable[Desired], *, within: float = FRESH_S, sparing: bool = True) -> Plan:
    """Return what would have to change for what is wanted to be so.

    Args:
        spec: What should be served where.
        wanted: What the registry wants; all about a model, for its servers are spared what has ended one of them.
        within: See :func:`make_plan`.
        sparing: Whether they are; not where somebody insists.
    """
    places = [(one, server) for one in wanted for server in spec.targets[one.target].servers]
    servers = {(one.target, server.url): (spec.targets[one.target], server) for one, server in places}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # each is asked once: of one that hangs every name would wait
        there = dict(zip(servers, pool.map(lambda which: ask_server(*which), servers.values()), strict=True))
        steps = pool.map(lambda of: _step(spec, of[0], of[1], there[of[0].target, of[1].url], within), places)
        found = all_or_none(steps)
        return Plan(at_first(spared(found) if sparing else found))


def _step(spec: Spec, wanted: Desired, server: Server, there: There, within: float) -> Step:
    found = observe(spec.targets[wanted.target], server, wanted.name, live=there.live)
    found = replace(found, ends=_ends(spec.targets[wanted.target], server, wanted, found, there))
    if (nothing := settled(wanted, found)) is not None:
        return nothing
    if not found.reachable or wanted.version is None:
        return step(wanted, found, None, Before())
    coming = candidate(wanted, found, within)
    if wanted.version in found.kept:
        place = (spec.targets[wanted.target], server, wanted.name, wanted.version)
        came, (_, manifest) = published_at(*place), asked_at(*place)
        if coming.is_model(manifest, came.get("digest", "")):  # it is gone back to, and not made
            coming = coming.as_it_came(came, _known_evidence(wanted.uri, came.get("variant", "")))
        elif manifest and not coming.refused:
            coming = replace(coming, refused=_ANOTHER.format(version=wanted.version))
    return step(wanted, found, coming, _before(spec, wanted, server, found))


def _ends(target: Target, server: Server, wanted: Desired, found: Observed, there: There) -> dict[int, int]:
    try:
        found_notes = notes(open_files(target.repository_of(server)), server.url, wanted.name, wanted.rule)()
    except Exception:  # of a repository that cannot be read nothing is known
        return {}
    gone = not found.reachable or there.lost(wanted.name, found.version)  # as who begins a load there would say
    known = resolved(found_notes, gone=gone)
    return {version: note.times for version, note in known.items()}


def _before(spec: Spec, wanted: Desired, server: Server, found: Observed) -> Before:
    """Return what is known of the version that serves.

    What it takes and answers is read beside its front in the repository. Its evidence is in the registry, which may
    have forgotten it.
    """
    if found.version is None:
        return Before()
    asked, manifest = asked_at(spec.targets[wanted.target], server, wanted.name, found.version)
    return Before(asked, _known_evidence(found.says("model_uri"), found.says("variant")), manifest)


def _known_evidence(uri: str, variant: str) -> dict[str, float]:
    """Return a variant's evidence; none where the registry has forgotten it, or is away."""
    try:
        return evidence(uri, variant)
    except Exception:  # whatever became of it there
        return {}
