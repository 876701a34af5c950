"""What tells answers apart, in columns of their own units and of none."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_tdeploy.core.budget import SPREAD
from mlflow_tdeploy.core.spread import Spread

RANDOM = np.random.default_rng(0)


def error(right, got) -> float:
    spread = Spread()
    spread.add(np.asarray(right, np.float64), np.asarray(got, np.float64))
    return spread.error()


def half(values):
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16).astype(np.float64)


def mixed(rows: int, scales, middles):
    return np.asarray(middles) + np.asarray(scales) * RANDOM.standard_normal((rows, len(scales)))


#: Answers in units of their own: revenue, cost, a probability; a box in pixels and its score; a pose; forty targets.
MIXED = {
    "business": mixed(64, [3e3, 4e3, 0.15], [9e3, 6e3, 0.5]),
    "box": mixed(300, [300, 300, 200, 200, 0.15], [640, 640, 300, 300, 0.6]),
    "pose": mixed(300, [150.0] * 4 + [0.1] + [150.0] * 51, [320.0] * 4 + [0.6] + [320.0] * 51),
    "targets": mixed(64, [500.0] * 39 + [1.0], [0.0] * 40),
    "keypoints": mixed(256, [6.0, 6.0, 0.25] * 17, [32.0, 24.0, 0.7] * 17),
}
SMALL = {"business": 2, "box": 4, "pose": 4, "targets": 39, "keypoints": 2}


@pytest.mark.parametrize("name", MIXED)
def test_a_small_column_of_its_own_unit_must_tell_answers_apart(name):
    right, column = MIXED[name], SMALL[name]
    assert SPREAD.allows(error(right, half(right)))
    for value in (0.0, right[:, column].mean(), RANDOM.permutation(right[:, column])):
        wrong = right.copy()
        wrong[:, column] = value
        assert not SPREAD.allows(error(right, wrong)), value


@pytest.mark.parametrize("quiet", [0.06, 0.14, 0.5])
def test_a_quiet_one_of_many_columns_may_be_noisy_and_must_not_die(quiet):
    scales = np.ones(64)
    scales[5] = quiet
    right = RANDOM.standard_normal((200, 64)) * scales
    assert SPREAD.allows(error(right, right + 0.3 * RANDOM.standard_normal(right.shape)))
    for value in (0.0, right[:, 5].mean(), 0.3):
        wrong = right.copy()
        wrong[:, 5] = value
        assert error(right, wrong) >= 1.0
        parts = Spread()  # the same in batches
        for start in range(0, 200, 7):
            parts.add(right[start : start + 7], wrong[start : start + 7])
        assert parts.error() == pytest.approx(error(right, wrong))


def test_few_columns_are_judged_one_by_one():
    right = RANDOM.standard_normal((200, 10))
    wrong = right.copy()
    wrong[:, 0] += 0.6 * RANDOM.standard_normal(200)
    spread = Spread()
    spread.add(right, wrong)
    assert spread.worst_of_few() > 0.5 > 0.25 > spread.mean()
    many = Spread()
    many.add(np.tile(right, 4), np.tile(wrong, 4))
    assert many.worst_of_few() == 0.0


@pytest.mark.parametrize("columns", [8, 768])
@pytest.mark.parametrize("constant", [0.0, 10.01, 37.3, 1000.5])
def test_a_constant_column_may_be_rounded_and_must_stay(columns, constant):
    right = RANDOM.standard_normal((64, columns))
    right[:, 3] = constant
    noisy = half(right) + 0.01 * RANDOM.standard_normal(right.shape)
    assert SPREAD.allows(error(right, noisy))
    wrong = right.copy()
    wrong[:, 3] = 2 * constant + 1
    assert not SPREAD.allows(error(right, wrong))


def test_saturated_columns_of_many_may_be_rounded():
    """The pooled output of BERT: a tanh, of which some columns are nearly 1 for every text."""
    right = np.tanh(RANDOM.standard_normal((64, 768)) + np.where(np.arange(768) % 10 == 0, 6.0, 0.0))
    assert SPREAD.allows(error(right, half(right)))


def test_quiet_columns_of_many_of_a_kind_have_the_noise_of_all():
    right = RANDOM.standard_normal((64, 384)) * np.where(np.arange(384) % 7 == 0, 0.07, 1.0)
    assert SPREAD.allows(error(right, right + 0.1 * RANDOM.standard_normal(right.shape)))


def test_next_to_nothing_is_not_measured_by_itself():
    """Probabilities of what never happens: half precision makes zeros of them."""
    right = np.where(np.arange(6) < 2, RANDOM.random((64, 6)), 1e-9 * RANDOM.random((64, 6)))
    assert SPREAD.allows(error(right, half(right)))


def test_what_float32_can_tell_apart_must_stay_apart():
    temperature = 290 + 0.1 * RANDOM.standard_normal((64, 1))
    assert SPREAD.allows(error(temperature, temperature.astype(np.float32)))
    assert not SPREAD.allows(error(temperature, np.full_like(temperature, 290)))


@pytest.mark.parametrize(("rows", "seen"), [(7, False), (8, True)])
def test_few_rows_tell_nothing(rows, seen):
    right = RANDOM.standard_normal((rows, 4))
    assert (error(right, 0 * right) > 0.8) is seen


def test_what_is_masked_at_changing_places_is_no_answer():
    """Policies: illegal moves are masked; as zeros beside logits around 8 they would be most of the spread."""
    right = 8 + 0.3 * RANDOM.standard_normal((512, 10))
    known = RANDOM.random(right.shape) < 0.5
    for wrong in (np.full_like(right, 8.0), RANDOM.permutation(right)):
        spread = Spread()
        for start in range(0, 512, 64):
            rows = slice(start, start + 64)
            spread.add(np.where(known, right, 0.0)[rows], np.where(known, wrong, 0.0)[rows], known[rows])
        assert spread.error() > 0.9


def rare(rows: int, width: int, share: float):
    """Return answers of which few columns are anything at all for a row (terms, codes)."""
    return np.where(RANDOM.random((rows, width)) < share, RANDOM.gamma(2.0, 0.2, (rows, width)), 0.0)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.45])
def test_columns_that_are_mostly_zero_are_of_a_kind(share):
    """One that answers for a row or two, or for none, is rounded as all are; lost, or another row's, it is seen."""
    right = rare(400, 600, share)
    noisy = np.where(right > 0, right + 1e-3 * RANDOM.standard_normal(right.shape), 0.0)
    noisy[0, right.max(axis=0).argmin()] += 1e-3
    assert error(right, noisy) < 0.05
    assert error(right, np.zeros_like(right)) > SPREAD.bound
    assert error(right, np.roll(right, 1, axis=0)) > SPREAD.bound


@pytest.mark.parametrize("silent", [40, 60])
def test_columns_that_never_answer_do_not_set_what_is_usual(silent):
    right = np.abs(RANDOM.standard_normal((400, 100)))
    right[:, :silent] = 0
    got = right.copy()
    got[0, 0] = 1e-4
    assert error(right, got) < 0.001


def test_the_mean_is_that_of_all_columns_and_a_column_alone_is_its_own():
    right = RANDOM.standard_normal((400, 2))
    spread = Spread()
    spread.add(right, right * [1.0, 0.5])
    assert spread.error() == pytest.approx(0.5, rel=0.1)
    assert spread.mean() == pytest.approx(0.5 / np.sqrt(2), rel=0.1)
