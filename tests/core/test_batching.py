import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.batching import MIN_SPLIT_TOKENS, plan_batches

requests = st.lists(st.integers(0, 512), max_size=60)
options = st.fixed_dictionaries(
    {"max_batch": st.integers(1, 64), "token_budget": st.integers(1, 4096), "workers": st.integers(1, 8)}
)


@given(requests, options)
def test_plan_holds_every_item_exactly_once(lengths, options):
    batches = plan_batches(lengths, **options)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(requests, options)
def test_plan_keeps_batch_size_and_token_budget(lengths, options):
    for batch in plan_batches(lengths, **options):
        assert len(batch) <= options["max_batch"]
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= options["token_budget"]


@given(requests, options)
def test_plan_is_sorted_longest_first(lengths, options):
    flat = [lengths[index] for batch in plan_batches(lengths, **options) for index in batch]
    assert flat == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60))
def test_plan_pads_no_more_than_one_batch_would(lengths):
    padded = sum(len(b) * max(lengths[i] for i in b) for b in plan_batches(lengths, max_batch=64, token_budget=1024))
    assert padded <= len(lengths) * max(lengths)


def test_plan_is_empty_when_there_is_nothing():
    assert plan_batches([], max_batch=8, token_budget=100) == []


def test_plan_makes_a_batch_of_its_own_when_an_item_is_over_the_budget():
    assert plan_batches([5, 500, 5], max_batch=8, token_budget=100) == [[1], [0, 2]]


@pytest.mark.parametrize("workers", [2, 4])
def test_plan_gives_every_worker_something_when_there_is_enough(workers):
    lengths = [32] * (workers * MIN_SPLIT_TOKENS // 32)
    alone = plan_batches(lengths, max_batch=64, token_budget=100_000)
    assert len(alone) == math.ceil(len(lengths) / 64)
    assert len(plan_batches(lengths, max_batch=64, token_budget=100_000, workers=workers)) >= workers


def test_plan_is_not_split_when_work_is_small():
    assert len(plan_batches([32] * 4, max_batch=64, token_budget=1024, workers=4)) == 1


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 8), st.integers(1, 64), st.integers(1, 4))
def test_plan_batches_puts_equal_lengths_together_and_no_others_when_nothing_may_be_padded(
    lengths, max_batch, token_budget, workers
):
    plan = plan_batches(lengths, max_batch=max_batch, token_budget=token_budget, workers=workers, pads=False)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len({lengths[index] for index in batch}) == 1
        assert len(batch) <= max_batch
