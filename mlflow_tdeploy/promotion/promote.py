"""The registry and the servers, together or not at all: a version is promoted."""

from __future__ import annotations

from collections.abc import Callable

from mlflow import MlflowClient

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, PromotionError
from mlflow_tdeploy.promotion.apply import retire, together, wanted_still
from mlflow_tdeploy.promotion.ends import settle
from mlflow_tdeploy.promotion.history import History
from mlflow_tdeploy.promotion.label import Label
from mlflow_tdeploy.promotion.lease import places_held
from mlflow_tdeploy.promotion.look import plan_for
from mlflow_tdeploy.promotion.outcome import Outcome, events_of, refusals, require_done
from mlflow_tdeploy.promotion.plan import Plan
from mlflow_tdeploy.promotion.registry import Desired, desired
from mlflow_tdeploy.promotion.revive import revived
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.registry_io import registered_version

Told = Callable[[Outcome], None]


def promote(
    uri: str,
    spec: Spec,
    *,
    alias: str = "",
    stage: str = "",
    client: MlflowClient | None = None,
    told: Told = lambda outcome: None,
) -> tuple[Outcome, ...]:
    """Give a version an alias or a stage, and have it answer wherever that is served; or leave everything as it was.

    In order: the gates, on every server; the alias; the servers, one by one. What is deployed and does not answer is
    brought back before, and stays whatever becomes of the version. Who is killed in between has moved the
    alias, and the next ``apply`` completes what was begun.

    Args:
        uri: ``models:/<name>/<version>``, or of an alias.
        spec: What is served where.
        alias: The alias.
        stage: The stage; other versions in it are archived.
        client: Whose registry; the current one by default.
        told: Called with each outcome.

    Returns:
        An outcome for each server that had to change.

    Raises:
        InvalidInputError: The URI is of no registered version, or alias and stage are both said, or none.
        NotFoundError: No rule serves that model by that alias or stage, or the registry has no such version.
        PromotionError: A gate says no, a server does not answer, or a step failed: everything is as it was.
    """
    label, client = Label.of(alias, stage), client or MlflowClient()
    model, version = _registered(uri, client)
    places = {(one.target, one.name) for one in _meant(spec, client, model, label)}
    with places_held(spec, places):
        wanted = [one.at(version) for one in _meant(spec, client, model, label)]
        plan = plan_for(spec, wanted, sparing=False)
        settle(plan.steps, spec)
        back = revived(plan.steps, spec)
        History(client).add(events_of(back, "promote"))
        for outcome in back:
            told(outcome)
        _require_passed(plan, client)
        done: list[Outcome] = []
        try:
            with label.moved(client, model, version):
                done += together(plan.changes, spec, go_on=wanted_still(spec, client, plan.changes))
                require_done(done, f"'{model}' version {version} was not promoted")
        finally:  # nobody who cannot be told may undo it
            History(client).add(events_of(done, "promote"))
            for outcome in done:
                told(outcome)
    retire(done, spec)
    return tuple(done)


def _registered(uri: str, client: MlflowClient) -> tuple[str, int]:
    found = registered_version(uri, client)
    if found is None:
        raise InvalidInputError(f"'{uri}' is of no registered version. Write it like models:/intent/7.")
    return found


def _meant(spec: Spec, client: MlflowClient, model: str, label: Label) -> list[Desired]:
    """Return where a model is served by an alias or a stage."""
    ours = [one for one in desired(spec, client) if one.model == model]
    found = [one for one in ours if Label.of_rule(one.rule) == label]
    if not found:
        known = ", ".join(sorted({str(Label.of_rule(one.rule)) for one in ours}))
        raise NotFoundError(
            f"No rule serves '{model}' by {label}. {f'It is served by {known}.' if known else 'No rule is about it.'}"
        )
    return found


def _require_passed(plan: Plan, client: MlflowClient) -> None:
    if not plan.refused:
        return
    History(client).add(refusals(plan, "promote"))
    first = plan.refused[0]
    raise PromotionError(
        f"'{first.model}' version {first.after} may not serve as '{first.name}' on target '{first.target}' "
        f"({first.server}): {first.why.rstrip('.')}. Nothing was changed."
    )
