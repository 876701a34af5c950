"""The webhook of a watcher in MLflow: made or renewed, and tried, as MLflow drops what it cannot send in silence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, PromotionError, first_line
from mlflow_tdeploy.promotion.webhook import EVENTS
from mlflow_tdeploy.registry_io.location import without_password

_NAME = "mlflow-tdeploy"
#: Seconds for which MLflow's server remembers which webhooks there are (MLFLOW_WEBHOOK_CACHE_TTL, 60 by default).
UNKNOWN_S = 90.0
_HTTPS = "MLflow sends to https only, unless its server has MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https."
_PUBLIC = "MLflow sends to public addresses only, unless its server has MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true."
_KEY = (
    "MLflow cannot read the secret any more: its server needs a MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY that stays the "
    "same; without one each of its processes has its own."
)
#: What MLflow says where it does not send, and what to do about it.
_HINTS = (
    ("scheme", _HTTPS), ("public ip", _PUBLIC), ("not a public", _PUBLIC), ("non-public", _PUBLIC),
    ("invalidtoken", _KEY), ("invalid token", _KEY), ("500 error", _KEY),
)  # fmt: skip
#: Said whenever a webhook is installed: nobody can tell from here.
KEY_HINT = (
    "MLflow's server needs MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY (python -c \"from cryptography.fernet import Fernet; "
    'print(Fernet.generate_key().decode())"): without it no webhook is sent after a restart, or by other workers.'
)


@dataclass(frozen=True)
class Tried:
    """What a webhook did when MLflow was asked to send it.

    Attributes:
        id: The webhook's, in MLflow.
        url: Where it is sent to.
        works: Whether it arrived and was accepted.
        why: Why not, and what to do about it.
        is_new: Whether it was made now: MLflow may not know it for :data:`UNKNOWN_S`.
    """

    id: str
    url: str
    works: bool
    why: str = ""
    is_new: bool = False


def install(client: MlflowClient, url: str, secret: str) -> Tried:
    """Have MLflow send events about aliases to an address, and try whether it does; twice is fine.

    Args:
        client: Whose registry.
        url: The address, which has to answer already.
        secret: What MLflow is to sign with.

    Raises:
        InvalidInputError: There is no address or no secret.
        PromotionError: MLflow refuses, as stores without a database do; the message says what to do.
    """
    if not url or not secret:
        raise InvalidInputError(
            "A webhook needs an address that MLflow reaches and a secret: watch: {url: https://…/webhook, "
            "secret: ${TDEPLOY_WEBHOOK_SECRET}} in tdeploy.yaml."
        )
    try:
        known = next((one for one in _all(client) if one.url == url), None)
        events: list[Any] = list(EVENTS)
        if known is None:
            text = "Has tdeploy watch look at once when an alias is set or deleted."
            made = client.create_webhook(_NAME, url, events, text, secret, "ACTIVE")
        else:
            made = client.update_webhook(known.webhook_id, events=events, secret=secret, status="ACTIVE")
    except (MlflowException, NotImplementedError) as error:
        raise PromotionError(f"MLflow installs no webhook for {url}: {_told(first_line(error))}") from error
    return replace(try_out(client, made), is_new=known is None)


def require_server(registry: str) -> None:
    """Make sure that a registry is a server: only that sends webhooks, whoever writes the database does not.

    Args:
        registry: Its address.

    Raises:
        InvalidInputError: It is none.
    """
    if not registry.startswith(("http://", "https://", "databricks")):
        raise InvalidInputError(
            f"The registry here ('{without_password(registry)}') is no MLflow server, and only a server sends "
            f"webhooks. Set MLFLOW_TRACKING_URI (or MLFLOW_REGISTRY_URI) to its address, or do without: polling works."
        )


def find(client: MlflowClient, url: str) -> Any:
    """Return MLflow's webhook for an address.

    Raises:
        NotFoundError: There is none.
        PromotionError: MLflow has no webhooks, or cannot read them.
    """
    try:
        found = next((one for one in _all(client) if one.url == url), None)
    except (MlflowException, NotImplementedError) as error:
        raise PromotionError(f"MLflow shows no webhooks: {_told(first_line(error))}") from error
    if found is None:
        raise NotFoundError(f"MLflow has no webhook for {url}. 'tdeploy watch --install-webhook' makes one.")
    return found


def try_out(client: MlflowClient, webhook: Any) -> Tried:
    """Have MLflow send a webhook now, and say what became of it."""
    try:
        result = client.test_webhook(webhook.webhook_id, EVENTS[0])  # type: ignore[arg-type]
    except (MlflowException, NotImplementedError) as error:
        return Tried(webhook.webhook_id, webhook.url, works=False, why=_told(first_line(error)))
    why = "" if result.success else str(result.error_message or f"{result.response_status}: {result.response_body}")
    return Tried(webhook.webhook_id, webhook.url, bool(result.success), _told(why))


def _all(client: MlflowClient) -> Any:
    token = None
    while True:
        page = client.list_webhooks(100, token)
        yield from page
        if not (token := page.token):
            return


def _told(why: str) -> str:
    hint = next((hint for sign, hint in _HINTS if sign in why.lower()), "")
    return f"{why.rstrip('.')}. {hint}".strip() if hint else why
