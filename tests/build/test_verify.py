from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlflow_tdeploy.build import stored_answers
from mlflow_tdeploy.build.golden import golden_requests
from mlflow_tdeploy.build.reference import ReferenceAnswers, corner_sizes, largest_corner
from mlflow_tdeploy.build.verify import verify
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, SessionError
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from tests.build.sources import linear_task, scaled
from tests.core.text_assets import write_tokenizer

BUDGET = Budget.of("worst_cosine >= 0.99, max_difference <= 0.1")
DIMS = ("batch", "sequence")


def text_signature(batch=(1, 4, 8), sequence=(1, 8, 16)) -> Signature:
    return Signature(
        (Dim.of("batch", batch), Dim.of("sequence", sequence)),
        tuple(TensorSpec(name, "int64", DIMS) for name in ("input_ids", "attention_mask")),
        (TensorSpec("logits", "float32", ("batch", 2)),),
    )


def classifier(assets: Path) -> Task:
    return TASKS.get("text-classification")({"labels": ["no", "yes"], "max_length": 16}, text_signature(), assets)


def odd_length(feeds):
    """Classify by whether the number of tokens is odd."""
    odd = feeds["attention_mask"].sum(axis=1) % 2
    return {"logits": np.stack([1 - odd, odd], axis=1).astype(np.float32) * 4}


@pytest.fixture
def answers(tmp_path: Path) -> ReferenceAnswers:
    task = linear_task()
    return ReferenceAnswers(task, VerifyData.of(None).for_task(task), scaled(1.0), tmp_path)


def test_verify_passes_when_the_variant_is_the_reference(answers):
    verified = verify(answers, scaled(1.0), BUDGET)
    assert verified.passed
    assert verified.metrics["max_difference"] == 0
    assert verified.data == answers.data.record


def test_verify_covers_min_opt_and_max_of_the_signature_and_odd_sizes_between(answers):
    assert verify(answers, scaled(1.0), BUDGET).shapes == ("batch=1", "batch=2", "batch=8", "batch=5")


def test_a_variant_that_no_session_would_open_fails(answers):
    """A golden request is replayed before anything serves: what answers that one wrongly must not pass."""
    golden = golden_requests(answers.task, answers.data, scaled(1.0))

    def infer(feeds):
        asked_for = np.array_equal(feeds["x"], golden[0].feeds["x"])
        return scaled(-1.0 if asked_for else 1.0)(feeds)

    others = [case for case in answers.cases if not np.array_equal(case.feeds["x"], golden[0].feeds["x"])]
    answers.cases, answers._store = tuple(others), [scaled(1.0)(case.feeds) for case in others]
    assert verify(answers, infer, BUDGET).passed
    (violation,) = verify(answers, infer, BUDGET, golden).violations
    assert violation.startswith("golden request: ")


def test_what_was_made_up_is_not_blamed_on_the_model_alone(tmp_path):
    task = linear_task()
    with pytest.raises(InvalidInputError, match=r"They were made up: example=…"):
        ReferenceAnswers(
            task,
            VerifyData.of(None).for_task(task),
            lambda feeds: {"y": np.full((len(feeds["x"]), 3), np.nan)},
            tmp_path,
        )


def test_verify_fails_when_the_variant_is_too_far(answers):
    verified = verify(answers, scaled(1.5), BUDGET)
    assert not verified.passed
    assert "max_difference" in verified.violations[0]


def test_verify_fails_when_only_the_largest_batch_is_wrong(answers):
    def infer(feeds):
        return scaled(9.0 if len(feeds["x"]) == 8 else 1.0)(feeds)

    verified = verify(answers, infer, BUDGET)
    assert not verified.passed
    assert verified.settings["items"]["max_difference"] == 0


def test_what_somebody_gave_is_held_against_the_budget_by_itself(tmp_path):
    """Beside answers around a thousand, which only made-up shapes give, nothing would be seen of answers around 1."""
    task, random = linear_task(), np.random.default_rng(0)
    rows = random.standard_normal((32, 4)).astype(np.float32)
    data = VerifyData.of([{"x": part} for part in np.split(rows, 8)]).for_task(task)

    def reference(feeds):
        return {"y": feeds["x"][:, :3] * (1.0 if len(feeds["x"]) == 4 else 1000.0)}

    def variant(feeds):
        right = reference(feeds)["y"]
        return {"y": np.zeros_like(right) + right.mean() if len(right) == 4 else right}

    answers = ReferenceAnswers(task, data, reference, tmp_path)
    verified = verify(answers, variant, Budget.of("max_spread_error <= 0.8"))
    assert verified.settings["corners"]["max_spread_error"] == 0
    assert verified.metrics["max_spread_error"] == verified.settings["items"]["max_spread_error"] > 0.9
    assert not verified.passed


def test_what_will_be_replayed_was_compared_as_it_will_be_replayed(tmp_path):
    """Dynamic int8 ranges depend on the batch: a golden batch that was never checked might fail on the first host."""
    write_tokenizer(tmp_path / "assets")
    task = classifier(tmp_path / "assets")
    data = VerifyData.of([" ".join(["good"] * length) for length in range(1, 15)]).for_task(task)
    answers = ReferenceAnswers(task, data, odd_length, tmp_path / "answers")
    golden = golden_requests(task, data, odd_length)
    assert {len(request.feeds["input_ids"]) for request in golden} == {1, 4}
    for request in golden:
        assert any(
            all(np.array_equal(case.feeds[name], array) for name, array in request.feeds.items())
            for case in answers.cases
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_verify_fails_with_finite_metrics_when_values_are_not_finite(answers, bad):
    def infer(feeds):
        outputs = scaled(1.0)(feeds)
        outputs["y"][0, 0] = bad
        return outputs

    verified = verify(answers, infer, BUDGET)
    assert not verified.passed
    assert np.isfinite(list(verified.metrics.values())).all()
    assert "NaN or infinite" in verified.violations[0]
    assert verified.evidence("x").passed is False


def _raises(feeds):
    raise SessionError("out of luck")


@pytest.mark.parametrize(
    ("infer", "message"),
    [
        (_raises, "out of luck"),
        (lambda feeds: {}, "output 'y' is missing"),
        (lambda feeds: {"y": feeds["x"]}, "has shape"),
    ],
)
def test_verify_fails_instead_of_raising_when_a_variant_cannot_answer(answers, infer, message):
    verified = verify(answers, infer, BUDGET)
    assert not verified.passed
    assert message in verified.violations[0]
    assert "at batch=1" in verified.violations[0]
    assert verified.verdict == "failed"  # no budget was missed
    assert verified.metrics == {}  # nothing was compared: no figure that looks like success


def test_verify_lists_only_the_corners_that_were_answered(answers):
    def infer(feeds):
        if len(feeds["x"]) > 1:
            raise SessionError("too many")
        return scaled(1.0)(feeds)

    assert verify(answers, infer, BUDGET).shapes == ("batch=1",)


def test_verify_gives_no_score_where_answers_are_missing(minilm_path, tmp_path):
    task = classifier(minilm_path)
    data = VerifyData.of({"text": ["a b", "a"], "label": ["yes", "no"]}).for_task(task)
    answers = ReferenceAnswers(task, data, odd_length, tmp_path)
    calls = []

    def infer(feeds):
        calls.append(feeds)
        if len(calls) % 2:
            raise SessionError("out of luck")
        return odd_length(feeds)

    verified = verify(answers, infer, Budget.of("max_score_difference <= 1"))
    assert "accuracy" not in verified.metrics
    assert not verified.passed


def test_a_source_that_fails_is_told_which_range_to_narrow(tmp_path):
    def short(feeds):
        if len(feeds["x"]) > 4:
            raise ValueError("index out of range")
        return scaled(1.0)(feeds)

    task = linear_task()
    with pytest.raises(BuildError, match=r"fails at batch=8.*Narrow the ranges.*index out of range"):
        ReferenceAnswers(task, VerifyData.of(None).for_task(task), short, tmp_path)


def test_unrepeatable_sees_a_model_that_draws_random_numbers(answers):
    random = np.random.default_rng(0)
    assert answers.unrepeatable(scaled(1.0), BUDGET) is None
    drawn = answers.unrepeatable(lambda feeds: {"y": random.standard_normal((len(feeds["x"]), 3))}, BUDGET)
    assert "worst_cosine" in drawn


def test_reference_is_asked_once_for_all_variants(tmp_path):
    calls = []

    def reference(feeds):
        calls.append(feeds)
        return scaled(1.0)(feeds)

    task = linear_task()
    answers = ReferenceAnswers(task, VerifyData.of(None).for_task(task), reference, tmp_path)
    before = len(calls)
    for _ in range(2):
        verify(answers, scaled(1.0), BUDGET)
    assert len(calls) == before == len(answers.cases)


def test_reference_answers_are_the_same_when_they_are_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_tdeploy.build.stored_answers.MEMORY", 0)
    task = linear_task()
    answers = ReferenceAnswers(task, VerifyData.of(None).for_task(task), scaled(1.0), tmp_path / "new")
    assert list((tmp_path / "new").iterdir())
    assert verify(answers, scaled(1.0), BUDGET).metrics["max_difference"] == 0
    assert not verify(answers, scaled(1.5), BUDGET).passed


def test_reference_answers_on_disk_keep_a_type_that_numpy_lacks(tmp_path):
    import ml_dtypes

    store = stored_answers.StoredAnswers(tmp_path)
    store._bytes = stored_answers.MEMORY
    store.append({"y": np.ones((2, 3), ml_dtypes.bfloat16)})
    assert list(tmp_path.iterdir())
    assert store[0]["y"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(("bounds", "runs"), [((8, 16, 32), True), ((1, 16, 32), False)])
def test_a_model_may_take_only_multiples_of_what_its_bounds_are_multiples_of(tmp_path, bounds, runs):
    """Three times halved and doubled again: an image of 20 pixels comes back as one of 16."""
    dims = (Dim.of("batch", (1, 2, 4)), Dim.of("width", bounds))
    specs = TensorSpec("x", "float32", ("batch", "width")), TensorSpec("y", "float32", ("batch", "width"))
    task = TASKS.get("tensors")({}, Signature(dims, specs[:1], specs[1:]), Path())

    def infer(feeds):
        if feeds["x"].shape[1] % 8:
            raise ValueError("sizes of tensors must match")
        return {"y": feeds["x"]}

    def ask():
        return ReferenceAnswers(
            task, VerifyData.of([{"x": np.ones((2, 16), np.float32)}]).for_task(task), infer, tmp_path
        )

    if not runs:
        with pytest.raises(BuildError, match="a size within the ranges"):
            ask()
        return
    shapes = {case.feeds["x"].shape[1] for case in ask().cases}
    assert {8, 16, 32, 24} == shapes


def test_an_answer_of_many_numbers_a_token_is_asked_in_smaller_corners():
    dims = (Dim.of("batch", (1, 8, 64)), Dim.of("sequence", (1, 128, 512)))
    specs = (
        TensorSpec("ids", "int64", ("batch", "sequence")),
        TensorSpec("logits", "float32", ("batch", "sequence", 50257)),
    )
    assert largest_corner(0, Signature(dims, specs[:1], specs[1:])) == 512
    assert largest_corner(0, text_signature()) == 32768


def test_reference_answers_raise_when_the_reference_fails(tmp_path):
    task = linear_task()
    data = VerifyData.of(None).for_task(task)
    with pytest.raises(BuildError, match=r"fails at batch=1.*ZeroDivisionError"):
        ReferenceAnswers(task, data, lambda feeds: {"y": 1 / 0}, tmp_path)


def _nan_for(rows):
    """The reference y = x + 1, with NaN in its first row where a batch has so many rows."""

    def infer(feeds):
        outputs = scaled(1.0)(feeds)
        if rows is None or len(feeds["x"]) == rows:
            outputs["y"][0, 0] = np.nan
        return outputs

    return infer


def test_reference_answers_raise_when_an_item_has_no_finite_answer(tmp_path):
    task = linear_task()
    requests = [{"x": np.ones((rows, 4), np.float32)} for rows in (1, 5, 5)]
    data = VerifyData.of(requests).for_task(task)
    with pytest.raises(InvalidInputError, match=r"own answers are not finite .* for 2 of the 11 rows asked \(items\)"):
        ReferenceAnswers(task, data, _nan_for(5), tmp_path)
    with pytest.raises(InvalidInputError, match="own answers are not finite"):
        ReferenceAnswers(task, data, lambda feeds: {"y": np.full((len(feeds["x"]), 3), np.inf)}, tmp_path)


def test_verify_leaves_rows_out_and_counts_them_when_the_reference_has_no_finite_answer_at_a_corner(tmp_path):
    task = linear_task()
    data = VerifyData.of([{"x": np.ones((3, 4), np.float32)}]).for_task(task)
    answers = ReferenceAnswers(task, data, _nan_for(8), tmp_path)
    assert answers.not_compared > 0

    def far_at_eight(feeds):
        outputs = scaled(1.0)(feeds)
        outputs["y"][1:] *= -1.0 if len(feeds["x"]) == 8 else 1.0
        return outputs

    assert verify(answers, scaled(1.0), BUDGET).metrics["reference_non_finite"] == answers.not_compared
    assert not verify(answers, far_at_eight, BUDGET).passed  # the rows beside it are compared


def test_verify_scores_answers_when_labels_are_given(minilm_path, tmp_path):
    task = classifier(minilm_path)
    texts = ["one", "one two", "one two three", "one two three four"]  # 3, 4, 5 and 6 tokens
    data = VerifyData.of({"text": texts, "label": ["yes", "no", "yes", "yes"]}).for_task(task)
    answers = ReferenceAnswers(task, data, odd_length, tmp_path)
    assert answers.metric["accuracy"] == 0.75
    assert set(answers.metric) == {"accuracy", "precision", "recall", "f1", "loss"}
    budget = Budget.of("accuracy_drop <= 0.1")
    same = verify(answers, odd_length, budget)
    assert same.passed
    assert same.metrics["accuracy"] == same.metrics["reference_accuracy"] == 0.75

    def always_no(feeds):
        return {"logits": np.tile(np.float32([4, 0]), (len(feeds["input_ids"]), 1))}

    worse = verify(answers, always_no, budget)
    assert worse.metrics["accuracy"] == 0.25
    assert worse.metrics["accuracy_drop"] == 0.5
    assert worse.metrics["loss_rise"] == pytest.approx(worse.metrics["loss"] - worse.metrics["reference_loss"])
    assert worse.metrics["loss_rise"] > 0
    assert "accuracy_drop is 0.5" in worse.violations[0]


def test_verify_asks_every_text_in_batches_and_some_alone(minilm_path, tmp_path):
    task = classifier(minilm_path)
    data = VerifyData.of(None).for_task(task)
    answers = ReferenceAnswers(task, data, odd_length, tmp_path)
    items = [case for case in answers.cases if case.part == "items"]
    assert sorted(index for case in items if case.answers for index in case.indices) == list(range(len(data.texts)))
    assert sum(len(case.indices) == 1 for case in items) >= 20


def test_corners_hold_words_of_the_texts_and_rows_of_different_length(minilm_path, tmp_path):
    task = classifier(minilm_path)
    data = VerifyData.of(["the quick brown fox"] * 200).for_task(task)
    answers = ReferenceAnswers(task, data, odd_length, tmp_path)
    corners = [case.feeds for case in answers.cases if case.part == "corners"]
    words = set(task.encode(["the quick brown fox"]).collate([0])["input_ids"][0].tolist()) | {0}
    assert all(set(np.unique(feeds["input_ids"]).tolist()) <= words for feeds in corners)
    largest = [feeds["attention_mask"].sum(axis=1) for feeds in corners if feeds["input_ids"].shape == (8, 16)]
    assert any(len(set(lengths.tolist())) > 1 for lengths in largest)
    assert all(lengths.max() == 16 for lengths in largest)


def test_corner_sizes_keep_each_dimension_at_full_size_when_the_whole_is_too_large():
    signature = text_signature(batch=(1, 8, 64), sequence=(1, 128, 512))
    assert corner_sizes(signature, "max", 32768) == [{"batch": 64, "sequence": 512}]
    assert corner_sizes(signature, "max", 4096) == [{"batch": 64, "sequence": 64}, {"batch": 8, "sequence": 512}]
    assert corner_sizes(signature, "min", 4096) == [{"batch": 1, "sequence": 1}]


def test_corner_sizes_stay_multiples_of_what_the_bounds_are_multiples_of():
    spec = TensorSpec("x", "float32", (1, "h", "w"))
    signature = Signature((Dim("h", 32, 480, 960), Dim("w", 32, 480, 960)), (spec,), (spec,))
    assert corner_sizes(signature, "max", 960 * 68) == [{"h": 960, "w": 64}, {"h": 64, "w": 960}]


def test_corner_sizes_never_leave_the_range():
    signature = text_signature(batch=(4, 8, 64), sequence=(100, 128, 512))
    assert corner_sizes(signature, "max", 10) == [{"batch": 64, "sequence": 100}, {"batch": 4, "sequence": 512}]


def test_largest_corner_shrinks_when_the_model_grows():
    assert largest_corner(0, text_signature()) == 32768
    assert largest_corner(22_700_000, text_signature()) >= 64 * 256  # all-MiniLM-L6-v2 is checked at its whole range
    assert largest_corner(110_000_000, text_signature()) < largest_corner(22_700_000, text_signature())
    assert largest_corner(10**12, text_signature()) == 2048
