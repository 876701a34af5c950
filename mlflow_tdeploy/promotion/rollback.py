"""Back to the version that answered before, on the servers and in the registry."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlflow import MlflowClient

from mlflow_tdeploy.core.errors import ConflictError, NotFoundError, UnreachableError, first_line
from mlflow_tdeploy.deploy.route import Route
from mlflow_tdeploy.promotion.actual import Observed, asked_at, observe, published_at
from mlflow_tdeploy.promotion.apply import retire, together
from mlflow_tdeploy.promotion.candidate import is_model
from mlflow_tdeploy.promotion.history import History
from mlflow_tdeploy.promotion.label import Label
from mlflow_tdeploy.promotion.lease import places_held
from mlflow_tdeploy.promotion.outcome import Outcome, events_of, require_done
from mlflow_tdeploy.promotion.place import server_of
from mlflow_tdeploy.promotion.plan import Step
from mlflow_tdeploy.promotion.records import opened
from mlflow_tdeploy.promotion.registry import Desired, desired
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.store.bundle import Bundle

#: Seconds for records to come.
_SOON_S = 5.0
_log = logging.getLogger("mlflow_tdeploy")


def rollback(
    name: str,
    spec: Spec,
    *,
    version: int | None = None,
    alias: str = "",
    stage: str = "",
    client: MlflowClient | None = None,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[Outcome, ...]:
    """Go back to the version that answered before, alias or stage included; or leave everything as it was.

    It is loaded already unless ``keep_loaded`` is off, and passes no gates: it did when it came. A server that is away
    is left; it gets the version when it is corrected. Where something was interrupted (a call of this function, or a
    version that the registry wants and that has not come) that is what is gone back from, and no further.

    Args:
        name: A registered model, or the stable name that it is served by.
        spec: What is served where.
        version: Which version; the one before by default.
        alias: By which alias it is served, where there are several.
        stage: Or by which stage.
        client: Whose registry; the current one by default.
        told: Called with each outcome.

    Returns:
        An outcome for each server.

    Raises:
        NotFoundError: Nothing is served by that name, or there is no version before, here or in the registry.
        ConflictError: The servers do not agree on which version was before, or the name has several aliases.
        UnreachableError: No server answers.
        PromotionError: A server failed: everything is as it was.
    """
    client = client or MlflowClient()
    label = Label.of(alias, stage) if alias or stage else None
    with places_held(spec, {(one.target, one.name) for one in _named(spec, client, name, label)}):
        places = _named(spec, client, name, label)
        seen = _seen(spec, places)
        back = version if version is not None else _before(name, seen)
        steps = [one.step(back) for one in seen if one.observed.reachable and one.observed.version is not None]
        left = tuple(Outcome(one.step(back), "left", why=one.observed.why or "nothing is deployed") for one in seen
                     if not one.observed.reachable or one.observed.version is None)  # fmt: skip
        model = places[0].model
        _require_same(spec, steps)
        done: list[Outcome] = []
        try:
            with Label.of_rule(places[0].rule).moved(client, model, back):
                done += together(steps, spec, _go_back)
                require_done(done, f"'{model}' did not go back to version {back}")
        finally:  # nobody who cannot be told may undo it
            History(client).add(events_of(done, "rollback", "rolled back"))
            for outcome in (*done, *left):
                told(outcome)
    retire(done, spec)
    return (*done, *left)


@dataclass(frozen=True)
class _Place:
    wanted: Desired
    observed: Observed

    @property
    def interrupted(self) -> int | None:
        """The version that answers once what was interrupted is gone back from, or completed; None for nothing."""
        found, wanted = self.observed, self.wanted.version
        if found.version is None:
            return None
        previous, ahead = (tuple(found.described.get(key, ())) for key in ("previous", "ahead"))
        route = Route(found.version, previous, ahead=ahead)
        if (there := route.interrupted(found.described.get("answers"))) is not None:
            return there
        if wanted in (None, found.version):
            return None
        # going back was, before it came here; or a version that has not come
        return wanted if wanted in previous else found.version

    def step(self, version: int) -> Step:
        """Return going back here."""
        found, wanted = self.observed, self.wanted
        why = f"back from version {found.version}"
        if version == found.version:
            why = f"version {wanted.version} had not come" if wanted.version not in (None, version) else ""
        return Step(
            "update", wanted.target, found.server, wanted.name, wanted.model, found.version, version,
            why=why,
        )  # fmt: skip


def _require_same(spec: Spec, steps: Iterable[Step]) -> None:
    """Make sure that what is gone back to is what the registry calls so, as far as that can be known.

    Raises:
        ConflictError: The model was deleted there and registered anew, say: its alias would point to another model.
    """
    for step in steps:
        if (bundle := _known(uri := f"models:/{step.model}/{step.after}")) is None:
            _log.warning(
                "Whether version %s of '%s' at %s is still what the registry calls %s is not known: its records do not "
                "come within %.0f s. It is gone back to all the same.",
                step.after, step.name, step.server, uri, _SOON_S,
            )  # fmt: skip
            return
        target = spec.targets[step.target]
        server = next(one for one in target.servers if one.url == step.server)
        place = (target, server, step.name, step.after or 0)
        (_, manifest), came = asked_at(*place), published_at(*place)
        if manifest and not is_model(bundle, manifest, came.get("digest", "")):
            raise ConflictError(
                f"Version {step.after} of '{step.name}' at {step.server} is another model than version {step.after} of "
                f"'{step.model}' in the registry. Bring that one under another number: register it once more."
            )


def _known(uri: str) -> Bundle | None:
    """Return a version's records, where they can be had soon: going back needs none, and may be why they are away."""
    found: list[Bundle] = []

    def look() -> None:
        try:
            found.append(opened(uri).bundle)
        except Exception as error:  # whatever the registry or the store says
            _log.info("%s", first_line(error))

    looking = threading.Thread(target=look, name="tdeploy-records", daemon=True)
    looking.start()
    looking.join(_SOON_S)
    return found[0] if found else None


def _go_back(step: Step, spec: Spec, _: Callable[[], None]) -> str:
    try:
        done = server_of(step, spec).rollback(step.name, step.after, retire=False)
    except NotFoundError as error:
        raise NotFoundError(f"{error} tdeploy promote models:/{step.model}/{step.after} brings it.") from error
    if done.changed:
        return ""
    more = f": {step.why}; once more goes further back" if step.why and step.before == step.after else ""
    return f"version {step.after} answers already{more}"


def _named(spec: Spec, client: MlflowClient, name: str, label: Label | None) -> list[Desired]:
    """Return where a model is served, by the one label that it is served by."""
    known = desired(spec, client)
    found = [one for one in known if one.model == name] or [one for one in known if one.name == name]
    if not found:
        served = ", ".join(sorted({one.name for one in known})) or "nothing"
        raise NotFoundError(f"No rule serves '{name}'. Served are: {served}.")
    found = [one for one in found if label in (None, Label.of_rule(one.rule))]
    ways = sorted({f"'{one.model}' by {Label.of_rule(one.rule)}" for one in found})
    if not ways:
        raise NotFoundError(f"'{name}' is not served by {label}.")
    if len(ways) > 1:
        raise ConflictError(f"'{name}' may be {' or '.join(ways)}. Say which: alias or stage, or the model's name.")
    return found


def _seen(spec: Spec, places: Iterable[Desired]) -> list[_Place]:
    return [
        _Place(one, observe(spec.targets[one.target], server, one.name))
        for one in places
        for server in spec.targets[one.target].servers
    ]


def _before(name: str, seen: Iterable[_Place]) -> int:
    """Return the version that answered before, as all servers that can be asked say."""
    there = [one for one in seen if one.observed.reachable]
    if not there:
        raise UnreachableError(f"No server of '{name}' answers: nothing was changed.")
    deployed = [one for one in there if one.observed.version is not None]
    if not deployed:
        raise NotFoundError(f"Nothing is deployed as '{name}'.")
    interrupted = {one.observed.server: version for one in deployed if (version := one.interrupted) is not None}
    before = {one.observed.server: next(iter(one.observed.described.get("previous", ())), None) for one in deployed}
    versions = interrupted or before
    found = set(versions.values())
    if len(found) > 1:
        told = ", ".join(f"{server}: {version or 'none'}" for server, version in versions.items())
        raise ConflictError(
            f"The servers do not agree on the version of '{name}' before ({told}). Say which: version; "
            f"or bring one by tdeploy promote."
        )
    back = found.pop()
    if back is None:
        ahead = sorted({version for one in deployed for version in one.observed.kept})
        why = (
            f"it was gone back from {', '.join(map(str, ahead))}: version says to which of them to go"
            if ahead
            else ("none was before, or none is kept (serve: {keep: 1} keeps one)")
        )
        raise NotFoundError(f"'{name}' has no version before the one that answers: {why}.")
    return int(back)
