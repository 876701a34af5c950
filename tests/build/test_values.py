"""What depends on the values that come in: epsilons, zeros, states that begin with 0, missing values."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import onnx
import pytest
import torch
from mlflow.exceptions import MlflowException
from onnx import TensorProto, helper, numpy_helper

import mlflow_tdeploy
from mlflow_tdeploy.build.exact_rules import exact_rules
from mlflow_tdeploy.build.graphs import op_counts, simplify
from mlflow_tdeploy.build.reference import ReferenceAnswers
from mlflow_tdeploy.build.verify import verify
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.golden import GoldenRequest, check_golden
from mlflow_tdeploy.core.made_up import make_up
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source.resolve import resolve

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((64, 3)).astype(np.float32)


class Levels(torch.nn.Module):
    """Logarithms of levels, of which silence has one, too."""

    def __init__(self, epsilon):
        super().__init__()
        self.out, self.epsilon = torch.nn.Linear(3, 2), epsilon

    def forward(self, x):
        return self.out(torch.log(x.abs() + self.epsilon))


class Online(torch.nn.Module):
    """A running mean, which is nothing at first."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(3, 2)

    def forward(self, x, count, mean):
        count = count + 1
        mean = mean + (x - mean) / count
        return self.out(x - mean), mean, count


class Holiday(torch.nn.Module):
    """A float that is made a place in a table."""

    def __init__(self):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(3, 4), torch.nn.Linear(7, 2)

    def forward(self, x, holiday):
        return self.out(torch.cat([x, self.table(holiday.long())], 1))


class Missing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.cat([torch.nan_to_num(x), torch.isnan(x).float()], 1))


def tensors_task():
    x, y = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch", 3))
    return TASKS.get("tensors")({}, Signature((Dim("batch", 1, 8, 16),), (x,), (y,)), Path())


@pytest.mark.parametrize(
    "epsilon", [pytest.param(1e-7, marks=pytest.mark.slow), pytest.param(1e-9, marks=pytest.mark.slow), 1e-12]
)
def test_an_epsilon_stays_in_every_variant(tmp_path, epsilon):
    module, silence = Levels(epsilon).eval(), {"x": np.zeros((2, 3), np.float32)}
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": ROWS})
    expected = module(torch.zeros(2, 3)).detach().numpy()
    variants = mlflow_tdeploy.load_model(tmp_path / "m").variants
    assert {"onnx-fp32", "onnx-fp16", "ort-cpu-fp32"} <= set(variants)
    for variant in variants:
        model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": variant})
        np.testing.assert_allclose(model.infer(silence)["output_0"], expected, rtol=0.03, atol=0.05)


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (Online(), {"count": np.zeros((64, 1), np.float32), "mean": np.zeros((64, 3), np.float32)}),
        (Holiday(), {"holiday": np.zeros(64, np.float32)}),
    ],
)
def test_zeros_beside_numbers_are_asked_with_what_such_inputs_take(tmp_path, module, more):
    mlflow_tdeploy.save_model(module.eval(), tmp_path / "m", example={"x": ROWS, **more})
    assert {"onnx-fp32", "onnx-fp16", "ort-cpu-int8"} <= set(mlflow_tdeploy.load_model(tmp_path / "m").variants)


def test_lengths_are_found_where_the_least_size_spreads(tmp_path):
    class Trimmed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(20, 4)

        def forward(self, ids, lengths):
            longest = int(lengths.max())
            keep = torch.arange(longest) < lengths[:, None]
            return (self.table(ids[:, :longest]) * keep[..., None]).sum(1)

    example = {"ids": RANDOM.integers(0, 20, (8, 12)), "lengths": RANDOM.integers(1, 13, 8)}
    source = resolve(Trimmed().eval(), example=example, shapes={"ids.1": "t", "t": (1, 12, 40)})
    assert source.task_config["lengths"] == {"lengths": "t"}


def graph_with(path, operator, number):
    """A graph of one operator on a constant."""
    constant = numpy_helper.from_array(np.array(number, np.float32), "c")
    nodes = [helper.make_node(operator, ["x", "c"], ["y"]), helper.make_node("Log", ["y"], ["z"])]
    form = [("x", "z")[place] for place in (0, 1)]
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in form)
    graph = helper.make_graph(nodes, "g", [x], [z], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("operator", "number", "left"),
    [("Add", 1e-9, 1), ("Sub", -1e-9, 1), ("Mul", 1 + 1e-6, 1), ("Add", 0.0, 0), ("Mul", 1.0, 0)],
)
def test_only_what_does_nothing_is_removed(tmp_path, operator, number, left):
    simplify(graph_with(tmp_path / "a.onnx", operator, number), tmp_path / "b.onnx")
    assert op_counts(tmp_path / "b.onnx").get(operator, 0) == left


def test_the_rules_are_as_they_were_afterwards():
    from onnxscript.rewriter.rules.common import _no_op

    def tolerances():
        return [
            value._abs_tol
            for rule in _no_op.rules
            for node in rule._target_pattern
            for value in node.inputs
            if hasattr(value, "_abs_tol")
        ]

    before = tolerances()
    with exact_rules():
        assert set(tolerances()) == {0.0}
    assert tolerances() == before
    assert before
    assert before[0] > 0


def test_a_variant_that_is_lost_on_zeros_is_found(tmp_path):
    """An ONNX source whose given variant lacks the epsilon that the other one has."""
    task = tensors_task()
    data = VerifyData.of([{"x": np.abs(ROWS)[:16]}]).for_task(task)
    answers = ReferenceAnswers(task, data, lambda feeds: {"y": np.log(feeds["x"] + 1e-6)}, tmp_path)
    with np.errstate(divide="ignore"):
        without = verify(answers, lambda feeds: {"y": np.log(feeds["x"])}, task.usual_budget())
    assert any("'y' is NaN or infinite where inputs are 0 throughout" in one for one in without.violations)
    assert verify(answers, lambda feeds: {"y": np.log(feeds["x"] + 1.1e-6)}, task.usual_budget()).passed
    other = verify(answers, lambda feeds: {"y": np.log(feeds["x"] + 1e-4)}, task.usual_budget())
    assert any("where inputs are 0 throughout, max_norm_difference" in one for one in other.violations)
    assert (without.is_close, other.is_close) == (False, True)  # a wider budget would allow that


def test_what_a_stream_begins_with_is_asked_with_other_values_too():
    specs = [TensorSpec("x", "float32", ("batch", 2)), TensorSpec("h0", "float32", ("batch", 4))]
    shapes = {"x": (8, 2), "h0": (8, 4)}
    example = {"x": np.ones((4, 2), np.float32) * [[1.0, 2.0]], "h0": np.zeros((4, 4), np.float32)}
    example["x"] = example["x"].astype(np.float32)
    dense, ragged = (
        make_up(specs, shapes, [example], {}, ragged=one, random=np.random.default_rng(0)) for one in (False, True)
    )
    assert not dense["h0"].any()
    assert 0 <= ragged["h0"].min() < 0.2 < 0.8 < ragged["h0"].max() < 1
    assert set(np.unique(ragged["x"])) == {1.0, 2.0}


def test_a_model_that_knows_missing_values_serves_them(tmp_path):
    rows = RANDOM.standard_normal((32, 3)).astype(np.float32)
    rows[::3, 1] = np.nan
    module = Missing().eval()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": rows})
    served = mlflow.pyfunc.load_model(str(tmp_path / "m")).predict({"x": rows})["output_0"]
    np.testing.assert_allclose(served, module(torch.tensor(rows)).detach().numpy(), rtol=0.02, atol=0.02)
    assert "onnx-fp16" in mlflow_tdeploy.load_model(tmp_path / "m").variants

    mlflow_tdeploy.save_model(Levels(1e-6).eval(), tmp_path / "n", example={"x": ROWS})
    with pytest.raises(MlflowException, match="logged with an example that has some"):
        mlflow.pyfunc.load_model(str(tmp_path / "n")).predict({"x": rows})


def test_a_budget_that_says_nothing_of_one_request_tells_whose_limits_hold():
    task = tensors_task()
    request = GoldenRequest({}, {"x": ROWS[:1]}, {"y": ROWS[:1]}, {})
    for budget, told in (("mean_cosine >= 0.9", True), ("worst_cosine >= 0.9", False)):
        why = check_golden(task, Budget.of(budget), [request], lambda feeds: {"y": -feeds["x"]})
        assert why is not None
        assert ("so the task's own holds for golden requests: state a limit for that, too" in why) is told
