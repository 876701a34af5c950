"""How good predictions are: held against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.quality import classified, log_loss

metrics = pytest.importorskip("sklearn.metrics")

pairs = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=1, max_size=40)


@given(pairs)
def test_shares_are_those_of_scikit_learn(pairs):
    predicted, right = zip(*pairs, strict=True)
    how = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy": metrics.accuracy_score(right, predicted),
        "precision": metrics.precision_score(right, predicted, **how),
        "recall": metrics.recall_score(right, predicted, **how),
        "f1": metrics.f1_score(right, predicted, **how),
    }
    assert classified(predicted, right) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1000)), min_size=1, max_size=20))
def test_the_loss_is_that_of_scikit_learn(rows):
    scores = np.array([np.random.default_rng(seed).dirichlet(np.ones(3)) for _, seed in rows])
    right = [label for label, _ in rows]
    found = log_loss([float(row[label]) for row, label in zip(scores, right, strict=True)])
    assert found == pytest.approx(metrics.log_loss(right, scores, labels=[0, 1, 2]))


def test_one_answer_that_is_wholly_wrong_leaves_the_loss_finite():
    assert 18 < log_loss([0.0, 1.0]) < 37
