"""Modules whose forward writes to their own weights and buffers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.source._own_state import StateKept, with_own
from mlflow_tdeploy.source.resolve import resolve

X = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, 10, (8, 5))


class _Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.eval()


class Clamped(_Module):
    def forward(self, x):
        self.linear.weight.data.clamp_(min=0)
        return self.linear(x)


class Replaced(_Module):
    def forward(self, x):
        self.linear.weight.data = self.linear.weight.data.abs()
        return self.linear(x)


class Noticed(_Module):
    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.clamp_(min=0)
        return self.linear(x)


class Counting(_Module):
    def forward(self, x):
        self.seen += 1
        return self.linear(x)


class Adding(Counting):
    def forward(self, x):
        return super().forward(x) + self.seen


class Bounded(_Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 4, max_norm=1.0)

    def forward(self, ids):
        return self.linear(self.table(ids).sum(1))


class Plain(_Module):
    def forward(self, x):
        return self.linear(x)


CASES = [
    (Clamped, ("linear.weight",), ("linear.weight",)),
    (Replaced, ("linear.weight",), ("linear.weight",)),
    (Noticed, ("linear.weight",), ()),
    (Counting, ("seen",), ()),
    (Bounded, ("table.weight",), ()),
    (Plain, (), ()),
]


def given(kind):
    return {"ids": IDS} if kind is Bounded else {"x": X}


def state(module):
    return {name: (one.data_ptr(), one.detach().clone()) for name, one in module.state_dict().items()}


def same(module, before):
    now = state(module)
    return all(now[name][0] == where and torch.equal(now[name][1], values) for name, (where, values) in before.items())


@pytest.mark.parametrize(("kind", "written", "unnoticed"), CASES)
def test_what_is_written_to_is_named_and_put_back(kind, written, unnoticed):
    module = kind()
    before, kept = state(module), StateKept(module)
    with torch.no_grad(), kept:
        module(**{name: torch.from_numpy(array) for name, array in given(kind).items()})
        assert same(module, before) is not bool(written)
    assert (kept.written, kept.unnoticed) == (written, unnoticed)
    assert same(module, before)


def test_a_copy_has_what_is_written_to_for_itself():
    module = Noticed()
    own = with_own(module, ("linear.weight",))
    assert own.linear.weight is not module.linear.weight
    assert own.linear.bias is module.linear.bias


@pytest.mark.parametrize("kind", [Clamped, Replaced, Noticed, Counting, Bounded])
def test_a_model_is_logged_and_stays_as_it_was(kind, tmp_path):
    """torch 2.13 ends the process (SIGSEGV) where it exports the first two with dynamo."""
    module, feeds = kind(), given(kind)
    before = state(module)
    mlflow_tdeploy.save_model(module, tmp_path / "m", example=feeds, precisions=["fp32"])
    assert same(module, before)
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    with mlflow_tdeploy.load_model(tmp_path / "m") as model:
        np.testing.assert_allclose(model.infer(feeds)["output_0"], expected, atol=1e-5)


def test_asking_with_other_roundings_leaves_no_rounding_behind():
    source = resolve(Bounded(), example=given(Bounded))
    before = state(source.module)
    source.shaken(given(Bounded), 0)
    assert same(source.module, before)


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_training_has_left_behind_is_logged(tmp_path):
    """``weight_norm`` sets the weight before each forward, and torch copies none that gradients go through."""

    class Temporal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.utils.weight_norm(torch.nn.Conv1d(4, 3, 3, padding=1))

        def forward(self, x):
            return self.convolution(x[..., None])[..., 0]

    module = Temporal()
    module(torch.from_numpy(X)).sum().backward()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": X}, precisions=["fp32"])
    module(torch.from_numpy(X)).sum().backward()  # training goes on
    with mlflow_tdeploy.load_model(tmp_path / "m") as model:
        np.testing.assert_allclose(model.infer({"x": X})["output_0"], module(torch.from_numpy(X)).detach(), atol=1e-5)


class Remembering(_Module):
    """Keeps its state, and what was of interest, in containers."""

    def __init__(self):
        super().__init__()
        self.cell, self.hidden, self.maps = torch.nn.LSTM(3, 4, batch_first=True), None, {"seen": []}

    def forward(self, x):
        out, self.hidden = self.cell(self.linear(x)[:, None])
        self.maps["seen"] = [out, (out.mean(),)]
        return out[:, 0]


def test_what_training_has_left_in_containers_is_no_hindrance(tmp_path):
    module = Remembering()
    module(torch.from_numpy(X)).sum().backward()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": X}, precisions=["fp32"])
    assert module.hidden[0].grad_fn is not None
    with mlflow_tdeploy.load_model(tmp_path / "m") as model:
        np.testing.assert_allclose(model.infer({"x": X})["output_0"], module(torch.from_numpy(X)).detach(), atol=1e-5)


def test_what_cannot_be_copied_says_so(tmp_path):
    module = Bounded()
    module.lock = threading.Lock()
    with pytest.raises(MlflowException, match="Bounded cannot be copied .*keep what cannot be copied"):
        mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": X}, precisions=["fp32"])
    assert not (tmp_path / "m").exists()


class Branching(_Module):
    def forward(self, x):
        x = self.linear(x)
        return torch.cond(x.sum() > 0, lambda one: one * 2.0, lambda one: one * 3.0, (x,))


def test_what_torch_compiles_for_a_branch_works_after_it_was_looked_at():
    module, feeds = Branching(), given(Branching)
    source = resolve(module, example=feeds)
    before = source.reference(feeds)["output_0"]
    np.testing.assert_allclose(source.shaken(feeds, 0)["output_0"], before, rtol=1e-4)
    np.testing.assert_array_equal(source.reference(feeds)["output_0"], before)
    np.testing.assert_array_equal(module(torch.from_numpy(X)).detach().numpy(), before)


def test_a_model_that_counts_has_no_answer_to_a_request(tmp_path):
    module = Adding()
    with pytest.raises(MlflowException, match="keeps something from one request to the next"):
        mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": X})
    assert float(module.seen) == 0.0
    assert not (tmp_path / "m").exists()
