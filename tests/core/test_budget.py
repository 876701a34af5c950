import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.budget import Budget, Limit, higher_is_better
from mlflow_tdeploy.core.errors import InvalidInputError

COSINE = Limit("worst_cosine", ">=", 0.99)
DIFFERENCE = Limit("max_score_difference", "<=", 0.02)


@pytest.mark.parametrize(
    "value",
    [
        "worst_cosine >= 0.99, max_score_difference <= 0.02",
        " worst_cosine>=0.99 ,max_score_difference ≤ 2e-2",
        ["worst_cosine >= 0.99", "max_score_difference <= 0.02"],
        [COSINE, DIFFERENCE],
        {"worst_cosine": 0.99, "max_score_difference": 0.02},
        Budget((COSINE, DIFFERENCE)),
    ],
)
def test_of_reads_what_a_user_writes(value):
    assert Budget.of(value) == Budget((COSINE, DIFFERENCE))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "Cannot read the limit ''"),
        ({}, "The budget is empty"),
        ([], "The budget is empty"),
        ("worst_cosine", "Cannot read the limit"),
        ("worst_cosine > 0.99", "Cannot read the limit"),
        ("worst_cosine >= 0.9.9", "bound of 'worst_cosine' must be a number"),
        ("worst_cosine >= 1e999", "must be a finite number"),
        ("worst_cosine <= 0.99", "wrong direction: use '>='"),
        ("worst_cosine >= 1.5", "worst_cosine is 1 at most"),
        ({"accuracy": 65}, "accuracy is 1 at most"),
        ("max_difference >= 0.1", "wrong direction: use '<='"),
        ("beauty >= 1", "Unknown metric 'beauty' in a budget. Known: accuracy"),
        ({"worst_cosine": "0.99"}, "must be a number, got '0.99'"),
        ({"worst_cosine": True}, "must be a number"),
        ({"worst_cosine": math.nan}, "must be a finite number"),
        ({"worst_cosine": 10**400}, "must be a number"),
        ({3: 0.5}, "Unknown metric '3'"),
        (0.99, "A budget is text like"),
        (None, "A budget is text like"),
        ([None], "Cannot read the limit None"),
        (b"worst_cosine >= 0.9", "Cannot read the limit"),
    ],
)
def test_of_says_how_to_write_it_when_it_cannot_be_read(value, message):
    with pytest.raises(InvalidInputError, match=message):
        Budget.of(value)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_violations_is_empty_exactly_when_every_limit_holds(cosine, difference):
    found = Budget((COSINE, DIFFERENCE)).violations({"worst_cosine": cosine, "max_score_difference": difference})
    assert len(found) == (cosine < 0.99) + (difference > 0.02)


def test_violations_allow_the_bound_itself():
    assert Budget((COSINE, DIFFERENCE)).violations({"worst_cosine": 0.99, "max_score_difference": 0.02}) == ()


def test_violations_say_measured_value_and_budget():
    assert Budget((COSINE,)).violations({"worst_cosine": 0.98}) == (
        "worst_cosine is 0.98 (budget worst_cosine >= 0.99)",
    )


def test_violations_count_what_was_not_measured():
    assert Budget((COSINE,)).violations({}) == ("worst_cosine was not measured (budget worst_cosine >= 0.99)",)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_violations_count_a_value_that_is_no_number(value):
    assert len(Budget((COSINE,)).violations({"worst_cosine": value})) == 1


def test_violations_count_values_that_are_not_finite_even_without_limits():
    assert Budget(()).violations({"non_finite": 3.0}) == ("3 values are NaN or infinite",)
    assert Budget(()).violations({"non_finite": 0.0}) == ()


def test_budget_reads_back_when_it_was_printed():
    budget = Budget((COSINE, DIFFERENCE))
    assert Budget.of(str(budget)) == budget
    assert str(Budget(())) == "no limit"


def test_tightened_takes_stricter_and_new_limits_and_keeps_the_rest():
    own = Budget.of("worst_cosine >= 0.99, max_difference <= 0.1")
    assert own.tightened(Budget.of("worst_cosine >= 0.995, f1_drop <= 0.01")) == Budget.of(
        "max_difference <= 0.1, worst_cosine >= 0.995, f1_drop <= 0.01"
    )
    assert own.tightened(own).violations({"worst_cosine": 0.99, "max_difference": 0.1}) == ()


@pytest.mark.parametrize("wider", ["worst_cosine >= 0.98", "max_difference <= 0.2", "f1 >= 0.1, max_difference <= 1"])
def test_tightened_refuses_a_wider_limit(wider):
    with pytest.raises(InvalidInputError, match="fixed when it is logged"):
        Budget.of("worst_cosine >= 0.99, max_difference <= 0.1").tightened(Budget.of(wider))


def test_higher_is_better_tells_the_direction():
    assert higher_is_better("accuracy")
    assert not higher_is_better("accuracy_drop")


def test_a_limit_on_what_only_a_newer_version_measures_can_be_read_and_judged():
    """Such a model must not be damaged for this version; who states a limit here has to know the metric."""
    limit = Limit("bleu", ">=", 0.5)
    assert Budget((limit,)).violations({"bleu": 0.4}) == ("bleu is 0.4 (budget bleu >= 0.5)",)
    with pytest.raises(InvalidInputError, match="Unknown metric 'bleu'"):
        Budget.of([limit])


@pytest.mark.parametrize(
    ("value", "bound", "said"),
    [(0.98, 0.99, "is 0.98 ("), (0.99999, 0.999999, "is 0.99999 ("), (1.0, 1.0000001, "is 1 (")],
)
def test_violation_shows_value_and_limit_in_digits_that_tell_them_apart(value, bound, said):
    (text,) = Budget((Limit("worst_cosine", ">=", bound),)).violations({"worst_cosine": value})
    assert said in text
    assert f"(budget worst_cosine >= {bound})" in text


def test_violations_refuse_whole_numbers_that_differ_unless_that_is_allowed():
    metrics = {"worst_cosine": 1.0, "exact_share": 0.985}
    assert Budget.of("worst_cosine >= 0.9").violations(metrics) == (
        "1.5 % of the whole numbers differ (allow that with budget='worst_cosine >= 0.9, exact_share >= …')",
    )
    assert Budget.of("worst_cosine >= 0.9").violations({**metrics, "exact_share": 0.99}) == ()  # a tie or two
    assert Budget.of("worst_cosine >= 0.9").violations(metrics, single=True) == ()
    assert Budget.of("worst_cosine >= 0.9").violations({**metrics, "exact_share": 0.4}, single=True)
    assert Budget.of("worst_cosine >= 0.9, exact_share >= 0.98").violations(metrics) == ()
    assert Budget.of("exact_share >= 0.99").violations(metrics) == (
        "exact_share is 0.985 (budget exact_share >= 0.99)",
    )


def test_a_budget_of_shares_alone_leaves_a_single_request_to_the_usual_one():
    usual = Budget.of("worst_cosine >= 0.99")
    assert Budget.of("accuracy_drop <= 0.01, label_agreement >= 0.98").of_one(usual) is usual
    mixed = Budget.of("accuracy_drop <= 0.01, max_score_difference <= 0.3")
    assert mixed.of_one(usual) is mixed


def test_violations_of_a_single_request_leave_out_what_is_said_of_many():
    budget = Budget.of("worst_cosine >= 0.9, exact_share >= 0.9, accuracy >= 0.8")
    assert budget.violations({"worst_cosine": 0.95, "exact_share": 0.75}, single=True) == ()
    assert len(budget.violations({"worst_cosine": 0.8, "exact_share": 0.75}, single=True)) == 1
    assert Budget.of("worst_cosine >= 0.9").violations({"worst_cosine": 1.0, "exact_share": 0.45}, single=True) != ()
