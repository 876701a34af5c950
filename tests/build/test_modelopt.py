"""Recipes by NVIDIA's Model Optimizer: int8, fp8, int4 and strongly typed half precision, within the budget."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import onnx
import pytest
import torch
from mlflow.exceptions import MlflowException
from onnx import TensorProto

import mlflow_tdeploy
from mlflow_tdeploy.build import modelopt
from mlflow_tdeploy.build.engine_options import EngineOptions
from mlflow_tdeploy.build.engine_variant import build_engine_variant
from mlflow_tdeploy.build.explicit import rounded
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import MissingDependencyError
from mlflow_tdeploy.source.resolve import resolve
from tests.build.building import accuracy, build
from tests.build.test_fake_quant import Block, arrays
from tests.build.test_int8_mixed import WIDTH
from tests.build.test_onnx_int8 import Delicate, requests

if importlib.util.find_spec("modelopt") is None:
    pytest.skip("no nvidia-modelopt", allow_module_level=True)
WIDE = Budget.of("worst_cosine >= 0.5")


def made(recipe, module, folder, given, budget=WIDE):
    options = BuildOptions(measure=False, precisions=("fp32", recipe), data=VerifyData.of(given), budget=budget)
    source = resolve(module, example=given[0], shapes={"batch": (1, 8, 16)})
    _, bundle = build(source, folder, options)
    return bundle, bundle.variants[recipe]


def types(bundle, variant):
    graph = onnx.load(bundle.path(variant.entry)).graph
    return {one.data_type for one in graph.initializer if len(one.dims) >= 2}, graph


@pytest.mark.parametrize(
    ("recipe", "kind", "device"),
    [
        ("onnx-int8-modelopt", TensorProto.INT8, "any"),
        ("onnx-fp8-modelopt", TensorProto.FLOAT8E4M3FN, "cuda"),
        ("onnx-int4-modelopt", TensorProto.INT4, "any"),
        ("onnx-int8-smoothquant-modelopt", TensorProto.INT8, "any"),
    ],
)
def test_weights_are_stored_in_few_bits_and_answers_are_checked(tmp_path, recipe, kind, device):
    bundle, variant = made(recipe, Block(), tmp_path / "model", arrays(4, 6, WIDTH))
    found, graph = types(bundle, variant)
    assert kind in found
    floats = {one.name for one in graph.initializer if one.data_type == TensorProto.FLOAT}
    assert not [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in floats]
    assert all(node.domain in ("", "ai.onnx") for node in graph.node)
    assert (variant.device, variant.format, variant.precision.name) == (device, "onnx", recipe.split("-")[1])
    verdict = accuracy(bundle, recipe)
    assert verdict.passed
    assert verdict.metrics["worst_cosine"] < 0.99999999, "it is rounded where it is checked"
    products = variant.precision.settings["products"]
    assert list(products.values()) == [RECIPES.get(recipe).form] * len(products)
    assert len(products) >= 4
    assert "not_as_asked" not in variant.precision.settings
    trials = variant.precision.settings["trials"]
    assert {one["what"].partition(",")[0] for one in trials} == set(RECIPES.get(recipe).calibrators)


@pytest.mark.parametrize(
    "recipe",
    [
        "onnx-int8-modelopt",
        pytest.param("onnx-int4-modelopt", marks=pytest.mark.slow),
        pytest.param("onnx-int8-smoothquant-modelopt", marks=pytest.mark.slow),
    ],
)
def test_what_is_over_the_budget_is_spared_and_little_else(tmp_path, recipe):
    bundle, variant = made(recipe, Delicate(), tmp_path / "model", requests(), Budget.of("worst_cosine >= 0.99"))
    assert accuracy(bundle, recipe).passed
    assert 1 <= len(variant.precision.kept) <= 2
    found, graph = types(bundle, variant)
    kept = {node.name: node for node in graph.node if node.name in variant.precision.kept}
    fp32 = {one.name for one in graph.initializer if one.data_type == TensorProto.FLOAT}
    assert found == {TensorProto.FLOAT, TensorProto.INT8 if "int8" in recipe else TensorProto.INT4}
    assert all(node.input[1] in fp32 for node in kept.values() if node.op_type == "MatMul")
    assert not set(kept) & set(rounded(bundle.path(variant.entry)))


def test_what_it_says_of_sizes_in_half_precision_is_forgotten(tmp_path):
    """It gives sizes that differ one name, and ONNX Runtime shares memory by names: ModernBERT failed so."""
    bundle, variant = made("onnx-fp16-modelopt", Block(), tmp_path / "model", arrays(4, 6, WIDTH))
    graph = onnx.load(bundle.path(variant.entry), load_external_data=False).graph
    assert not {name for node in graph.node for name in node.output} & {value.name for value in graph.value_info}


def test_half_precision_is_typed_and_takes_and_answers_as_before(tmp_path):
    bundle, variant = made("onnx-fp16-modelopt", Block(), tmp_path / "model", arrays(4, 6, WIDTH))
    found, graph = types(bundle, variant)
    assert found == {TensorProto.FLOAT16}
    ends = (*graph.input, *graph.output)
    assert {one.type.tensor_type.elem_type for one in ends} == {TensorProto.FLOAT}
    assert accuracy(bundle, variant.id).passed
    assert set(variant.precision.settings["products"].values()) == {"fp16"}


def test_what_half_precision_does_not_hold_on_any_of_the_data_stays_fp32(tmp_path):
    class Growing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.second(self.first(x) / 1e4)

    given = [*arrays(4, WIDTH, count=5), {"x": 5e5 * arrays(4, WIDTH, count=1)[0]["x"]}]
    bundle, variant = made("onnx-fp16-modelopt", Growing(), tmp_path / "model", given)
    settings = variant.precision.settings
    assert max(settings["beyond_fp16"].values()) > 65504
    assert settings["products"] == {"node_linear_MatMul": "fp32", "node_linear_1_MatMul": "fp16"}
    assert accuracy(bundle, variant.id).passed


class Uneven(torch.nn.Module):
    """Channels of very different sizes, as between the layers of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.first.weight[::8] *= 60
            self.second.weight[:, ::8] /= 60

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_large_channels_go_over_into_the_weights_and_the_module_stays_as_it_is(tmp_path):
    module = Uneven().eval()
    before = {name: one.clone() for name, one in module.state_dict().items()}
    _, variant = made("onnx-int8-smoothquant-modelopt", module, tmp_path / "model", requests())
    off = {one["what"].partition(",")[0]: one["distance"] for one in variant.precision.settings["trials"]
           if "distance" in one}  # fmt: skip
    assert off["smoothquant"] < off["max"] / 2
    assert variant.precision.settings["method"] == "smoothquant"
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())


def test_without_the_module_there_is_nothing_to_smooth(tmp_path):
    made("onnx-int8-modelopt", Block(), tmp_path / "model", arrays(4, 6, WIDTH))
    with pytest.raises(MlflowException, match="onnx-int8-smoothquant-modelopt' cannot be made here.*the original"):
        mlflow_tdeploy.extend_model(
            str(tmp_path / "model"), precisions=["onnx-int8-smoothquant-modelopt"], verify_with=arrays(4, 6, WIDTH)
        )


def test_what_no_cpu_runs_is_kept_and_nothing_vouches_for_it(tmp_path):
    bundle, variant = made("onnx-bf16-modelopt", Block(), tmp_path / "model", arrays(4, 6, WIDTH))
    assert types(bundle, variant)[0] == {TensorProto.BFLOAT16}
    assert (variant.device, variant.dropped) == ("cuda", False)
    assert accuracy(bundle, variant.id) is None


@pytest.mark.parametrize("recipe", ["int8-modelopt", "fp16-modelopt"])
def test_tensorrt_builds_engines_from_it(tmp_path, recipe):
    """TensorRT-RTX, whose builder needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    bundle, _ = made(f"onnx-{recipe}", Block(), tmp_path / "model", arrays(4, 6, WIDTH))
    options = EngineOptions(recipe, module="tensorrt_rtx")
    engine = build_engine_variant(bundle, options, tmp_path, BuildOptions(measure=False))
    assert engine.variant.parent == f"onnx-{recipe}"


def test_sums_that_take_the_end_of_a_mask_are_left_alone(tmp_path):
    x, mask = (onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "mask"))
    y = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    nodes = [
        onnx.helper.make_node("Mul", ["mask", "mask"], ["large"], name="square"),
        onnx.helper.make_node("Relu", ["x"], ["positive"], name="relu"),
        onnx.helper.make_node("Add", ["positive", "large"], ["masked"], name="masking"),
        onnx.helper.make_node("Softmax", ["masked"], ["weights"], name="softmax"),
        onnx.helper.make_node("Add", ["weights", "positive"], ["y"], name="residual"),
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x, mask], [y]), opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    model.ir_version = 9
    onnx.save(model, tmp_path / "m.onnx")
    batch = {"x": np.ones((2, 4), np.float32), "mask": np.full((2, 4), -1e15, np.float32)}
    assert modelopt.beyond_reason(tmp_path / "m.onnx", [batch]) == ["masking"]


def test_batches_of_one_size_are_those_with_most_numbers():
    small, large = {"x": np.zeros((8, 3))}, {"x": np.zeros((4, 7))}
    assert modelopt.of_one_size([small, large, small]) == [small, small]
    assert modelopt.of_one_size([small, large]) == [large]


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name.startswith("modelopt"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlflow-tdeploy\[modelopt\]'"):
        made("onnx-fp16-modelopt", Block(), tmp_path / "model", arrays(4, 6, WIDTH))
