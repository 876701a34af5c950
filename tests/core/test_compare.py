import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlflow_tdeploy.core.budget import VECTOR_BUDGET
from mlflow_tdeploy.core.compare import Choices, Rows, same_outputs
from mlflow_tdeploy.core.tasks._classes import ScoreComparison


def measure(reference, got):
    rows = Rows()
    rows.add(np.asarray(reference, np.float32), np.asarray(got, np.float32))
    return rows.metrics()


def test_rows_metrics_hold_the_worst_row_when_rows_differ():
    metrics = measure([[1, 0], [0, 1], [1, 0]], [[1, 0], [0, 1], [0, 2]])
    assert metrics["worst_cosine"] == pytest.approx(0.0)
    assert metrics["mean_cosine"] == pytest.approx(2 / 3)
    assert metrics["max_difference"] == pytest.approx(2.0)
    assert metrics["rows"] == 3


def test_rows_metrics_accumulate_over_batches():
    rows = Rows()
    rows.add(np.eye(2), np.eye(2))
    rows.add(np.eye(2), np.eye(2)[::-1])
    assert rows.metrics()["worst_cosine"] == 0.0
    assert rows.metrics()["rows"] == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_metrics_count_values_that_became_non_finite(bad):
    metrics = measure([[1.0, 2.0]], [[1.0, bad]])
    assert metrics["non_finite"] == 1
    assert metrics["worst_cosine"] == -1.0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("value", [1e9 * -1, -np.inf, -1e4, -65504.0])
def test_rows_metrics_take_what_is_as_good_as_infinite_for_a_mask(value):
    metrics = measure([[1.0, 2.0, -np.inf]], [[1.0, 2.0, value]])
    assert (metrics["worst_cosine"], metrics["non_finite"]) == (pytest.approx(1.0), 0)


@pytest.mark.parametrize("value", [0.0, -50.0, 1e9, np.inf, np.nan])
def test_rows_metrics_refuse_a_masked_position_that_the_variant_opens(value):
    metrics = measure([[1.0, 2.0, -np.inf]], [[1.0, 2.0, value]])
    assert (metrics["worst_cosine"], metrics["non_finite"]) == (-1.0, 1)


def test_rows_metrics_ignore_positions_where_the_reference_is_infinite():
    metrics = measure([[1.0, -np.inf]], [[1.0, -np.inf]])
    assert metrics["non_finite"] == 0
    assert metrics["worst_cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize("mask", [np.finfo(np.float32).min, -1e30, -1e9, -1e4, -9998.0, -1e3, -np.inf])
def test_rows_see_what_a_mask_would_outweigh(mask):
    """Beside a value of that size a row's cosine says nothing about the others."""
    rows = Rows()
    rows.add(np.array([[0.3, -0.4, mask]], np.float32), np.array([[-0.3, 0.4, mask]], np.float32))
    assert rows.metrics()["worst_cosine"] == pytest.approx(-1.0)


def test_rows_take_a_half_precision_mask_for_that_of_the_reference():
    rows = Rows()
    lowest = np.finfo(np.float32).min
    rows.add(np.array([[0.3, -0.4, lowest]], np.float32), np.array([[0.3, -0.4, -65504]], np.float32))
    metrics = rows.metrics()
    assert metrics["worst_cosine"] == pytest.approx(1.0)
    assert (metrics["non_finite"], metrics["max_norm_difference"]) == (0, pytest.approx(0))


@pytest.mark.parametrize("mask", [-1e9, np.finfo(np.float32).min])
@pytest.mark.parametrize("clipped", [-65504.0, -1e4, -9992.0, -np.inf])
def test_rows_take_what_half_precision_makes_of_a_mask(mask, clipped):
    """The converter clips to -1e4, and a score may have been added to that."""
    metrics = measure([[0.3, -0.4, mask]], [[0.3, -0.4, clipped]])
    assert metrics["worst_cosine"] == pytest.approx(1.0)
    assert (metrics["non_finite"], metrics["max_norm_difference"]) == (0, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("outlier", [[1.0, 2.0, -1e4], [1e6, 1.0, 1.0], [1.0, -1e7, 1.0]])
def test_rows_are_compared_whatever_the_size_of_others(outlier):
    """Ragged batches have masks in some rows only; what is next to nothing beside those is not so by itself."""
    ordinary = [[0.3, -0.4, 0.5], [1.0, 2.0, -1.0], [0.2, 0.1, 0.1]]
    negated = [[-value for value in row] for row in ordinary]
    assert measure([outlier, *ordinary], [outlier, *negated])["worst_cosine"] == pytest.approx(-1.0)
    rows = Rows()
    for reference, got in ((outlier, outlier), *zip(ordinary, negated, strict=True)):
        rows.add(np.array([reference]), np.array([got]))
    assert rows.metrics()["worst_cosine"] == pytest.approx(-1.0)


@pytest.mark.parametrize("mask", [-1e5, -1e6, -1e7, -9e7])
def test_rows_see_logits_beside_masks_of_every_size(mask):
    assert measure([[0.3, -0.4, mask]], [[-0.3, 0.4, mask]])["worst_cosine"] == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("reference", "got"),
    [
        ([[-2e8, 300.0]], [[-6e3, 300.0]]),
        ([[-2e8]], [[7.0]]),
        ([[-1e9]], [[7.0]]),  # one number has no mask beside it
        ([[-3.3e9, 1.0]], [[-9e3, 1.0]]),
    ],
)
def test_rows_take_large_numbers_for_answers(reference, got):
    """Masks are powers of ten or the end of a type; an amount of money is neither."""
    metrics = measure(reference, got)
    assert metrics["rows"] == 1
    assert VECTOR_BUDGET.violations(metrics)
    assert VECTOR_BUDGET.violations(measure(reference, reference)) == ()


def test_rows_see_what_a_mask_hides_of_nothing():
    assert measure([[0.0, 0.0, -1e4]], [[50.0, -50.0, -1e4]])["worst_cosine"] == 0.0
    assert VECTOR_BUDGET.violations(measure([[0.0, 0.0, -1e4]], [[1e-4, -1e-4, -1e4]])) == ()


@pytest.mark.parametrize("width", [1, 3])
def test_rows_see_a_scale_whatever_the_size_of_one_of_them(width):
    ordinary = np.random.default_rng(0).uniform(0.5, 2, (63, width))
    reference = np.concatenate([np.full((1, width), 2e5), ordinary])
    got = np.concatenate([reference[:1], 3 * ordinary])
    assert measure(reference, got)["max_norm_difference"] > 1


def test_rows_see_a_mask_beside_next_to_nothing():
    reference, got = ([[1.0, 2.0, -1.0], [1e-9, 1e-9, mask]] for mask in (-4e3, 4e3))
    assert measure(reference, got)["worst_cosine"] == pytest.approx(-1.0)


def test_rows_see_a_scale_beside_a_mask():
    assert measure([[0.3, -0.4, -1e4]], [[0.9, -1.2, -1e4]])["max_norm_difference"] == pytest.approx(2.0, rel=1e-3)


def test_rows_compare_large_half_precision_values():
    rows = Rows()
    rows.add(np.array([[20000, 17000, 9000]], np.float16), np.array([[60000, 60000, 9000]], np.float16))
    assert rows.metrics()["max_norm_difference"] > 0.5
    assert rows.metrics()["rows"] == 1


@pytest.mark.parametrize(
    ("reference", "got"),
    [
        ([[20000.0, 1e-3]], [[20000.002, -1e-3]]),
        ([[20000.0, 0.0]], [[20000.0, 1e-6]]),
        ([[2.0], [-1.0], [1e-2], [3.0]], [[2.0], [-1.0], [-1e-2], [3.0]]),
        ([[2.0, 1.0], [1e-4, 1e-4], [1.0, 2.0]], [[2.0, 1.0], [-1e-4, 1e-4], [1.0, 2.0]]),
    ],
)
def test_rows_take_noise_around_zero_for_no_change_of_direction(reference, got):
    assert measure(reference, got)["worst_cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize("mask", [np.finfo(np.float32).min, -1e9])
def test_rows_that_are_masks_as_a_whole_must_stay_so(mask):
    whole, half = np.full((1, 2), mask, np.float32), np.full((1, 2), -65504, np.float32)
    for got, cosine in ((whole, 1.0), (half, 1.0), (np.ones((1, 2), np.float32), -1.0)):
        metrics = measure(whole, got)
        assert (metrics["rows"], metrics["worst_cosine"]) == (1, cosine)
        assert "reference_non_finite" not in metrics


@pytest.mark.parametrize("parts", [1, 4, 13, 50])
def test_one_number_per_item_may_be_noisy_however_it_is_split(parts):
    """4 % of the typical one, also around zero, where a sign turns; a sign that turns elsewhere is seen."""
    random = np.random.default_rng(0)
    reference = random.standard_normal((52, 1)) * 3
    noisy = reference + 0.04 * np.median(np.abs(reference)) * random.uniform(-1, 1, reference.shape)
    turned = np.where(np.arange(52)[:, None] == np.abs(reference).argmax(), -reference, reference)
    for got, fine in ((noisy, True), (turned, False), (1.2 * reference, False)):
        rows = Rows()
        for part in np.array_split(np.arange(52), parts):
            rows.add(reference[part], got[part])
        assert (VECTOR_BUDGET.violations(rows.metrics()) == ()) is fine


def test_rows_are_judged_alike_in_any_order():
    reference, got = np.array([[2.0, 1.0], [1e-5, 1e-5], [1.0, 2.0]]), np.array([[2.0, 1.0], [-1e-5, 1e-5], [1.0, 2.0]])
    found = []
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        rows = Rows()
        for index in order:
            rows.add(reference[[index]], got[[index]])
        found.append(rows.metrics())
    assert found[0] == found[1] == found[2]
    assert found[0]["worst_cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("got", "cosine"), [([[1e20, 1.0]], 1.0), ([[-1e20, 5.0]], -1.0), ([[1e308, 1.0]], 1.0), ([[1e-300, 0.0]], 1.0)]
)
def test_rows_metrics_are_numbers_whatever_the_size(got, cosine):
    """Squares of such values are not, and NaN passes every comparison that is made carelessly."""
    rows = Rows()
    rows.add(np.array([[1e20, 1.0]]), np.array(got))
    metrics = rows.metrics()
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["worst_cosine"] == pytest.approx(cosine)


@pytest.mark.parametrize("broken", [[np.nan, 1.0], [np.nan, np.nan], [np.inf, -np.inf]])
def test_rows_metrics_count_rows_that_the_reference_has_no_answer_for_and_compare_the_others(broken):
    metrics = measure([broken, [1.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]])
    assert metrics["reference_non_finite"] == 1
    assert metrics["rows"] == 1
    assert metrics["worst_cosine"] == metrics["mean_cosine"] == 0.0
    assert measure([broken], [[1.0, 1.0]])["rows"] == 0  # and no cosine of 1 for what was not compared
    assert "reference_non_finite" not in measure([[1.0, 0.0]], [[1.0, 0.0]])


@pytest.mark.parametrize(("got", "cosine"), [([[0.0, 0.0]], 1.0), ([[1.0, 0.0]], 0.0)])
def test_rows_cosine_is_defined_when_the_reference_is_zero(got, cosine):
    assert measure([[0.0, 0.0]], got)["worst_cosine"] == cosine


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e3, 1e3, width=32)))
def test_rows_of_equal_arrays_have_cosine_one_and_no_difference(array):
    metrics = measure(array, array)
    assert metrics["worst_cosine"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["max_difference"] == 0.0


def test_rows_add_refuses_when_shapes_differ():
    with pytest.raises(ValueError, match="shapes"):
        Rows().add(np.zeros((2, 3)), np.zeros((2, 4)))


def test_same_outputs_names_what_is_missing_or_of_another_shape():
    reference = {"y": np.zeros((2, 3))}
    assert same_outputs(reference, {"y": np.ones((2, 3))}) is None
    assert "'y' is missing" in same_outputs(reference, {})
    assert "(2, 4)" in same_outputs(reference, {"y": np.ones((2, 4))})


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (3.0, 2.0), (0.5, 0.5)])
def test_rows_see_a_scale_that_the_cosine_does_not(factor, expected):
    rows = Rows()
    reference = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    rows.add(reference, factor * reference)
    metrics = rows.metrics()
    assert metrics["worst_cosine"] == pytest.approx(1.0)
    assert metrics["max_norm_difference"] >= expected * 0.99
    assert bool(VECTOR_BUDGET.violations(metrics)) is (expected > 0.1)


def test_rows_hold_a_short_row_against_the_typical_one():
    """A row of almost nothing may be a third longer: the error is as small as any other row's."""
    rows = Rows()
    usual = [[100.0, 0.0], [80.0, 1.0]]
    rows.add(np.array([*usual, [0.3, 0.0]], np.float32), np.array([*usual, [0.4, 0.0]], np.float32))
    assert rows.metrics()["max_norm_difference"] < 0.01


# scores of classes


def scores(reference, got, function="softmax"):
    comparison = ScoreComparison(function)
    comparison.add({"logits": np.asarray(reference, np.float32)}, {"logits": np.asarray(got, np.float32)}, {})
    metrics = comparison.metrics()
    assert all(np.isfinite(value) for value in metrics.values())
    return metrics


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_score_comparison_compares_the_other_rows_when_the_reference_has_nan_in_one(function):
    metrics = scores([[np.nan, 0], [5, -5]], [[0, 0], [-5, 5]], function)
    assert metrics["max_score_difference"] > 0.9
    assert metrics["label_agreement"] == 0
    assert metrics["reference_non_finite"] == metrics["rows"] == 1


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("bad", [[np.nan, -5], [np.nan, np.nan]])
def test_score_comparison_is_as_far_as_can_be_when_a_row_became_nan(function, bad):
    metrics = scores([[5, -5], [1, 0]], [bad, [1, 0]], function)
    assert metrics["max_score_difference"] >= 1.0
    assert metrics["label_agreement"] == 0.5
    assert metrics["non_finite"] > 0


def test_score_comparison_takes_a_class_that_both_rule_out_as_equal():
    metrics = scores([[5, -np.inf], [1, 0]], [[5, -np.inf], [1, 0]])
    assert metrics["max_score_difference"] == 0
    assert metrics["label_agreement"] == 1
    assert metrics["non_finite"] == 0


@pytest.mark.parametrize("last", ["short", "long"])
def test_rows_of_several_widths_are_each_judged_as_what_they_are(last):
    """A dimension that varies may be one: that says nothing about the long rows of the same output."""
    random = np.random.default_rng(0)
    long, short = random.standard_normal((8, 384)), random.standard_normal((8, 1)) + 3
    few = np.where(np.abs(long) < 0.05 * np.abs(long).max(axis=1, keepdims=True), -long, long)  # noise, not turned
    for wrong, fine in ((long, True), (few, True), (-0.04 * long, False), (1.2 * long, False), (long[::-1], False)):
        rows = Rows()
        parts = [(short, short), (long, wrong)]
        for reference, got in parts if last == "long" else parts[::-1]:
            rows.add(reference, got)
        assert (VECTOR_BUDGET.violations(rows.metrics()) == ()) is fine


def test_a_short_row_is_not_held_against_the_length_of_long_ones():
    random = np.random.default_rng(0)
    short, rows = random.standard_normal((2, 4)), Rows()
    for _ in range(8):
        long = random.standard_normal((4, 512))
        rows.add(long, long)
    rows.add(short, 1.5 * short)
    assert rows.metrics()["max_norm_difference"] > 0.3


def spread(reference, got):
    return measure(reference, got)["max_spread_error"]


RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize(
    "reference",
    [
        290 + 8 * RANDOM.standard_normal((300, 1)),  # one number, far from zero
        1 + 0.03 * RANDOM.standard_normal((300, 1)),
        np.exp(0.05 * RANDOM.standard_normal((300, 1000))),  # a thousand numbers, much alike
        RANDOM.standard_normal((300, 64)) * 0.15 + 13 * (np.arange(64) == 7),  # hidden states with one large value
        RANDOM.standard_normal((300, 3)),
    ],
)
def test_an_answer_that_never_changes_or_is_another_rows_is_refused_however_alike_rows_are(reference):
    rows = np.random.default_rng(1)
    for wrong in (np.full_like(reference, reference.mean(axis=0)), rows.permutation(reference), 0 * reference):
        assert spread(reference, wrong) > 0.99
        assert VECTOR_BUDGET.violations(measure(reference, wrong))
    deviation = np.median(np.abs(np.diff(reference, axis=0)))
    noise = 0.02 * deviation * rows.standard_normal(reference.shape)
    assert VECTOR_BUDGET.violations(measure(reference, reference + noise)) == ()


def test_the_spread_error_says_nothing_where_there_is_no_spread():
    same = np.ones((20, 4))
    assert spread(same, same * 1.01) == 0
    assert spread(same + 1e-7 * RANDOM.standard_normal((20, 4)), same + 1e-7) < 0.8  # rounding
    assert spread(RANDOM.standard_normal((5, 4)), RANDOM.standard_normal((5, 4))) == 0  # too few rows


def test_the_spread_error_is_the_same_in_any_order_and_batches():
    reference = np.sort(RANDOM.standard_normal((512, 16)), axis=0)
    got = reference + 0.05 * RANDOM.standard_normal(reference.shape)
    order, rows = RANDOM.permutation(512), Rows()
    for part in np.array_split(order, 7):
        rows.add(reference[part], got[part])
    whole = Rows()
    whole.add(reference, got)
    assert rows.metrics()["max_spread_error"] == pytest.approx(whole.metrics()["max_spread_error"])
    alike = Rows()  # rows in blocks are no reason to pass
    blocks = 100 + np.repeat([[1.0], [2.0]], 50, axis=0) * np.ones((1, 4))
    alike.add(blocks, np.full_like(blocks, 101.5))
    assert alike.metrics()["max_spread_error"] >= 0.99


@pytest.mark.parametrize("column", range(6))
def test_a_column_of_another_scale_is_not_drowned_by_the_others(column):
    """Four numbers of a box in pixels and two scores, in one row."""
    boxes = 640 * RANDOM.random((300, 6)) * ([1] * 4 + [1 / 640] * 2)
    wrong = boxes.copy()
    wrong[:, column] = 0
    assert spread(boxes, wrong) >= 1
    assert VECTOR_BUDGET.violations(measure(boxes, boxes.astype(np.float16))) == ()


def test_anisotropic_vectors_may_be_as_far_off_as_their_spread_allows():
    common = 5 * RANDOM.standard_normal((1, 256))
    hidden = common + RANDOM.standard_normal((300, 256))
    for share, fine in ((0.01, True), (0.3, True), (1.0, False)):
        noise = share * RANDOM.standard_normal(hidden.shape)
        assert (spread(hidden, hidden + noise) <= 0.8) is fine


def test_energies_are_no_masks():
    """Rows of low numbers only: there is nothing that they would mask."""
    energies = -82000 + 400 * RANDOM.standard_normal((300, 3))
    for wrong in (np.full_like(energies, -81600), np.full_like(energies, -np.inf), RANDOM.permutation(energies)):
        assert VECTOR_BUDGET.violations(measure(energies, wrong))
    masked = RANDOM.standard_normal((20, 30))
    masked[:, 20:] = -2000.0  # half precision holds that
    assert VECTOR_BUDGET.violations(measure(masked, np.where(np.arange(30) < 20, masked, -np.inf)))
    masked[:, 20:] = -65504.0
    assert VECTOR_BUDGET.violations(measure(masked, np.where(np.arange(30) < 20, masked, np.nan)))


def test_what_no_float32_shows_is_no_difference():
    tails = 1e-9 * RANDOM.random((50, 10))
    assert VECTOR_BUDGET.violations(measure(tails, tails + 1e-7 * RANDOM.random((50, 10)))) == ()
    assert VECTOR_BUDGET.violations(measure(1000 * tails, 0 * tails))


def test_narrow_rows_near_the_boundary_have_no_direction():
    """Two logits that are x and -x: rounding turns those near zero."""
    x = 3 * RANDOM.standard_normal((300, 1))
    logits = np.hstack([x, -x])
    assert VECTOR_BUDGET.violations(measure(logits, logits + 0.01 * RANDOM.standard_normal((300, 2)))) == ()
    assert VECTOR_BUDGET.violations(measure(logits, logits[:, ::-1]))


def test_a_mask_may_become_infinite_where_half_precision_ends():
    reference = RANDOM.standard_normal((20, 30)).astype(np.float32)
    reference[:, 20:] = -65504.0
    got = np.where(np.arange(30) < 20, reference, -np.inf)
    assert VECTOR_BUDGET.violations(measure(reference, got)) == ()
    assert VECTOR_BUDGET.violations(measure(reference, np.where(np.arange(30) < 20, -np.inf, reference)))


@pytest.mark.parametrize("mask", [-65504.0, -1e5, -1e6, -1e7, -1e9, -2e9, float(np.finfo(np.float32).min)])
def test_masks_that_half_precision_cannot_hold_may_be_another_low_number(mask):
    random = np.random.default_rng(0)
    logits = random.standard_normal((16, 6)).astype(np.float32)
    logits[:, 4:] = mask
    half = np.maximum(logits, -1e4).astype(np.float16).astype(np.float32)
    assert VECTOR_BUDGET.violations(measure(logits, half)) == ()
    shown = np.where(logits < -1e4, 0.5, logits)  # the mask is gone
    assert VECTOR_BUDGET.violations(measure(logits, shown))


def test_a_large_negative_answer_is_no_mask():
    """An energy around -8000 beside a gap around 0.5."""
    hidden = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32)
    right = hidden * [400.0, 0.5] + [-8000.0, 0.0]
    assert VECTOR_BUDGET.violations(measure(right, right * 1.0001)) == ()
    frozen = right.copy()
    frozen[:, 0] = -8000
    assert measure(right, frozen)["max_spread_error"] > 0.9
    assert VECTOR_BUDGET.violations(measure(right, frozen))


def test_a_row_that_is_near_zero_must_stay_so():
    assert VECTOR_BUDGET.violations(measure([[1.0] * 8, [1e-6] * 8], [[1.0] * 8, [0.5] * 8]))


def test_rows_of_more_than_a_few_numbers_have_a_direction():
    random = np.random.default_rng(0)
    right = random.standard_normal((64, 20)).astype(np.float32)
    right[3] *= 0.05
    wrong = right.copy()
    wrong[3] *= -1
    assert measure(right, wrong)["worst_cosine"] == pytest.approx(-1.0)


def test_metrics_do_not_depend_on_how_rows_are_batched():
    random = np.random.default_rng(0)
    right = (random.standard_normal((64, 6)) * np.geomspace(0.01, 100, 64)[:, None]).astype(np.float32)
    right[::5, 2] = -1e4
    got = (right * (1 + 0.02 * random.standard_normal(right.shape))).astype(np.float32)
    found = []
    for size in (1, 8, 64):
        rows = Rows()
        for start in range(0, 64, size):
            rows.add(right[start : start + size], got[start : start + size])
        found.append(rows.metrics())
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("mask", [-np.inf, -1e9, -1e4])
def test_a_constant_answer_beside_masks_is_refused(mask):
    random = np.random.default_rng(0)
    right = (8 + 0.3 * random.standard_normal((512, 10))).astype(np.float32)
    masked = random.random(right.shape) < 0.5
    masked[masked.all(axis=1), 0] = False
    constant = np.where(masked, np.float32(mask), np.float32(8))
    right[masked] = mask
    with np.errstate(over="ignore"):
        half = right.astype(np.float16)
    assert VECTOR_BUDGET.violations(measure(right, half)) == ()
    assert "max_spread_error" in VECTOR_BUDGET.violations(measure(right, constant))[-1]


def test_the_least_share_does_not_depend_on_the_order_of_values_that_are_as_common():
    ref = np.array([True] * 7 + [False] * 7)
    got = np.array([True] * 7 + [False] * 4 + [True] * 3)
    found = []
    for order in ([0, 1], [1, 0]):
        choices = Choices()
        for part in order:
            choices.add(ref[part * 7 :][:7], got[part * 7 :][:7])
        found.append(choices.least())
    assert found[0] == found[1] == pytest.approx(4 / 7)
