"""Torch modules and graphs of other kinds than a float32 transformer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.pipeline import build_bundle
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
