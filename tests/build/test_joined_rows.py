"""Are rows answered each by itself, so that a server may join requests?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mlflow_tdeploy
from mlflow_tdeploy.store.bundle import Bundle

RANDOM = np.random.default_rng(0)


class Scores(torch.nn.Module):
    """Candidates of one request, whose scores are held against each other where that is wanted."""

    def __init__(self, over):
        super().__init__()
        self.linear, self.over = torch.nn.Linear(4, 3), over

    def forward(self, x):
        y = self.linear(x)
        return torch.softmax(y, 0) if self.over == "softmax" else y - y.mean(0) if self.over == "mean" else y.cumsum(0)


@pytest.mark.parametrize("over", ["softmax", "mean", "sum"])
def test_rows_that_depend_on_each_other_are_never_joined(over, tmp_path):
    example = {"x": RANDOM.standard_normal((5, 4)).astype(np.float32)}
    mlflow_tdeploy.save_model(Scores(over), tmp_path / "m", example=example, precisions=["fp32"])
    task = Bundle.open(tmp_path / "m" / "tdeploy").task()
    assert task.signature.batch_dim == "batch"
    assert task.batch_dim is None


class PriceAndRank(torch.nn.Module):
    """A large number of each row by itself, and a small one of all of them."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x):
        y = self.linear(x)
        return torch.cat([50_000 + 10_000 * y, (y - y.mean(0)) / (y.std(0, unbiased=False) + 1e-3)], dim=1)


def test_a_small_number_of_all_rows_is_not_hidden_by_a_large_one(tmp_path):
    example = {"x": RANDOM.standard_normal((5, 4)).astype(np.float32)}
    mlflow_tdeploy.save_model(PriceAndRank(), tmp_path / "m", example=example, precisions=["fp32"])
    assert Bundle.open(tmp_path / "m" / "tdeploy").task().batch_dim is None


def test_rows_of_their_own_may_be_joined(tmp_path):
    example = {"x": RANDOM.standard_normal((5, 4)).astype(np.float32)}
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Softmax(1))
    mlflow_tdeploy.save_model(model, tmp_path / "m", example=tuple(example.values()), precisions=["fp32"])
    assert Bundle.open(tmp_path / "m" / "tdeploy").task().batch_dim == "batch"


class Mixing(torch.nn.Module):
    """Attention across the pictures of a request."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 8)

    def forward(self, x):
        h = self.linear(x.float().flatten(1) / 255)
        return torch.softmax(h @ h.T, 1) @ h


@pytest.mark.parametrize("mixes", [True, False])
def test_one_row_in_the_example_is_enough_to_tell_whether_rows_depend(mixes, tmp_path):
    model = Mixing() if mixes else torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    dtype = np.uint8 if mixes else np.float32
    name = "x" if mixes else "input"
    example = {name: RANDOM.integers(0, 256, (1, 3, 2, 2)).astype(dtype)}
    mlflow_tdeploy.save_model(model, tmp_path / "m", example=example, precisions=["fp32"])
    assert Bundle.open(tmp_path / "m" / "tdeploy").task().batch_dim == (None if mixes else "batch")
