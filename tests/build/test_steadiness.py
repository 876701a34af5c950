"""Models whose answer to zeros is only what rounding makes of it, and those that have one."""

from __future__ import annotations

import contextlib
import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from mlflow.exceptions import MlflowException
from onnx import numpy_helper

import mlflow_tdeploy
from mlflow_tdeploy.build.parents import shaken_reference
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.recipes.onnx_fp32 import OnnxFp32
from mlflow_tdeploy.build.steadiness import Steadiness
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.source._shaken import Shaken
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.bundle import Bundle

RANDOM = np.random.default_rng(0)


class Centers(torch.nn.Module):
    """The best five places of a heat map: on a black image all are as good."""

    def __init__(self, *, cut=False):
        super().__init__()
        torch.manual_seed(0)
        self.maps = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()),
            *(torch.nn.Conv2d(16, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()),
        )
        self.heat, self.sizes, self.cut = torch.nn.Conv2d(16, 1, 1), torch.nn.Conv2d(16, 4, 1), cut
        with torch.no_grad():
            for _ in range(20):
                self(torch.rand(32, 3, 32, 32))

    def forward(self, x):
        maps = self.maps(x)
        heat = self.heat(maps).flatten(1)
        scores, places = (heat.relu() if self.cut else heat.sigmoid()).topk(5, dim=1)
        boxes = self.sizes(maps).flatten(2).gather(2, places[:, None].expand(-1, 4, -1))
        return {"scores": scores, "boxes": boxes.transpose(1, 2), "column": (places % maps.shape[3]).float()}


class Instances(torch.nn.Module):
    """Instance norm of what is the same everywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.InstanceNorm2d(8), torch.nn.ReLU()),
            *(torch.nn.Conv2d(8, 16, 3, bias=False), torch.nn.InstanceNorm2d(16), torch.nn.ReLU()),
            *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 8, bias=False)),
        )

    def forward(self, x):
        return torch.nn.functional.normalize(self.features(x), dim=1)


class Speaker(torch.nn.Module):
    """Logarithms of energies, less their mean over time and divided by their deviation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Conv1d(40, 32, 5, padding=2), torch.nn.ReLU())
        self.out = torch.nn.Linear(64, 16)

    def forward(self, x):
        x = torch.log(x + 1e-6)
        x = (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 1e-8)
        x = self.layers(x)
        return self.out(torch.cat([x.mean(2), x.std(2)], 1))


class Pooled(torch.nn.Module):
    """Mean and deviation as the root of E[h²] - E[h]²: at zeros a root of what rounding leaves, or of less than 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.out = torch.nn.Conv1d(20, 4, 5, padding=2), torch.nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        mean = x.mean(2)
        return self.out(torch.cat([mean, ((x * x).mean(2) - mean * mean).sqrt()], 1))


class Branching(torch.nn.Module):
    """Normalised, then of two ways one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out = torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(8, 4)

    def forward(self, x):
        x = self.layer(x)
        x = (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 1e-8)
        rows = torch.cat([x.amax(2), x.amin(2)], 1)
        return self.out(torch.cond(x.sum() > 1e6, lambda one: one * 2.0, lambda one: one * 3.0, (rows,)))


class Levels(torch.nn.Module):
    def __init__(self, epsilon):
        super().__init__()
        torch.manual_seed(0)
        self.out, self.epsilon = torch.nn.Linear(3, 2), epsilon

    def forward(self, x):
        return self.out(torch.log(x.abs() + self.epsilon))


CASES = [
    (Centers(), RANDOM.random((16, 3, 32, 32))),
    (Centers(cut=True), RANDOM.random((16, 3, 32, 32))),
    (Instances(), np.abs(RANDOM.standard_normal((16, 3, 24, 24)))),
    (Speaker(), np.exp(RANDOM.standard_normal((16, 40, 100)) * 2 - 3)),
]
#: Of these only the module is asked: what its graph makes of zeros is luck, too.
OF_TORCH = [
    (Pooled(), np.random.default_rng(0).standard_normal((16, 20, 128))),
    (Branching(), np.random.default_rng(0).standard_normal((16, 4, 102))),
]


class Settling(torch.nn.Module):
    """Goes on until nothing changes any more; with other roundings it always does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        before = x
        while not torch.equal(after := torch.tanh(self.layer(before) * 0.3), before):
            before = after
        return after


def test_what_never_ends_with_other_roundings_is_given_up():
    with torch.no_grad(), Shaken(0), pytest.raises(RuntimeError, match="more than 100000 operators"):
        Settling()(torch.ones(1, 4))


@pytest.mark.parametrize(("module", "given"), OF_TORCH)
def test_a_root_of_rounding_and_a_branch_refuse_no_model(tmp_path, module, given):
    mlflow_tdeploy.save_model(
        module.eval(), tmp_path / "m", example={"x": given.astype(np.float32)}, precisions=["fp32"]
    )


@pytest.mark.parametrize(("module", "given"), CASES)
def test_what_only_rounding_makes_of_zeros_refuses_no_model(tmp_path, caplog, module, given):
    example = {"x": given.astype(np.float32)}
    with caplog.at_level(logging.INFO, "mlflow_tdeploy"):
        mlflow_tdeploy.save_model(module.eval(), tmp_path / "m", example=example, precisions=["fp32"])
    assert "onnx-fp32" in mlflow_tdeploy.load_model(tmp_path / "m").variants


class Replaced(OnnxFp32):
    """The portable graph with one small constant replaced."""

    old, new = 0.0, 0.0

    def run(self, context):
        graph = super().run(context)
        model = onnx.load(graph.path)
        found = 0
        for tensor in [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]:
            array = numpy_helper.to_array(tensor)
            if array.size == 1 and np.isclose(array, self.old, rtol=1e-3, atol=0).all():
                tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, self.new), tensor.name))
                found += 1
        assert found == 1
        onnx.save(model, graph.path)
        return graph


@pytest.mark.parametrize(
    ("epsilon", "new", "told"),
    [
        (1e-9, 0.0, "'output_0' is NaN or infinite where inputs are 0 throughout"),
        (1e-12, 0.0, "'output_0' is NaN or infinite where inputs are 0 throughout"),
        (1e-9, 1e-6, "where inputs are 0 throughout, .* Zeros are held against the budget's limits for one request"),
        (1e-12, 1e-7, "where inputs are 0 throughout, .* Zeros are held against the budget's limits for one request"),
    ],
)
def test_what_a_model_has_to_say_of_zeros_is_held_against_it(tmp_path, monkeypatch, epsilon, new, told):
    monkeypatch.setattr(Replaced, "old", epsilon)
    monkeypatch.setattr(Replaced, "new", new)
    RECIPES.names()
    monkeypatch.setitem(RECIPES._items, "onnx-fp32", Replaced)
    example = {"x": np.sign(RANDOM.standard_normal((64, 3))).astype(np.float32)}
    with pytest.raises(MlflowException, match=told):
        mlflow_tdeploy.save_model(Levels(epsilon).eval(), tmp_path / "m", example=example, precisions=["onnx-fp32"])


class Beside(torch.nn.Module):
    """In one output what only rounding makes of zeros, and what is the model's own."""

    def __init__(self):
        super().__init__()
        self.own = Levels(1e-9)

    def forward(self, x):
        y = x + 0.1
        return torch.cat([self.own(x), (y - y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-9)], 1)


@pytest.mark.parametrize("new", [1e-9, 1e-7])
def test_beside_what_only_rounding_makes_the_rest_is_held_against_it(tmp_path, monkeypatch, new):
    module, zeros = Beside().eval(), np.zeros((2, 3), np.float32)
    example = {"x": np.sign(RANDOM.standard_normal((64, 3))).astype(np.float32)}
    with contextlib.closing(resolve(module, example=example)) as source:
        task = TASKS.get(source.task)(source.task_config, source.signature, tmp_path)
        steadiness, feeds = Steadiness(task, source.shaken), {"x": zeros}
        reference = source.reference(feeds)
        own, noise = np.split(reference["output_0"], [2], axis=1)
        got = {"output_0": np.concatenate([own + (new - 1e-9) * 1e6, -noise], axis=1)}
        excused = steadiness.excused(feeds, reference, got, task.usual_budget())["output_0"]
    np.testing.assert_array_equal(excused[:, 2:], noise)
    np.testing.assert_array_equal(excused[:, :2], got["output_0"][:, :2])


class Careful(torch.nn.Module):
    """What is exact stays so: places made of floats, decisions by what is 0, tables."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 4)
        self.register_buffer("state", torch.ones(3))

    def forward(self, x):
        places = (x.clone() * 2).floor()
        there = (x * 3.3).abs().sum(1, keepdim=True) != 0
        self.state[0] = x[0, 0]
        parts = x.reshape(-1).split(3)
        return self.table(places[:, 0].long()) * there, torch.cat(parts), x.sum()


def test_other_roundings_change_nothing_that_is_exact():
    module, x = Careful().eval(), torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    with torch.inference_mode():
        plain = module(x)
        with Shaken(0):
            shaken = module(x)
    for one, other in zip(plain, shaken, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    assert module.table.weight.requires_grad
    assert torch.equal(x, torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))


def exported(module, given, path):
    """A graph that torch's older exporter makes of a module, with its weights beside it."""
    x = torch.tensor(given[:2].astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch"}}
        torch.onnx.export(module.eval(), (x,), path, input_names=["x"], dynamo=False, dynamic_axes=axes)
    onnx.save(onnx.load(path), path, save_as_external_data=True, size_threshold=0, location="weights")
    return path


@pytest.mark.parametrize(("module", "given"), CASES)
def test_a_graph_is_asked_with_other_roundings_too(tmp_path, module, given):
    path = exported(module, given, tmp_path / "model.onnx")
    zeros, given = {"x": np.zeros_like(given[:1], np.float32)}, {"x": given[:8].astype(np.float32)}
    with contextlib.closing(resolve(path, example=given)) as source:
        task = TASKS.get(source.task)(source.task_config, source.signature, tmp_path)
        steadiness, budget = Steadiness(task, source.shaken), task.usual_budget()
        assert steadiness._unsteady(zeros, source.reference(zeros), budget)
        if isinstance(module, Speaker):  # of noise no two places are as good
            assert not steadiness._unsteady(given, source.reference(given), budget)


@pytest.mark.parametrize("epsilon", [1e-7, 1e-9, 1e-12])
def test_an_epsilon_of_a_graph_makes_zeros_an_answer_of_its_own(tmp_path, epsilon):
    path = exported(Levels(epsilon), RANDOM.standard_normal((8, 3)), tmp_path / "model.onnx")
    zeros = {"x": np.zeros((1, 3), np.float32)}
    with contextlib.closing(resolve(path, example={"x": np.ones((4, 3), np.float32)})) as source:
        (plain,), (shaken,) = source.reference(zeros).values(), source.shaken(zeros, 0).values()
        assert not np.array_equal(shaken, plain)
        np.testing.assert_allclose(shaken, plain, rtol=1e-5)


def test_a_variant_that_is_added_later_is_held_against_a_reference_of_that_kind(tmp_path):
    module, given = CASES[3]
    mlflow_tdeploy.save_model(
        module.eval(), tmp_path / "m", example={"x": given.astype(np.float32)}, precisions=["onnx-fp32"]
    )
    mlflow_tdeploy.extend_model(str(tmp_path / "m"), precisions=["ort-cpu-fp32"])
    assert "ort-cpu-fp32" in mlflow_tdeploy.load_model(tmp_path / "m").variants
    bundle = Bundle.open(tmp_path / "m")
    zeros = {"x": np.zeros((1, 40, 100), np.float32)}
    shaken = shaken_reference(bundle, "onnx-fp32")
    assert shaken is not None
    first, second = (shaken(zeros, seed)["output_0"] for seed in range(2))
    assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("budget", [None, "max_difference <= 1e-4", "max_difference <= 2e-6"])
def test_a_strict_budget_excuses_no_lost_epsilon(tmp_path, monkeypatch, budget):
    """Where rounding alone is over the budget, what is far beyond rounding is so all the same."""
    monkeypatch.setattr(Replaced, "old", 1e-9)
    monkeypatch.setattr(Replaced, "new", 1e-6)
    RECIPES.names()
    monkeypatch.setitem(RECIPES._items, "onnx-fp32", Replaced)
    example = {"x": np.sign(RANDOM.standard_normal((64, 3))).astype(np.float32)}
    with pytest.raises(MlflowException, match="where inputs are 0 throughout"):
        mlflow_tdeploy.save_model(
            Levels(1e-9).eval(), tmp_path / "m", example=example, precisions=["onnx-fp32"], budget=budget
        )
