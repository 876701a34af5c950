"""What would have to change for the servers to agree with the registry: a pure function of both."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mlflow_tdeploy.core.errors import InvalidInputError, first_line
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.deploy.settings import as_record
from mlflow_tdeploy.promotion.actual import Observed
from mlflow_tdeploy.promotion.candidate import Candidate
from mlflow_tdeploy.promotion.compatible import Asked, Difference, differences
from mlflow_tdeploy.promotion.gates import measured_by
from mlflow_tdeploy.promotion.registry import Desired
from mlflow_tdeploy.promotion.spec import Metric

Action = Literal["none", "keep", "create", "update", "refuse", "unknown"]
#: Actions that change something.
CHANGES = ("create", "update")
_THERE = "it answers already"
#: What may be said of a deployment that is no part of any of its versions.
_OF_NO_VERSION = ("keep", "keep_loaded", "grace")


@dataclass(frozen=True)
class Verdict:
    """What a gate says.

    Attributes:
        gate: Its name.
        passed: Whether the version may serve.
        why: In one line.
    """

    gate: str
    passed: bool
    why: str = ""


@dataclass(frozen=True)
class Before:
    """What is known of the version that serves, besides what the server says.

    Attributes:
        asked: What it takes and answers; None where that cannot be known any more.
        metrics: Its variant's evidence.
        manifest: What tells the model as it was logged from another one; empty where that cannot be known any more.
    """

    asked: Asked | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    manifest: str = ""


@dataclass(frozen=True)
class Step:
    """What would happen to one stable name on one server.

    Attributes:
        action: ``none``: it is so already. ``keep``: the registry says nothing, what serves serves on. ``create`` and
            ``update`` bring a version. ``refuse``: it may not serve. ``unknown``: the server cannot be asked.
        target: Name of the target.
        server: Address of the server.
        name: The stable name.
        model: The registered model.
        before: Version that is deployed now.
        after: Version that would.
        variants: Variant now and then.
        digest: Of the variant's files then: what is applied is what was planned.
        moves: Bytes that would be sent.
        differences: What the version takes or answers otherwise.
        evidence: By name: what the variant that serves has, and what the other one has.
        verdicts: Of the gates, in order, up to the first that fails.
        strategy: How it is tried out there before it answers everybody; empty where it is not.
        why: In one line.
        since: When the version that is deployed was switched to, UTC in ISO format.
        by: Who did that.
        silent: Whether the version that is deployed does not answer, nor any other, though the server does.
        decision: Which variant would come, and why no other.
        kept: Whether the version that would answer is kept there.
        ends: How often in a row the server went away while a version came, by version; see ``promotion.ends``.
    """

    action: Action
    target: str
    server: str
    name: str
    model: str
    before: int | None = None
    after: int | None = None
    variants: tuple[str, str] = ("", "")
    digest: str = ""
    moves: int = 0
    differences: tuple[Difference, ...] = ()
    evidence: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    strategy: str = ""
    why: str = ""
    since: str = ""
    by: str = ""
    silent: bool = False
    decision: str = ""
    kept: bool = False
    ends: Mapping[int, int] = field(default_factory=dict)

    @property
    def again(self) -> bool:
        """Whether the version that is deployed is brought again, as it does not answer, or not as is said."""
        return self.action == "update" and self.before == self.after


@dataclass(frozen=True)
class Plan:
    """What would happen, in the order of targets and names; nothing has moved.

    Attributes:
        steps: One for each stable name and server.
    """

    steps: tuple[Step, ...]

    @property
    def changes(self) -> tuple[Step, ...]:
        """The steps that change something."""
        return tuple(one for one in self.steps if one.action in CHANGES)

    @property
    def silent(self) -> tuple[Step, ...]:
        """The steps of names that have a version deployed where none answers."""
        return tuple(one for one in self.steps if one.silent)

    @property
    def refused(self) -> tuple[Step, ...]:
        """The steps that a gate, or a server that does not answer, stands in the way of."""
        return tuple(one for one in self.steps if one.action in ("refuse", "unknown"))


def step(wanted: Desired, observed: Observed, coming: Candidate | None, before: Before) -> Step:
    """Return what would happen to a stable name on a server.

    Args:
        wanted: What the registry wants there.
        observed: What is there.
        coming: What would be; None where the registry wants nothing, or the server cannot be asked.
        before: What is known of the version that serves.
    """
    found = _compared(wanted, observed, coming, before)
    if not observed.silent or found.again:
        return found
    return replace(found, why=f"version {observed.version} is deployed there and does not answer; {found.why}")


def _compared(wanted: Desired, observed: Observed, coming: Candidate | None, before: Before) -> Step:
    place = _place(wanted, observed)
    if not observed.reachable:
        return replace(place, why=observed.why)
    if wanted.conflict:
        return replace(place, action="refuse", why=wanted.conflict)
    if not wanted.registered:
        return replace(place, why=f"there is no registered model '{wanted.model}' (yet)")
    if wanted.version is None or coming is None:
        meant = f"alias '{wanted.rule.alias}'" if wanted.rule.alias else f"stage '{wanted.rule.stage}'"
        stays = "what is deployed is brought back" if observed.silent else "what serves serves on"
        serves = stays if observed.version else "nothing is deployed"
        return replace(place, action="keep", why=f"no version of it has the {meant}: {serves}")
    same = observed.version == wanted.version
    is_model = coming.is_model(before.manifest, observed.says("digest"))
    same = same and (observed.says("key") == coming.key or is_model)
    if same and observed.says("key") != coming.key and _is_said_alike(wanted, observed):
        coming = coming.as_it_came(observed.described, before.metrics)
    variants = (observed.says("variant"), coming.variant)
    place = replace(place, variants=variants, digest=coming.digest)
    # the files count, and not the name that the model had when they came: it may be called otherwise now
    if same and not coming.refused and _answers(observed) and _as_said(wanted, observed) and not _beside(observed):
        return replace(place, action="none", why=_THERE)
    found = differences(before.asked, coming.asked) if before.asked and coming.asked else ()
    known = before.asked is not None
    verdicts = _up_to_the_first_failure(_verdicts(wanted, observed, coming, found, known=known))
    failed = next((one for one in verdicts if not one.passed), None)
    action: Action = "refuse" if failed else "update" if observed.version else "create"
    return replace(
        place,
        action=action,
        moves=0 if observed.says("digest") == coming.digest or wanted.version in observed.kept else coming.size,
        differences=found,
        evidence=_side_by_side(before.metrics, coming.metrics),
        verdicts=verdicts,
        strategy=str(wanted.rule.strategy) if action == "update" and _is_tried_out(wanted, observed) else "",
        why=failed.why if failed else _again(wanted, observed) or _tried_out(wanted, observed) or coming.decision,
        decision=coming.decision,
    )


def at_first(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return steps of which a version is tried out on the first server of a target only; the others follow at once."""
    found, seen = [], set[tuple[str, str]]()
    for one in steps:
        place = (one.target, one.name)
        found.append(replace(one, strategy="") if place in seen else one)
        if one.strategy and one.action in CHANGES:
            seen.add(place)
    return tuple(found)


def all_or_none(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return steps of which those of one name on one target are refused together: no target serves two versions."""
    found = tuple(steps)
    refused = {(one.target, one.name): one for one in found if one.action == "refuse"}

    def of(one: Step) -> Step:
        other = refused.get((one.target, one.name))
        if other is None or one.action not in CHANGES:
            return one
        return replace(one, action="refuse", why=f"refused at {other.server}: {other.why}")

    return tuple(map(of, found))


def settled(wanted: Desired, observed: Observed) -> Step | None:
    """Return that there is nothing to do where that is certain without a look at the model: it never changes.

    A variant that was added to it meanwhile is not asked for where variants are pinned.
    """
    if wanted.conflict or wanted.updated > _milliseconds(observed.says("deployed")):
        return None  # the number may have become another version's
    if not (_is_there(wanted, observed) and _as_said(wanted, observed) and wanted.rule.variants == "pinned"):
        return None
    if _beside(observed):
        return None  # of a deployer that was killed, or is at it: who wants to change something finds out
    variants, digest = (observed.says("variant"),) * 2, observed.says("digest")
    return replace(_place(wanted, observed), action="none", variants=variants, digest=digest, why=_THERE)


def _place(wanted: Desired, observed: Observed) -> Step:
    """Return a step of which only is known what it is about."""
    return Step(
        "unknown", wanted.target, observed.server, wanted.name, wanted.model, observed.version, wanted.version,
        since=observed.says("deployed"), by=observed.says("by"), silent=observed.silent,
        kept=wanted.version in observed.kept, ends=observed.ends,
    )  # fmt: skip


def _again(wanted: Desired, observed: Observed) -> str:
    """Return why the version that is deployed is brought again; empty where another one is."""
    if observed.version is None or observed.version != wanted.version:
        return ""
    if not _answers(observed):
        other = observed.described.get("answers")
        what = f"version {other} answers" if other not in (None, wanted.version) else "it does not answer"
        return f"version {wanted.version} is deployed there, and {what}"
    if other := _beside(observed):
        return f"version {wanted.version} answers, and version {other} is tried out there, which nobody wants any more"
    return f"version {wanted.version} answers, and not as is said now"


def _is_tried_out(wanted: Desired, observed: Observed) -> bool:
    """Tell whether a version comes by its strategy: not where it has been there already."""
    new = wanted.version != observed.version and wanted.version not in observed.kept
    return new and wanted.rule.strategy.is_tryout


def _tried_out(wanted: Desired, observed: Observed) -> str:
    """Return that a version is tried out by somebody at this moment; empty where it is not."""
    version = _beside(observed)
    return f"version {version} is being tried out there" if version and version == wanted.version else ""


def _beside(observed: Observed) -> int | None:
    """Return the version that is tried out beside the one that answers; None for none."""
    return observed.described.get("tried_out")


def _milliseconds(at: str) -> float:
    return datetime.datetime.fromisoformat(at).timestamp() * 1000 if at else 0.0


def _as_said(wanted: Desired, observed: Observed) -> bool:
    """Tell whether what the rule says about serving is what was said when it was deployed."""
    return bool(observed.described.get("config", {}) == json.loads(as_record(wanted.rule.serve)))


def _is_there(wanted: Desired, observed: Observed) -> bool:
    """Tell whether the version answers; whether it does as is said now is another question."""
    return wanted.version is not None and observed.says("model_uri") == wanted.uri and _answers(observed)


def _is_said_alike(wanted: Desired, observed: Observed) -> bool:
    """Tell whether nothing else is said now than when it was deployed, but for what no version is made of."""
    then, now = (
        {key: value for key, value in one.items() if key not in _OF_NO_VERSION}
        for one in (observed.described.get("config", {}), json.loads(as_record(wanted.rule.serve)))
    )
    return bool(then == now)


def _answers(observed: Observed) -> bool:
    """Tell whether the version that is deployed answers."""
    return observed.reachable and bool(observed.described.get("ready"))


def _verdicts(
    wanted: Desired, observed: Observed, coming: Candidate, found: Sequence[Difference], *, known: bool
) -> Iterable[Verdict]:
    yield Verdict("variant", not coming.refused, coming.refused or coming.decision)
    yield Verdict("bundle", not coming.incomplete, coming.incomplete or "its files are there")
    if observed.version == wanted.version and observed.says("key") not in ("", coming.key):
        why = (
            f"version {wanted.version} is deployed with other files or options, and a version is not changed in place: "
            f"register it once more and move the alias, or delete the deployment first"
        )
        yield Verdict("options", passed=False, why=why)
    if wanted.version in observed.kept:
        yield Verdict("signature", passed=True, why="it has passed when it came, and is kept")
        return
    yield _of_signature(wanted, found, known) if observed.version else Verdict("signature", True, "nothing serves yet")
    if (metric := wanted.rule.gates.metric) is not None and coming.asked is not None:
        yield _of_metric(metric, coming.asked.task)


def _of_signature(wanted: Desired, found: Sequence[Difference], known: bool) -> Verdict:
    rule = wanted.rule.gates.signature
    if not known and rule != "any":
        why = (
            f"signature: {rule}, and nobody knows what the version that serves takes and answers: its manifest cannot "
            f"be read from the repository. signature: any lets every version pass"
        )
        return Verdict("signature", passed=False, why=why)
    wrong = [one for one in found if rule == "same" or (rule == "compatible" and one.breaking)]
    why = f"signature: {rule}, and {'; '.join(map(str, wrong))}" if wrong else "who asks is answered"
    return Verdict("signature", not wrong, why)


def _of_metric(metric: Metric, task: str) -> Verdict:
    """Return whether a version can be asked; how it answers is seen on the server."""
    try:
        measured = measured_by(task, TASKS.get(task).quality, metric)
    except InvalidInputError as error:
        return Verdict("metric", passed=False, why=first_line(error))
    told = f"{measured} on '{Path(metric.data).name}', at most {metric.worse_by:g} worse: is asked on the server"
    return Verdict("metric", passed=True, why=told)


def _up_to_the_first_failure(verdicts: Iterable[Verdict]) -> tuple[Verdict, ...]:
    found: list[Verdict] = []
    for one in verdicts:
        found.append(one)
        if not one.passed:
            break
    return tuple(found)


def _side_by_side(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, tuple[float | None, float | None]]:
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in sorted(names)}
