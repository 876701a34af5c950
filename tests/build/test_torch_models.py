"""Torch modules and graphs of other kinds than a float32 transformer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mlflow_tdeploy.build.extend import build_variant
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.pipeline import build_bundle
from mlflow_tdeploy.build.recheck import recheck_variants
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.staging import staged_directory
from mlflow_tdeploy.store.writer import BundleDraft
from tests.build import building


def build(model, folder, **given):
    source = resolve(model, **given)
    with staged_directory(folder) as staged:
        build_bundle(source, BundleDraft(staged / "tdeploy"), BuildOptions(precisions=("onnx-fp32",), measure=False))
    source.close()
    return Bundle.open(folder)


def test_a_graph_of_doubles_is_recorded_as_one(tmp_path):
    bundle = build(torch.nn.Linear(8, 2).double(), tmp_path / "m", example={"input": np.ones((2, 8))})
    precision = bundle.variants["onnx-fp32"].precision
    assert (precision.weights, precision.activations) == ("fp64", "fp64")


def test_a_module_that_takes_a_plain_number_is_logged(tmp_path):
    class Scale(torch.nn.Module):
        def forward(self, a, k):
            return {"y": a * k}

    example = {"a": np.ones((2, 7), np.float32), "k": np.array(3.0, np.float32)}
    assert "onnx-fp32" in build(Scale(), tmp_path / "m", example=example).variants


def test_a_model_that_draws_random_numbers_is_refused(tmp_path):
    """Each new session draws the same ones, so that a variant seems to be equal until somebody asks twice."""
    graph = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["x"], ["y"])],
        "noise",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    with pytest.raises(InvalidInputError, match="differently each time.*draws random numbers"):
        build(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.LSTM])
def test_recurrent_layers_are_logged_without_half_precision(tmp_path, kind):
    """ONNX Runtime ends the process that opens such a graph."""

    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = kind(8, 16, batch_first=True, bidirectional=True), torch.nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0])

    example = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}
    shapes = {"batch": (1, 4, 8), "x.1": "t", "t": (1, 8, 16)}
    source = resolve(Recurrent().eval(), task="tensors", example=example, shapes=shapes)
    _, bundle = building.build(source, tmp_path / "model", BuildOptions(measure=False))
    assert building.accuracy(bundle, "onnx-fp32").passed
    assert f"The graph has {kind.__name__}, which ONNX Runtime does not compute" in bundle.manifest.skipped["onnx-fp16"]


class Anchored(torch.nn.Module):
    """Answers with its anchors besides."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)
        self.register_buffer("anchors", torch.arange(6.0).reshape(2, 3))

    def forward(self, x):
        return {"y": self.head(x), "anchors": self.anchors}


def test_an_output_that_is_a_constant_has_half_precision_too(tmp_path):
    source = resolve(Anchored().eval(), task="tensors", example={"x": np.ones((2, 4), np.float32)})
    _, bundle = building.build(source, tmp_path / "model", BuildOptions(measure=False, precisions=("fp16",)))
    assert building.accuracy(bundle, "onnx-fp16").passed


class Tabular(torch.nn.Module):
    """Raw features (an age, an income, a flag), scaled in the first layer."""

    def __init__(self, features):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(3, 64), torch.nn.Linear(64, 2)
        with torch.no_grad():
            self.first.weight /= torch.from_numpy(features.std(0))
            self.first.bias -= self.first.weight @ torch.from_numpy(features.mean(0))

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("given", ["example", "verify_with"])
def test_variants_are_checked_on_what_the_example_and_the_data_are_like(tmp_path, given):
    """Around 0, where made-up numbers are, dynamic int8 is right; between 0 and 2e5 it sees nothing of an age."""
    random = np.random.default_rng(0)
    features = (random.random((64, 3)) * [60, 2e5, 1] + [18, 0, 0]).astype(np.float32)
    example = features if given == "example" else features[:2] * 0
    data = VerifyData.of([{"x": features}]) if given == "verify_with" else None
    source = resolve(Tabular(features).eval(), task="tensors", example={"x": example})
    options = BuildOptions(measure=False, precisions=("fp32", "int8"), data=data)
    _, bundle = building.build(source, tmp_path / "model", options)
    assert building.accuracy(bundle, "ort-cpu-fp32").passed
    assert not building.accuracy(bundle, "ort-cpu-int8").passed
    assert np.abs(bundle.golden()[0].feeds["x"]).max() > 1e4
    (tmp_path / "again").mkdir()
    again = recheck_variants(bundle, None, tmp_path / "again")
    assert [(record.variant, record.passed) for record in again] == [("ort-cpu-fp32", True)]
    _, without = building.build(
        source, tmp_path / "without", BuildOptions(measure=False, precisions=("fp32",), data=data)
    )
    (tmp_path / "work").mkdir()
    built = build_variant(without, "ort-cpu-int8", tmp_path / "work", BuildOptions(measure=False))
    assert built.variant.dropped  # asked what the model keeps of them, not numbers around 0
