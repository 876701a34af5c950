"""Weights in four bits: as few products as the budget needs in eight, and tables are looked up in four."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BudgetError
from mlflow_tdeploy.source.resolve import resolve
from tests.build.building import accuracy, build

ROWS, WIDTH, LAYERS, DELICATE = 2048, 64, 4, 2


class LooksUp(torch.nn.Module):
    """A table, and layers of which one may take a small difference of large numbers."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = torch.nn.Embedding(ROWS, WIDTH)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.offset = offset
        with torch.no_grad():
            self.layers[DELICATE].weight += offset

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids).mean(dim=1)
        for index, layer in enumerate(self.layers):
            y = layer(x)
            if index == DELICATE:
                y = y - self.offset * x.sum(dim=1, keepdim=True)
            x = x + torch.tanh(y)
        return x


def int4_of(module, folder, budget="worst_cosine >= 0.98"):
    random = np.random.default_rng(0)
    given = [{"ids": random.integers(0, ROWS, size=(4, 6))} for _ in range(8)]
    source = resolve(module, example=given[0], shapes={"batch": (1, 4, 16)})
    options = BuildOptions(
        measure=False,
        precisions=("fp32", "ort-cpu-int4"),
        on_budget="raise",
        budget=Budget.of(budget),
        data=VerifyData.of(given),
    )
    _, bundle = build(source, folder, options)
    return bundle, bundle.variants["ort-cpu-int4"]


def operators(bundle, variant):
    return Counter(node.op_type for node in onnx.load(bundle.path(variant.entry)).graph.node)


def bits_of(bundle, variant):
    nodes = onnx.load(bundle.path(variant.entry)).graph.node
    return [
        attribute.i
        for node in nodes
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    ]


def test_all_is_in_four_bits_where_the_budget_lets_it(tmp_path):
    bundle, made = int4_of(LooksUp(), tmp_path / "model")
    assert accuracy(bundle, "ort-cpu-int4").passed
    assert bits_of(bundle, made) == [4] * LAYERS
    found = operators(bundle, made)
    assert (found["GatherBlockQuantized"], found["Gather"], found["MatMul"]) == (1, 0, 0)
    assert made.size < 0.25 * bundle.variants["ort-cpu-fp32"].size
    assert (made.precision.name, made.precision.kept) == ("int4", ())
    assert made.requires["onnxruntime"] == "1.20"


def test_the_delicate_product_alone_is_in_eight_bits(tmp_path):
    bundle, made = int4_of(LooksUp(offset=1.0), tmp_path / "model")
    assert len(made.precision.kept) == 1
    assert made.precision.kept == tuple(made.precision.settings["eight_bits"])
    assert sorted(bits_of(bundle, made)) == [4] * (LAYERS - 1) + [8]
    assert bits_of(bundle, made)[DELICATE] == 8
    assert made.requires["onnxruntime"] == "1.22"
    _, again = int4_of(LooksUp(offset=1.0), tmp_path / "again")
    assert again.digest == made.digest


def test_a_budget_beyond_eight_bits_says_so(tmp_path):
    with pytest.raises(BudgetError, match="Not even with all weights in eight bits"):
        int4_of(LooksUp(offset=0.5), tmp_path / "model", "worst_cosine >= 0.9999999")
