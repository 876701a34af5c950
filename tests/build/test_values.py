"""What depends on the values that come in: epsilons, decisions, states that begin with 0, missing values."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import mlflow
import numpy as np
import onnx
import pytest
import torch
from mlflow.exceptions import MlflowException
from onnx import TensorProto, helper, numpy_helper

import mlflow_tdeploy
from mlflow_tdeploy.build import _torch_exporters
from mlflow_tdeploy.build._torch_exporters import decisions
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


class Floors(torch.nn.Module):
    """An epsilon of another form: one for each band, or one with axes."""

    def __init__(self, floors):
        super().__init__()
        self.out = torch.nn.Linear(3, 2)
        self.register_buffer("floors", floors)

    def forward(self, x):
        return self.out(torch.log10(x * x + self.floors))


class Sound(torch.nn.Module):
    """Whole numbers of 16 bits as numbers up to 1."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.out(x / 32768.0)


class Scaled(torch.nn.Module):
    """What comes in is brought into range in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.out, self.how = torch.nn.Linear(3, 2), how

    def forward(self, x):
        return torch.tanh(self.out(self.how(x)))


class Recommender(torch.nn.Module):
    """Attends to what is present of a history."""

    def __init__(self):
        super().__init__()
        self.table, self.query, self.out = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.Linear(16, 1)

    def forward(self, history, present, item):
        past, wanted = self.table(history), self.table(item)
        scores = (past * self.query(wanted)[:, None]).sum(-1) + (1 - present) * -1e9
        user = (scores.softmax(1)[..., None] * past).sum(1)
        return torch.sigmoid(self.out(torch.cat([user, wanted], 1)))


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


class Missing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.cat([torch.nan_to_num(x), torch.isnan(x).float()], 1))


def tensors_task():
    x, y = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch", 3))
    return TASKS.get("tensors")({}, Signature((Dim("batch", 1, 8, 16),), (x,), (y,)), Path())


@pytest.mark.parametrize("epsilon", [1e-7, 1e-9, 1e-12])
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
    "floors", [torch.tensor([[1e-10]]), torch.tensor([1e-10, 1e-9, 1e-8]), torch.full((1, 3), 1e-9)]
)
def test_an_epsilon_of_any_form_is_none_of_half_precision(tmp_path, floors):
    module = Floors(floors).eval()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": ROWS}, precisions=["fp32", "fp16"])
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.zeros(2, 3)).detach().numpy()
    np.testing.assert_allclose(model.infer({"x": np.zeros((2, 3), np.float32)})["output_0"], expected, rtol=0.01)


def test_a_scale_beyond_what_masks_are_limited_to_stays(tmp_path):
    module, waves = Sound().eval(), (3000 * ROWS).round()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": waves}, precisions=["fp32", "fp16"])
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.tensor(waves)).detach().numpy()
    np.testing.assert_allclose(model.infer({"x": waves})["output_0"], expected, atol=2e-3)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        (lambda x: x / 65535.0, 65535),
        (lambda x: (x - torch.tensor([45.0, 30000.0, 5.0])) / torch.tensor([15.0, 12000.0, 2.0]), 80000),
        (lambda x: (x - 8000.0) / 9000.0, 80000),
        (lambda x: (x.unsqueeze(1).transpose(1, 2) * 1e-4).flatten(1), 80000),
        (lambda x: (x[:, [2, 1, 0]] - torch.tensor([5.0, 30000.0, 45.0])) / torch.tensor([2.0, 12000.0, 15.0]), 80000),
        (lambda x: (x - torch.tensor([45.0, -30000.0, 5.0])) / torch.tensor([15.0, 12000.0, 2.0]), 80000),
    ],
)
def test_what_half_precision_does_not_hold_is_scaled_before(tmp_path, how, most):
    module, rows = Scaled(how).eval(), (np.abs(ROWS) % 1 * 50000).round()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": rows}, precisions=["fp32", "fp16"])
    rows[:, 1] = most
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.tensor(rows)).detach().numpy()
    np.testing.assert_allclose(model.infer({"x": rows})["output_0"], expected, atol=5e-3)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        (lambda x: x.float() / 65535.0, 65535),
        (lambda x: (x.float() - torch.tensor([45.0, 30000.0, 5.0])) / torch.tensor([15.0, 12000.0, 2.0]), 80000),
        (lambda x: x.float() - x.float().mean(1, keepdim=True), 80),
        (lambda x: x / x.sum(1, keepdim=True).clamp(min=1), 81),
        (lambda x: (x > 10000).float() / (x > 10000).sum(1, keepdim=True).clamp(min=1), 80000),
        (lambda x: x.float().topk(3, dim=1).indices.float() / 3.0 + x.float() * 1e-5, 80000),
    ],
)
def test_whole_numbers_are_brought_into_range_before_half_precision(tmp_path, how, most):
    module, rows = Scaled(how).eval(), (np.abs(ROWS) % 1 * min(most, 50000)).astype(np.int32 if most % 2 else np.int64)
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": rows}, precisions=["fp32", "fp16"])
    rows[:, 1] = most
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.tensor(rows)).detach().numpy()
    np.testing.assert_allclose(model.infer({"x": rows})["output_0"], expected, atol=1e-2)


class Places(torch.nn.Module):
    """Columns of one type, the first of them the number of a thing or of its range; it goes out, too."""

    def __init__(self, of):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out, self.of = torch.nn.Embedding(20000, 8), torch.nn.Linear(10, 2), of

    def forward(self, x):
        return {"number": x[:, 0], "score": self.out(torch.cat([self.table(self.of(x[:, 0])), x[:, 1:]], 1))}


@pytest.mark.parametrize(
    ("of", "asked"),
    [
        (lambda x: x.long(), [5, 2049, 5003, 12345]),
        (lambda x: (x / 1000.0).long(), [99990, 109990, 75000, 149950]),
        (lambda x: (x > 2048).long() + 2 * (x == 5003).long(), [2048, 2049, 5003, 5004]),
    ],
)
def test_numbers_that_are_places_are_no_half_numbers(tmp_path, of, asked):
    module = Places(of).eval()
    random = np.random.default_rng(0)
    rows = np.concatenate([random.integers(0, 2000, (64, 1)), random.standard_normal((64, 2))], 1).astype(np.float32)
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": rows}, precisions=["fp32", "fp16"])
    rows = np.concatenate([np.array([asked]).T, rows[:4, 1:]], 1).astype(np.float32)
    got = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"}).infer({"x": rows})
    expected = module(torch.tensor(rows))
    np.testing.assert_array_equal(got["number"], rows[:, 0])
    np.testing.assert_allclose(got["score"], expected["score"].detach().numpy(), atol=1e-2)


class Joined(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def forward(self, age, income):
        rows = torch.cat([age, income], 1)
        return self.out((rows - torch.tensor([45.0, 30000.0])) / torch.tensor([15.0, 12000.0]))


def test_inputs_that_are_joined_are_brought_into_range_before_half_precision(tmp_path):
    module, random = Joined().eval(), np.random.default_rng(0)
    given = {"age": random.uniform(18, 80, (64, 1)), "income": random.uniform(5000, 50000, (64, 1))}
    given = {name: array.astype(np.float32) for name, array in given.items()}
    mlflow_tdeploy.save_model(module, tmp_path / "m", example=given, precisions=["fp32", "fp16"])
    given["income"][:] = 80000
    got = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"}).infer(given)
    expected = module(*map(torch.tensor, given.values())).detach().numpy()
    np.testing.assert_allclose(got["output_0"], expected, atol=1e-2)


def test_a_mask_that_is_multiplied_stays_finite_in_half_precision(tmp_path):
    torch.manual_seed(0)  # of others, what is near at zeros in fp16 may be over the budget
    module, random = Recommender().eval(), np.random.default_rng(0)
    present = (np.arange(10) < random.integers(1, 11, 32)[:, None]).astype(np.float32)
    example = {"history": random.integers(0, 50, (32, 10)), "present": present, "item": random.integers(0, 50, 32)}
    mlflow_tdeploy.save_model(module, tmp_path / "m", example=example, precisions=["fp32", "fp16"])
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(**{name: torch.tensor(array) for name, array in example.items()}).detach().numpy()
    np.testing.assert_allclose(model.infer(example)["output_0"], expected, atol=2e-3)
    example["present"] = np.zeros_like(present)  # who has seen nothing yet
    assert np.isfinite(model.infer(example)["output_0"]).all()


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


def test_a_decision_by_values_is_told_and_what_it_loses_is_found(tmp_path, caplog):
    torch.manual_seed(1)
    rows = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    with pytest.raises(MlflowException) as error:
        mlflow_tdeploy.save_model(EarlyExit().eval(), tmp_path / "m", example={"x": rows}, precisions=["fp32"])
    assert "is over the model's budget" in str(error.value)
    assert "The module decides by values at test_values.py:" in str(error.value)
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
    assert all(place.startswith("test_values.py:") for place in found)
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
