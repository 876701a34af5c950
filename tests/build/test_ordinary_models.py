"""Models as people write them: each is logged, verified at every size, and answers as it did before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.source.resolve import resolve

RANDOM = np.random.default_rng(0)


class Forecast(torch.nn.Module):
    """The last step of each series, whose length is said."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = torch.nn.LSTM(4, 8, batch_first=True), torch.nn.Linear(8, 1)

    def forward(self, x, lengths):
        steps, _ = self.lstm(x)
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, steps.shape[2])
        return self.head(steps.gather(1, last).squeeze(1)).squeeze(-1)


class Graph(torch.nn.Module):
    """One step of messages along edges between nodes."""

    def __init__(self):
        super().__init__()
        self.own, self.out = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

    def forward(self, x, edges):
        nodes = self.own(x)
        return self.out(torch.relu(nodes + torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])))


class Totals(torch.nn.Module):
    """Besides an answer per row, one number for all."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, x):
        y = self.linear(x)
        return y, y.argmax(1), y.sum()


class Table(torch.nn.Module):
    """Inputs called as an operator is."""

    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ModuleList([torch.nn.Embedding(n, 4) for n in (5, 12)])
        self.out = torch.nn.Linear(14, 1)

    def forward(self, cat, linear):
        return self.out(torch.cat([*(table(cat[:, i]) for i, table in enumerate(self.tables)), linear], 1))


def floats(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


ORDINARY = {
    "lengths": (
        Forecast,
        {"x": floats(8, 24, 4), "lengths": RANDOM.integers(8, 25, 8)},
        {"x.1": "time", "time": (4, 24, 48)},
    ),
    "edges": (
        Graph,
        {"x": floats(20, 8), "edges": RANDOM.integers(0, 20, (2, 60))},
        {"edges.0": 2, "edges.1": "edges", "edges": (1, 60, 200), "batch": (1, 20, 50)},
    ),
    "totals": (Totals, {"x": floats(4, 3)}, None),
    "names": (Table, {"cat": np.stack([RANDOM.integers(0, n, 64) for n in (5, 12)], 1), "linear": floats(64, 6)}, None),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_model_is_logged_and_answers(name, tmp_path):
    kind, example, shapes = ORDINARY[name]
    torch.manual_seed(0)
    module = kind().eval()
    mlflow_tdeploy.save_model(
        module, tmp_path / "model", task="tensors", example=example, shapes=shapes, precisions=["fp32"]
    )
    loaded = mlflow_tdeploy.load_model(tmp_path / "model")
    with torch.no_grad():
        expected = module(**{key: torch.from_numpy(value) for key, value in example.items()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, wanted in zip(loaded.infer(example).values(), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_positions_are_found_by_trying():
    for name, found in (("lengths", {"lengths": {"lengths": "time"}}), ("edges", {"positions": {"edges": "batch"}})):
        kind, example, shapes = ORDINARY[name]
        assert resolve(kind().eval(), example=example, shapes=shapes).task_config == found


class Rated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = torch.nn.Embedding(1000, 8), torch.nn.Embedding(50, 8)

    def forward(self, user, item):
        return (self.user(user) * self.item(item)).sum(1)


class WithTypes(torch.nn.Module):
    """Types, positions and a mask of its own, as BERT has them."""

    def __init__(self):
        super().__init__()
        self.word, self.kind, self.place = (torch.nn.Embedding(n, 8) for n in (1000, 2, 64))

    def forward(self, ids, attention_mask):
        own = torch.zeros_like(ids), torch.arange(ids.shape[1]).expand(ids.shape)
        return (self.word(ids) + self.kind(own[0]) + self.place(own[1])) * attention_mask[..., None]


@pytest.mark.parametrize("ids", [np.zeros((1, 16), np.int64), np.ones((1, 16), np.int64), np.arange(16)[None]])
def test_a_table_is_told_from_what_only_looks_alike(ids):
    example = {"ids": ids, "attention_mask": np.ones_like(ids)}
    assert resolve(WithTypes(), example=example).task_config == {"integer_ranges": {"ids": 1000}}


def test_tables_of_inputs_that_are_alike_in_the_example_are_their_own():
    example = {"user": np.arange(16), "item": np.arange(16)}
    assert resolve(Rated(), example=example).task_config == {"integer_ranges": {"user": 1000, "item": 50}}


class NeedsEnd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.word = torch.nn.Embedding(100, 8)

    def forward(self, ids):
        if (ids == 2).sum(1).min() != 1:
            raise ValueError("every row needs one end")
        return self.word(ids).mean(1)


def test_a_table_that_the_model_does_not_take_whole_is_not_asked_whole():
    ids = RANDOM.integers(4, 100, (4, 12))
    ids[:, -1] = 2
    assert "integer_ranges" not in resolve(NeedsEnd(), example={"ids": ids}).task_config


class Refuses(torch.nn.Module):
    def forward(self, x):
        if x.shape[1] > 40:
            raise ValueError("too long")
        return x.cumsum(1)


def test_a_size_that_the_model_cannot_take_is_still_refused(tmp_path):
    with pytest.raises(MlflowException, match=r"time=\d+.*bounds that are multiples"):
        mlflow_tdeploy.save_model(
            Refuses(),
            tmp_path / "model",
            task="tensors",
            example={"x": floats(2, 20)},
            shapes={"x.1": "time", "time": (8, 20, 64)},
            precisions=["fp32"],
        )
