"""Which servers are spared a version that has ended one: the rule by itself."""

from __future__ import annotations

from mlflow_tdeploy.promotion.ends import spared
from mlflow_tdeploy.promotion.plan import Step


def step(server, before, after, ends=None, *, target="eu", name="words", kept=False, action="update", silent=False):
    return Step(
        action,
        target,
        server,
        name,
        "words",
        before,
        after,
        ends=ends or {},
        kept=kept,
        silent=silent,
        strategy="canary",
    )


def actions(*steps):
    return [one.action for one in spared(steps)]


def test_what_ended_one_server_comes_to_that_one_first_and_twice_to_none():
    assert actions(step("a", 1, 2, {2: 1}), step("b", 1, 2, target="us")) == ["update", "refuse"]
    assert actions(step("a", 1, 2, {2: 1}, action="unknown"), step("b", 1, 2)) == ["unknown", "refuse"]
    one_target = spared([step("b", 1, 2), step("a", 1, 2, {2: 1}), step("c", 1, 2)])
    assert [(one.server, one.action) for one in one_target] == [("a", "update"), ("b", "update"), ("c", "update")], (
        "all or none of it, and that one first"
    )
    assert actions(step("a", 1, 2, {2: 1}, action="unknown"), step("b", 1, 2, target="us")) == ["unknown", "refuse"]
    assert actions(step("a", 1, 2, {2: 2}), step("b", 1, 2)) == ["refuse", "refuse"]
    twice_under_one_name = step("a", 1, 2, {2: 2}), step("a", 1, 2, {2: 1}, name="other")
    assert actions(*twice_under_one_name, step("b", 1, 2)) == ["refuse"] * 3
    assert actions(*reversed(twice_under_one_name), step("b", 1, 2)) == ["refuse"] * 3


def test_what_has_been_good_on_a_server_may_come_back_there():
    away = step("a", 1, 1, {1: 2}, action="unknown")
    assert actions(away, step("b", 2, 1, kept=True)) == ["unknown", "update"], "it was had back there, not brought"
    assert actions(away, step("b", None, 1, action="create")) == ["unknown", "create"]
    assert actions(step("a", 2, 1, {1: 1}, action="unknown"), step("b", 2, 1, kept=True)) == ["unknown", "update"]
    assert actions(step("a", 2, 1, {1: 1}, action="refuse"), step("b", 2, 1, target="us")) == ["refuse", "update"]
    assert actions(step("b", 2, 1, {1: 2}, kept=True)) == ["refuse"], "not where it has ended this one"
    both = step("a", 1, 2, {2: 2}, kept=True), step("b", 1, 2, kept=True)
    assert actions(*both) == ["refuse", "refuse"], "the second time is no accident"
    (own,) = spared([step("a", 1, 1, {1: 2}, silent=True)])
    assert (own.action, own.strategy) == ("refuse", "")


def test_a_target_gets_a_version_on_all_of_its_servers_or_on_none():
    one_kept = step("b", 1, 2, kept=True), step("c", 1, 2), step("x", 1, 2, {2: 1}, target="us")
    assert actions(*one_kept) == ["refuse", "refuse", "update"]
    away = step("a", 1, 2, {2: 1}, action="unknown")
    assert actions(away, step("b", 1, 2, kept=True), step("c", 1, 2)) == ["unknown", "refuse", "refuse"]
    assert actions(away, step("b", 2, 2, silent=True), step("c", 1, 2)) == ["unknown", "update", "refuse"], "had back"


def test_what_another_target_does_not_want_is_nothing_there():
    assert actions(step("a", 1, 1, {2: 2}, action="none"), step("b", 1, 2, target="us")) == ["none", "update"]


def test_one_end_that_is_noted_under_two_names_counts_once():
    """A server that is restarted while both are tried out."""
    of_two_names = step("a", 1, 2, {2: 1}), step("a", 1, 2, {2: 1}, name="other")
    assert actions(*of_two_names, step("b", 1, 2, target="us")) == ["update", "update", "refuse"]
    shared = step("a", 1, 2, {2: 1}), step("a", 1, 2, {2: 1}, target="all")
    assert actions(*shared) == ["update", "update"]
