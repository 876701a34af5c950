"""Whether all that promotion needs is there: registry, servers, repositories, webhooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlflow
from mlflow import MlflowClient

from mlflow_tdeploy.core.errors import PromotionError, first_line
from mlflow_tdeploy.promotion.actual import deployments_at
from mlflow_tdeploy.promotion.install import KEY_HINT, find, require_server, try_out
from mlflow_tdeploy.promotion.lease import places_held
from mlflow_tdeploy.promotion.registry import desired
from mlflow_tdeploy.promotion.spec import Server, Spec, Target


@dataclass(frozen=True)
class Checked:
    """Something that promotion needs.

    Attributes:
        what: What.
        works: Whether it works.
        why: Why not, or what else is to be known.
    """

    what: str
    works: bool
    why: str = ""


def checked(spec: Spec, client: MlflowClient | None = None) -> tuple[Checked, ...]:
    """Try what a ``tdeploy.yaml`` names; nothing is deployed.

    Args:
        spec: What it says.
        client: Whose registry; the current one by default.
    """
    return tuple(_all(spec, client or MlflowClient()))


def _all(spec: Spec, client: MlflowClient) -> Iterator[Checked]:
    yield _tried("registry", lambda: _models(spec, client))
    for name, target in spec.targets.items():
        for server in target.servers:
            yield _tried(f"{name} {server.url}", partial(_server, target, server))
        yield _tried(f"{name} lease", partial(_lease, spec, name))
    if spec.watch.url:
        yield _tried(f"webhook {spec.watch.url}", lambda: _webhook(spec, client))


def _tried(what: str, do: Callable[[], str]) -> Checked:
    try:
        return Checked(what, works=True, why=do())
    except Exception as error:  # whatever is wrong there is what is asked for
        return Checked(what, works=False, why=first_line(error))


def _models(spec: Spec, client: MlflowClient) -> str:
    found = desired(spec, client)
    missing = [one.model for one in found if not one.registered]
    if missing:
        raise PromotionError(f"There is no registered model '{missing[0]}' (yet).")
    return f"{len(found)} names to serve"


def _server(target: Target, server: Server) -> str:
    found = deployments_at(target, server)
    found.client.require_live()
    return f"serves {', '.join(found.names()) or 'nothing of ours yet'} from {found.files.url}"


def _lease(spec: Spec, target: str) -> str:
    with places_held(spec, {(target, "doctor")}, wait=0.0):
        return "can be taken"


def _webhook(spec: Spec, client: MlflowClient) -> str:
    require_server(mlflow.get_registry_uri())
    tried = try_out(client, find(client, spec.watch.url))
    if not tried.works:
        raise PromotionError(tried.why)
    return f"MLflow has sent one. {KEY_HINT}"
