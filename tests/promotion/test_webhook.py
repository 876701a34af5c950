"""MLflow's webhooks are told from forged, old, repeated and senseless requests."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.webhooks.delivery import _generate_hmac_signature

from mlflow_tdeploy.cli._logs import JsonLines
from mlflow_tdeploy.promotion.webhook import MOST_BYTES, WINDOW_S, Receiver

NOW = 1_800_000_000.0
BODY = json.dumps({"entity": "model_version_alias", "action": "created", "data": {"name": "m"}})


def signed(body=BODY, *, secret="s3cret", delivery="d-1", at=NOW):
    """A delivery as MLflow signs it."""
    signature = _generate_hmac_signature(secret, delivery, str(int(at)), body)
    return {"x-mlflow-delivery-id": delivery, "x-mlflow-timestamp": str(int(at)), "x-mlflow-signature": signature}


def receiver(secret="s3cret", clock=lambda: NOW):
    return Receiver(secret, clock)


def test_what_mlflow_sends_is_accepted_once():
    one = receiver()
    first = one.receive(signed(), BODY.encode())
    assert (first.accepted, first.status, first.event) == (True, 202, "model_version_alias.created")
    again = one.receive(signed(), BODY.encode())
    assert (again.accepted, again.status, again.result) == (False, 200, "repeated")  # 200: it is not to be sent again
    assert one.receive(signed(delivery="d-2"), BODY.encode()).accepted


@pytest.mark.parametrize(
    ("headers", "body", "status", "why"),
    [
        (signed(secret="other"), BODY, 401, "the signature"),
        (signed(), BODY.replace("created", "deleted"), 401, "the signature"),
        ({**signed(), "x-mlflow-delivery-id": "d-9"}, BODY, 401, "the signature"),
        ({**signed(), "x-mlflow-timestamp": str(int(NOW) + 1)}, BODY, 401, "the signature"),
        ({**signed(), "x-mlflow-signature": ""}, BODY, 400, "a header is missing"),
        ({}, BODY, 400, "a header is missing"),
        (signed(at=NOW - WINDOW_S - 1), BODY, 400, "its time is +301 s off"),
        (signed(at=NOW + WINDOW_S + 1), BODY, 400, "is one of the two clocks wrong"),
        (signed("[]"), "[]", 400, "no event of MLflow"),
        (signed("{"), "{", 400, "no event of MLflow"),
        (signed("[" * 60_000), "[" * 60_000, 400, "no event of MLflow"),
        (signed("x" * (MOST_BYTES + 1)), "x" * (MOST_BYTES + 1), 413, "more than"),
        ({**signed(), "x-mlflow-signature": "ü"}, BODY, 401, "the signature"),
    ],
)
def test_what_is_not_from_mlflow_or_not_of_now_is_refused(headers, body, status, why):
    found = receiver().receive(headers, body.encode())
    assert (found.accepted, found.status) == (False, status)
    assert why in found.why


def test_without_a_secret_nobody_is_believed():
    assert receiver("").receive(signed(secret=""), BODY.encode()).status == 403


def test_what_was_refused_may_come_again_in_earnest():
    one = receiver()
    assert not one.receive(signed(secret="other"), BODY.encode()).accepted
    assert one.receive(signed(), BODY.encode()).accepted


def test_deliveries_are_forgotten_once_their_time_is_out_of_the_window():
    at = [NOW]
    one = receiver(clock=lambda: at[0])
    for number in range(100):
        assert one.receive(signed(delivery=f"d-{number}"), BODY.encode()).accepted
    at[0] += 2 * WINDOW_S + 1
    assert one.receive(signed(delivery="d-0", at=NOW), BODY.encode()).result == "too old"
    assert one.receive(signed(delivery="new", at=at[0]), BODY.encode()).accepted
    assert len(one._seen) == 1


@given(st.integers(0, len(BODY) - 1), st.integers(1, 255))
def test_a_body_with_another_byte_is_forged(place, change):
    body = bytearray(BODY.encode())
    body[place] ^= change
    assert receiver().receive(signed(), bytes(body)).result == "forged"


@given(st.binary(max_size=200), st.dictionaries(st.sampled_from(sorted(signed())), st.text(max_size=40)))
def test_whatever_comes_is_answered(body, headers):
    assert not receiver().receive(headers, body).accepted


def test_the_log_for_programs_says_what_was_said():
    record = logging.LogRecord("mlflow_tdeploy", logging.INFO, "", 0, "%s came", ("it",), None)
    record.event, record.target, record.name_ = "deployed", "production", "intent"
    line = json.loads(JsonLines().format(record))
    assert {key: line[key] for key in ("message", "level", "event", "target", "name")} == {
        "message": "it came", "level": "info", "event": "deployed", "target": "production", "name": "intent",
    }  # fmt: skip
