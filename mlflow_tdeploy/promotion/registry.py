"""What should be served, as the registry says: which version an alias or a stage stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from mlflow_tdeploy.promotion.spec import Rule, Spec

_PAGE = 1000  # the most that MLflow gives at once: a look at 500 models is one request


@dataclass(frozen=True)
class Desired:
    """What should answer to a stable name.

    Attributes:
        model: Name of the registered model.
        version: Its version; None where nothing has the alias or is in the stage.
        name: The stable name on the servers.
        target: The target, by name.
        rule: What says so.
        registered: Whether there is such a registered model.
        updated: When the registered model was changed, in milliseconds since 1970.
        source: What the version is from, where the registry has said so along with the model.
        conflict: Why it cannot have that name; empty where it can.
    """

    model: str
    version: int | None
    name: str
    target: str
    rule: Rule
    registered: bool = True
    updated: float = 0.0
    source: str = ""
    conflict: str = ""

    @property
    def uri(self) -> str:
        """The model version's URI."""
        return f"models:/{self.model}/{self.version}"

    def at(self, version: int) -> Desired:
        """Return the same of another version."""
        return replace(self, version=version, source="")


def desired(spec: Spec, client: MlflowClient | None = None) -> tuple[Desired, ...]:
    """Return what should be served where, in the order of targets and names; reads the registry, changes nothing.

    Args:
        spec: The rules.
        client: Whose registry; the current one by default.

    Raises:
        MlflowException: The registry does not answer.
    """
    found: dict[tuple[str, str], Desired] = {}
    for one in _of_rules(spec.models, client or MlflowClient()):
        before = found.get((one.target, one.name))
        if before is None or (before.model != one.model and before.version is None):
            found[one.target, one.name] = one
        elif before.model != one.model and one.version is not None:
            why = (
                f"'{before.model}' and '{one.model}' would both be '{one.name}' on target '{one.target}'. Give one of "
                f"them another name: deploy_as."
            )
            found[one.target, one.name] = replace(before, conflict=why)  # else an earlier rule has said it
    return tuple(_apart(spec, [found[key] for key in sorted(found)]))


def named(spec: Spec, models: Iterable[str]) -> tuple[Desired, ...]:
    """Return what the rules are about where the registry cannot be asked: it wants nothing, as far as is known.

    Args:
        spec: The rules.
        models: Registered models that are known from before; of patterns only these are meant.
    """
    known = sorted(set(models))
    found = dict[tuple[str, str], Desired]()
    for rule in spec.models:
        for model in filter(rule.matches, known) if rule.is_pattern else (rule.name,):
            for target in rule.to:
                name = rule.served_as(model)
                found.setdefault((target, name), Desired(model, None, name, target, rule))
    return tuple(found[key] for key in sorted(found))


def _apart(spec: Spec, found: Iterable[Desired]) -> Iterator[Desired]:
    """Return what should be served, refused where two targets have a server in common and want different things there.

    Each would undo what the other has done, for ever.
    """
    found = tuple(found)
    named: dict[str, list[Desired]] = {}
    for one in found:
        if one.version is not None:
            named.setdefault(one.name, []).append(one)
    for one in found:
        others = named.get(one.name, ()) if one.version is not None and not one.conflict else ()
        why = next((why for other in others if (why := _clash(spec, one, other))), "")
        yield replace(one, conflict=why) if why else one


def _clash(spec: Spec, one: Desired, other: Desired) -> str:
    """Return why two targets cannot both have what they want; empty where they can."""
    servers, others = ({server.url for server in spec.targets[which.target].servers} for which in (one, other))
    common = min(servers & others, default="") if one.target != other.target else ""
    if not common or (other.uri, other.rule.serve) == (one.uri, one.rule.serve):
        return ""
    return (
        f"Targets '{one.target}' and '{other.target}' have {common} in common, and want {one.uri} and {other.uri} "
        f"to be '{one.name}' there, or otherwise served. Give one of them another name: deploy_as."
    )


def _of_rules(rules: Iterable[Rule], client: MlflowClient) -> Iterator[Desired]:
    models: dict[str, Any] | None = None
    for rule in rules:
        if models is None and rule.is_pattern:
            models = {model.name: model for model in _all(client)}
        if rule.is_pattern:
            meant = [model for name, model in sorted((models or {}).items()) if rule.matches(name)]
        else:
            meant = [(models or {}).get(rule.name) or _model(client, rule.name)]
        for model in meant:
            for target in rule.to:
                if model is None:
                    yield Desired(rule.name, None, rule.served_as(rule.name), target, rule, registered=False)
                else:
                    version, updated = _version(model, rule), float(model.last_updated_timestamp or 0)
                    name, source = rule.served_as(model.name), _source(model, version)
                    yield Desired(model.name, version, name, target, rule, updated=updated, source=source)


def _model(client: MlflowClient, name: str) -> Any:
    """Return a registered model; None where there is none (yet), which is nobody else's trouble."""
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise


def versions_of(client: MlflowClient, model: str) -> Iterator[Any]:
    """Return the versions of a registered model, the newest first.

    Raises:
        MlflowException: The registry does not answer.
    """
    sign = '"' if "'" in model else "'"  # MLflow's filters know no escaping
    token = None
    while True:
        page = client.search_model_versions(f"name = {sign}{model}{sign}", _PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _all(client: MlflowClient) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_registered_models(max_results=_PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def alias_of(model: Any, alias: str) -> int | None:
    """Return the version of a registered model that an alias stands for; None for none."""
    version = dict(model.aliases).get(alias)
    return int(version) if version is not None else None


def _version(model: Any, rule: Rule) -> int | None:
    """Return the version that a rule means; None for none."""
    if rule.alias:
        return alias_of(model, rule.alias)
    staged = [int(one.version) for one in model.latest_versions if one.current_stage == rule.stage]
    return max(staged, default=None)


def _source(model: Any, version: int | None) -> str:
    """Return what a version is from, as far as the registry says it with the model: of the newest in each stage."""
    return next((str(one.source or "") for one in model.latest_versions or () if int(one.version) == version), "")
