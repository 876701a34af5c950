"""Static int8: explicit Q/DQ that ONNX Runtime runs and TensorRT builds from, within the budget."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.build.calibration import CalibrationData
from mlflow_tdeploy.build.engine_options import EngineOptions
from mlflow_tdeploy.build.engine_variant import build_engine_variant
from mlflow_tdeploy.build.extend import build_variant
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BudgetError, BuildError
from mlflow_tdeploy.source.resolve import resolve
from tests.build.building import accuracy, build
from tests.build.test_int8_mixed import LAYERS, PLANTED, WIDTH, Planted

FP32 = BuildOptions(measure=False, precisions=("fp32",))


class Delicate(Planted):
    """Layers of which one takes a small difference of large numbers, which eight bits do not hold."""

    def __init__(self) -> None:
        super().__init__(())
        with torch.no_grad():
            self.layers[PLANTED].weight += 40

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            y = layer(x)
            if index == PLANTED:
                y = y - 40 * x.sum(dim=1, keepdim=True)
            x = torch.tanh(y) if index == LAYERS - 1 else torch.relu(y) + 0.1
        return x


class Weightless(torch.nn.Module):
    """Nothing to quantize."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, dim=1)


class Convolutions(torch.nn.Module):
    """Two convolutions with a residual, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.last = torch.nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(pixels))
        return self.last((x + torch.relu(self.second(x))).mean(dim=(2, 3)))


def requests(count=6, rows=8):
    random = np.random.default_rng(2)
    return [{"x": random.normal(size=(rows, WIDTH)).astype(np.float32)} for _ in range(count)]


def int8_of(module, folder, given, options=None, shapes=None):
    source = resolve(module, example=given[0], shapes=shapes or {"batch": (1, 8, 16)})
    chosen = options or BuildOptions(measure=False, precisions=("onnx-int8",), data=VerifyData.of(given))
    _, bundle = build(source, folder, chosen)
    return bundle, bundle.variants["onnx-int8"]


def operators(bundle, variant):
    return Counter(node.op_type for node in onnx.load(bundle.path(variant.entry)).graph.node)


@pytest.fixture(scope="module")
def delicate(tmp_path_factory):
    return int8_of(Delicate(), tmp_path_factory.mktemp("delicate") / "model", requests())


def test_the_delicate_product_stays_fp32_and_no_other(delicate):
    bundle, made = delicate
    assert not made.dropped
    assert accuracy(bundle, "onnx-int8").passed
    assert len(made.precision.kept) == 1
    found = operators(bundle, made)
    assert (found["MatMul"], found["QuantizeLinear"], found["DequantizeLinear"]) == (LAYERS, LAYERS - 1, 2 * LAYERS - 2)
    assert (made.format, made.device, made.parent) == ("onnx", "any", "onnx-fp32")


def test_it_is_of_standard_operators_with_int8_weights(delicate):
    bundle, made = delicate
    model = onnx.load(bundle.path(made.entry))
    assert all(node.domain in ("", "ai.onnx") for node in model.graph.node)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2]
    assert len(weights) == LAYERS - 1
    zeros = [one for one in model.graph.initializer if one.name.endswith("_zero_point")]
    assert all(not onnx.numpy_helper.to_array(one).any() for one in zeros), "engines take symmetric ranges only"


def test_its_record_tells_how_it_came_to_be(delicate):
    _, made = delicate
    settings = made.precision.settings
    assert settings["calibrator"] in ("max", "percentile", "mse", "entropy")
    assert settings["calibration"]["items"] == 6
    whole = [one for one in settings["trials"] if "0 in fp32" in one["what"] and "distance" in one]
    assert {one["what"].partition(",")[0] for one in whole} == {"max", "percentile", "mse", "entropy"}
    assert min(whole, key=lambda one: one["distance"])["what"].startswith(settings["calibrator"])
    assert [one["passed"] for one in settings["trials"] if "passed" in one] == [
        False,
        True,
        True,
    ]  # nothing spared, all, as few as needed
    assert made.session["disabled_optimizers"] == ["CommonSubexpressionElimination"]


def test_the_same_data_gives_the_same_bytes(delicate, tmp_path):
    _, again = int8_of(Delicate(), tmp_path / "model", requests())
    assert again.digest == delicate[1].digest


def test_convolutions_are_quantized_and_the_residual_is_not(tmp_path):
    random = np.random.default_rng(0)
    given = [{"pixels": random.normal(size=(2, 3, 8, 8)).astype(np.float32)} for _ in range(6)]
    bundle, made = int8_of(Convolutions(), tmp_path / "model", given, shapes={"batch": (1, 2, 4)})
    assert not made.dropped
    model = onnx.load(bundle.path(made.entry))
    rounded = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    taken = {node.op_type: [name in rounded for name in node.input[:2]] for node in model.graph.node}
    assert taken["Conv"] == [True, True]
    assert taken["MatMul"] == [True, True]
    assert not any(taken["Add"])


def test_made_up_requests_and_graphs_without_weights_say_so(tmp_path):
    module = Planted(())
    options = BuildOptions(measure=False, precisions=("onnx-int8",), data=VerifyData.of(requests()))
    with pytest.raises(BuildError, match="nothing to quantize"):
        int8_of(Weightless(), tmp_path / "softmax", requests(), options)
    _, bundle = build(resolve(module, example=requests()[0], shapes={"batch": (1, 8, 16)}), tmp_path / "made", FP32)
    built = build_variant(bundle, "onnx-int8", tmp_path, BuildOptions(measure=False))  # on the golden requests
    assert not built.variant.dropped


def test_a_budget_that_leaves_nothing_says_so(tmp_path):
    options = BuildOptions(measure=False, precisions=("fp32",), budget=Budget.of("worst_cosine >= 0.9999999"))
    _, bundle = build(resolve(Delicate(), example=requests()[0], shapes={"batch": (1, 8, 16)}), tmp_path / "m", options)
    with pytest.raises(BudgetError, match="No product of this graph can be quantized within the budget"):
        build_variant(bundle, "onnx-int8", tmp_path, BuildOptions(measure=False, data=VerifyData.of(requests(count=2))))
    assert "onnx-int8" not in bundle.variants


def test_tensorrt_builds_an_engine_from_it(delicate, tmp_path):
    """TensorRT-RTX, whose builder needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    bundle, _ = delicate
    engine = build_engine_variant(
        bundle, EngineOptions("int8", module="tensorrt_rtx"), tmp_path, BuildOptions(measure=False)
    )
    assert engine.variant.parent == "onnx-int8"
    assert engine.variant.precision.name == "int8"


def test_inputs_that_are_0_throughout_have_no_range(tmp_path):
    zeros = [{name: np.zeros_like(array) for name, array in one.items()} for one in requests(count=20)]
    options = BuildOptions(
        measure=False, precisions=("onnx-int8",), data=VerifyData.of(requests()), calibrate=CalibrationData.of(zeros)
    )

    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.only = torch.nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.only(x)

    with pytest.raises(BuildError, match="all inputs of products are 0 throughout the"):
        int8_of(Alone(), tmp_path / "model", requests(), options)


def files_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_search_that_is_interrupted_leaves_nothing_and_begins_anew(tmp_path):
    given = requests()
    mlflow_tdeploy.save_model(
        Delicate(), tmp_path / "model", example=given[0], shapes={"batch": (1, 8, 16)}, precisions=["fp32"],
        verify_with=given,
    )  # fmt: skip
    before, tried = files_below(tmp_path), []

    def interrupt(step):
        if step.name.startswith("  try"):
            tried.append(step)
            if len(tried) == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlflow_tdeploy.extend_model(
            str(tmp_path / "model"), precisions=["onnx-int8"], verify_with=given, progress=interrupt
        )
    assert len(tried) == 6
    assert files_below(tmp_path) == before
    (made,) = mlflow_tdeploy.extend_model(str(tmp_path / "model"), precisions=["onnx-int8"], verify_with=given)
    _, whole = int8_of(Delicate(), tmp_path / "whole", given)
    assert (made.dropped, made.precision.kept) == (False, whole.precision.kept)


def test_a_search_ends_after_so_many_graphs(tmp_path):
    options = BuildOptions(
        measure=False, precisions=("onnx-int8",), data=VerifyData.of(requests()), search_trials=5
    )  # fmt: skip
    _, made = int8_of(Delicate(), tmp_path / "model", requests(), options)
    trials = made.precision.settings["trials"]
    assert len([one for one in trials if "distance" in one]) == 4, "the calibrators, and nothing by parts"
    assert len(made.precision.kept) > 1, "without knowing which one matters more have to be spared"
    assert not made.dropped


@pytest.mark.parametrize("given", [{"search_seconds": -1}, {"search_trials": float("nan")}, {"search_seconds": "long"}])
def test_a_bound_that_is_none_is_refused(tmp_path, given):
    with pytest.raises(MlflowException, match=f"{next(iter(given))} must be a number of at least"):
        mlflow_tdeploy.save_model(Delicate(), tmp_path / "model", example=requests()[0], **given)
    assert not (tmp_path / "model").exists()


class Residual(torch.nn.Module):
    """A block with a way around its only product that takes what went in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.inner.weight *= 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() + self.outer(torch.relu(self.inner(x.tanh())))


def test_what_goes_around_a_product_is_not_rounded(tmp_path):
    bundle, made = int8_of(Residual(), tmp_path / "model", requests())
    graph = onnx.load(bundle.path(made.entry)).graph
    rounded = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    takers = {node.op_type for node in graph.node if rounded & {*node.input}}
    assert takers <= {"MatMul", "Gemm"}
    trials = made.precision.settings["trials"]
    assert max(one["distance"] for one in trials if "distance" in one) < 0.001, "of the residual alone it were 0.004"
