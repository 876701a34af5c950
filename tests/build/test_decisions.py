"""Forwards that decide by what comes in: a trace has one way of each."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.build import _torch_exporters
from mlflow_tdeploy.build._torch_exporters import decisions

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((64, 3)).astype(np.float32)


class Decides(torch.nn.Module):
    """Decides in one of many words."""

    def __init__(self, how):
        super().__init__()
        self.out, self.how = torch.nn.Linear(6, 2), how

    def forward(self, x):
        if self.how(x):
            x = x / 255
        return self.out(x)


class EarlyExit(torch.nn.Module):
    """A small model answers where it is sure, a larger one else."""

    def __init__(self):
        super().__init__()
        self.small = torch.nn.Linear(6, 2)
        self.large = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        with torch.no_grad():
            self.small.weight *= 2.5

    def forward(self, x):
        sure = self.small(x).softmax(1)
        if bool((sure.max(1).values > 0.95).all()):
            return sure
        return self.large(x).softmax(1)


class Pixels(torch.nn.Module):
    """Decides by the values, and by the size, which every trace may."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(6, 2)

    def forward(self, x):
        if x.shape[0] > 1_000_000:
            x = x * 2
        if x.max() > 1.5:
            x = x / 255
        return self.out(x)


class Loop(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = torch.nn.GRUCell(4, 8)

    def forward(self, x):
        state = torch.zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state


def test_a_decision_by_values_is_told_and_what_it_loses_is_found(tmp_path, caplog):
    torch.manual_seed(1)
    rows = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    with pytest.raises(MlflowException) as error:
        mlflow_tdeploy.save_model(EarlyExit().eval(), tmp_path / "m", example={"x": rows}, precisions=["fp32"])
    assert "is over the model's budget" in str(error.value)
    assert f"The module decides by values at {Path(__file__).name}:" in str(error.value)
    assert "if bool((sure.max(1).values > 0.95).all()):" in str(error.value)

    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlflow_tdeploy"):
        pixels = {"x": np.abs(rows) % 1}
        mlflow_tdeploy.save_model(Pixels().eval(), tmp_path / "p", example=pixels, precisions=["fp32"])
    (told,) = [one.getMessage() for one in caplog.records if "decides by values" in one.getMessage()]
    assert "if x.max() > 1.5:" in told
    assert "1_000_000" not in told  # sizes are no values


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda x: not torch.allclose(x.norm(dim=1), torch.ones(x.shape[0])), True),
        (lambda x: torch.equal(x, x.round()), True),
        (lambda x: torch.is_nonzero((x > 1.5).any()), True),
        (lambda x: len(torch.nonzero(x > 1.5)) > 0, True),
        (lambda x: np.asarray(x.detach()).max() > 1.5, True),
        (lambda x: -1 in x, True),
        (lambda x: x.sum().item() > 100, True),
        (lambda x: torch.nonzero(x > 1.5).shape[0] > 0, True),
        (lambda x: torch.nonzero(x > 1.5).numel() > 0, True),
        (lambda x: (x > 1.5).nonzero().size(0) > 0, True),
        (lambda x: (x > 1.5).nonzero(as_tuple=True)[0].shape[0] > 0, True),
        (lambda x: torch.argwhere(x > 1.5).shape[0] > 0, True),
        (lambda x: x[x > 1.5].numel() > 0, True),
        (lambda x: len(x[x > 1.5]) > 0, True),
        (lambda x: x[:, 1:][x[:, 1:] > 1.5].shape[0] > 0, True),
        (lambda x: x[(x > 1.5).any(1), 2].shape[0] > 0, True),
        (lambda x: torch.masked_select(x, x > 1.5).numel() > 0, True),
        (lambda x: torch.where(x > 1.5)[0].numel() > 0, True),
        (lambda x: len(torch.where(x > 1.5)[0]) > 0, True),
        (lambda x: torch.unique(x).shape[0] < 3, True),
        (lambda x: torch.unique_consecutive(x).numel() < 3, True),
        (lambda x: x.repeat_interleave((x[:, 0] > 1.5).long(), 0).shape[0] > 0, True),
        (lambda x: torch.bincount(x.long().flatten()).shape[0] > 2, True),
        (lambda x: torch.ones_like(x[x > 1.5]).sum() > 0, True),
        (lambda x: len(x) > 1000, False),
        (lambda x: x.numel() > 1000, False),
        (lambda x: (x * 2)[:, :2].size(0) > 1000, False),
        (lambda x: x[torch.tensor([0, 1])].shape[0] > 1000, False),
        (lambda x: x[torch.tensor([True, False, True, True])].shape[0] > 1000, False),
        (lambda x: x[:, x.argmax(1)].shape[0] > 1000, False),
        (lambda x: torch.where(x > 1.5, x, 0.0).shape[0] > 1000, False),
        (lambda x: torch.arange(x.shape[0]).shape[0] > 1000, False),
        (lambda x: x.repeat_interleave(2, 0).shape[0] > 1000, False),
        (lambda x: not bool(torch.ones_like(x).all()), False),
        (lambda x: x.new_ones(x.shape).sum() == 0, False),
        (lambda x: x.shape[0] > 1000, False),
    ],
)
def test_a_decision_is_noticed_in_whatever_words(how, told):
    module, row = Decides(how).eval(), torch.rand(4, 6)  # of a trace the module itself is an input, too
    with decisions(2) as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, (row,), check_trace=False)
    assert bool(found) is told, found
    assert all(place.startswith(f"{Path(__file__).name}:") for place in found)
    assert torch.equal(row, row)  # as before
    assert torch.Tensor.__bool__ is BOOL


def test_looking_for_decisions_goes_each_way_once(monkeypatch):
    """A long forward asks for sizes all the time, and each time everything before it is there to be gone through."""
    gone = []
    inputs = _torch_exporters._inputs
    monkeypatch.setattr(_torch_exporters, "_inputs", lambda node, held: gone.append(1) or inputs(node, held))

    class Long(torch.nn.Module):
        def forward(self, x):
            for _ in range(100):
                x = x[: x.shape[0]] * 2 if x.shape[0] > 0 else x
            return x

    with _torch_exporters.decisions(1) as found:
        torch.jit.trace(Long(), torch.ones(3, 3), check_trace=False)
    assert not found
    assert len(gone) < 3000


BOOL = torch.Tensor.__bool__


def test_a_library_whose_name_begins_as_torch_does_is_told(monkeypatch):
    name = f"{Path(torch.__file__).parent}vision/models/one.py"
    space = {"torch": torch}
    exec(compile("def how(x):\n    return bool(x.max() > 1.5)\n", name, "exec"), space)
    with decisions(2) as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Decides(space["how"]).eval(), (torch.rand(4, 6),), check_trace=False)
    assert any(place.startswith("one.py:2") for place in found), found


def test_a_loop_over_a_dimension_is_told(tmp_path):
    steps = {"x": RANDOM.standard_normal((16, 10, 4)).astype(np.float32)}
    with pytest.raises(MlflowException, match="a Python loop over a dimension is as long as there"):
        mlflow_tdeploy.save_model(Loop().eval(), tmp_path / "m", example=steps, shapes={"x.1": "t", "t": (1, 10, 30)})
