"""MLflow's webhooks, told apart from anybody else's requests. They say when to look; what is so, the registry says.

See https://mlflow.org/docs/latest/ml/webhooks/: a delivery is signed over its id, its time and its body.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

#: Events after which something else may have to serve; stages, and versions that are deleted, have none.
EVENTS = ("model_version_alias.created", "model_version_alias.deleted")
#: The longest body that is read; MLflow's have some hundred bytes.
MOST_BYTES = 64 * 1024
#: Seconds that a delivery's time may be off: older ones may be replayed by whoever has seen them.
WINDOW_S = 300.0
_ID, _TIME, _SIGNATURE = "x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"
_LONGEST_ID = 200


@dataclass(frozen=True)
class Received:
    """What became of a delivery.

    Attributes:
        status: For the sender; MLflow sends again what got a 5xx.
        result: In one word, for the metrics.
        why: In one line.
        event: What it was about; empty unless it was accepted.
    """

    status: HTTPStatus
    result: str
    why: str
    event: str = ""

    @property
    def accepted(self) -> bool:
        """Whether it is a reason to look."""
        return self.result == "accepted"


class Receiver:
    """Tells deliveries of MLflow from other requests, and each from its repetitions.

    Args:
        secret: What MLflow signs with; without one nothing is accepted.
        clock: Seconds since 1970.
    """

    def __init__(self, secret: str, clock: Callable[[], float] = time.time) -> None:
        self._secret = secret.encode()
        self._clock = clock
        self._seen: dict[str, float] = {}
        self._lock = threading.Lock()

    def receive(self, headers: Mapping[str, str], body: bytes) -> Received:
        """Return what becomes of a request.

        Args:
            headers: By name, in small letters.
            body: As it was sent; the signature is of that.
        """
        if not self._secret:
            return Received(HTTPStatus.FORBIDDEN, "refused", "no secret is set here, so nobody can be believed")
        if len(body) > MOST_BYTES:
            return Received(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "refused", f"more than {MOST_BYTES} bytes")
        delivery, sent, signature = (headers.get(name, "") for name in (_ID, _TIME, _SIGNATURE))
        if not (delivery and sent and signature) or len(delivery) > _LONGEST_ID:
            return Received(HTTPStatus.BAD_REQUEST, "refused", "this is no delivery of MLflow: a header is missing")
        if not self._is_signed(delivery, sent, signature, body):
            return Received(HTTPStatus.UNAUTHORIZED, "forged", "the signature is not of this secret")
        if (why := self._too_old(sent)) is not None:
            return Received(HTTPStatus.BAD_REQUEST, "too old", why)
        if self._is_repeated(delivery):
            return Received(HTTPStatus.OK, "repeated", "this delivery has come before")
        try:
            found = json.loads(body)
            event = f"{found['entity']}.{found['action']}"
        except (ValueError, TypeError, LookupError, RecursionError):
            return Received(HTTPStatus.BAD_REQUEST, "refused", "the body is no event of MLflow")
        return Received(HTTPStatus.ACCEPTED, "accepted", "", event)

    def _is_signed(self, delivery: str, sent: str, signature: str, body: bytes) -> bool:
        content = f"{delivery}.{sent}.".encode() + body
        own = f"v1,{base64.b64encode(hmac.new(self._secret, content, hashlib.sha256).digest()).decode()}".encode()
        given = signature.encode(errors="replace").split(b" ")  # several while a secret is changed
        return any([hmac.compare_digest(own, one) for one in given])  # noqa: C419 - all of them, in constant time

    def _too_old(self, sent: str) -> str | None:
        try:
            off = self._clock() - float(int(sent))
        except (ValueError, OverflowError):
            return "its time is no number"
        if abs(off) <= WINDOW_S:
            return None
        return f"its time is {off:+.0f} s off, more than {WINDOW_S:.0f} s: is one of the two clocks wrong?"

    def _is_repeated(self, delivery: str) -> bool:
        with self._lock:
            now = self._clock()
            for known in [one for one, since in self._seen.items() if now - since > 2 * WINDOW_S]:
                del self._seen[known]  # its time is out of the window by now
            if delivery in self._seen:
                return True
            self._seen[delivery] = now
            return False
