"""int8 within the budget: the product that was made sensitive is found and spared, and no other."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.build.applied import applied, read_back
from mlflow_tdeploy.build.extend import build_variant
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.quantize import prepare, products, quantize_mixed
from mlflow_tdeploy.cli.show import inspect
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BudgetError, BuildError
from mlflow_tdeploy.registry_io import searches
from mlflow_tdeploy.source.resolve import resolve
from tests.build.building import accuracy, build

WIDTH, LAYERS, PLANTED = 64, 6, 3
MIXED = BuildOptions(measure=False, precisions=("ort-cpu-int8", "ort-cpu-int8-mixed"))


class Planted(torch.nn.Module):
    """Layers of which one gets a number that is 400 times as large as the others, and makes nothing of that."""

    def __init__(self, planted: tuple[int, ...] = (PLANTED,)) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        with torch.no_grad():
            for index in planted:
                self.layers[index - 1].bias[0] = 1.0  # so that it is no negative one, which relu would take away
                self.layers[index - 1].weight[0] *= 400
                self.layers[index - 1].bias[0] *= 400
                self.layers[index].weight[:, 0] /= 400

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) if layer is self.layers[-1] else torch.relu(layer(x)) + 0.1
        return x


class OfOtherRows(Planted):
    """Layers of which one gets rows of which some are 300 times as large as others, and makes nothing of that."""

    def __init__(self) -> None:
        super().__init__(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = 1 + 300 * torch.sigmoid(20 * x[:, :1])
        for index, layer in enumerate(self.layers):
            planted = index == PLANTED
            x = torch.nn.functional.linear(x * size, layer.weight) / size + layer.bias if planted else layer(x)
            x = torch.tanh(x) if index == LAYERS - 1 else torch.relu(x) + 0.1
        return x


def source(module: torch.nn.Module):
    example = {"x": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}
    return resolve(module, example=example, shapes={"batch": (1, 8, 16)})


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return build(source(Planted()), tmp_path_factory.mktemp("planted") / "model", MIXED)


def test_only_the_planted_product_is_spared(planted):
    _, bundle = planted
    assert bundle.variants["ort-cpu-int8"].dropped
    mixed = bundle.variants["ort-cpu-int8-mixed"]
    assert not mixed.dropped
    assert accuracy(bundle, "ort-cpu-int8-mixed").passed
    assert len(mixed.precision.kept) == 1, (
        "another number, or by blocks: of 64 numbers all share a block with the large one"
    )
    assert mixed.precision.settings["blocks"] == []
    kinds = [node.op_type for node in onnx.load(bundle.path(mixed.entry)).graph.node]
    before = kinds[: kinds.index("MatMul")]
    assert (kinds.count("MatMul"), before.count("MatMulInteger"), kinds.count("MatMulInteger")) == (
        1,
        PLANTED,
        LAYERS - 1,
    )


def test_a_product_that_is_closer_by_blocks_is_spared_so(tmp_path):
    _, bundle = build(source(OfOtherRows()), tmp_path / "model", MIXED)
    assert bundle.variants["ort-cpu-int8"].dropped
    mixed = bundle.variants["ort-cpu-int8-mixed"]
    assert (mixed.dropped, len(mixed.precision.settings["blocks"]), mixed.precision.kept) == (False, 1, ())
    assert around(bundle, mixed, "MatMulNBits") == (PLANTED, LAYERS - 1)
    assert (mixed.requires["onnxruntime"], bundle.variants["ort-cpu-int8"].requires["onnxruntime"]) == ("1.22", "1.18")


def around(bundle, variant, spared):
    """Return how many products by channels are before the one that was spared, and in the whole graph."""
    kinds = [node.op_type for node in onnx.load(bundle.path(variant.entry)).graph.node]
    assert kinds.count(spared) == 1
    return kinds[: kinds.index(spared)].count("MatMulInteger"), kinds.count("MatMulInteger")


def test_what_needs_nothing_spared_is_as_the_plain_one(tmp_path):
    _, bundle = build(source(Planted(())), tmp_path / "model", MIXED)
    mixed, plain = (bundle.variants[name] for name in ("ort-cpu-int8-mixed", "ort-cpu-int8"))
    assert (mixed.precision.settings["blocks"], mixed.precision.kept) == ([], ())
    assert len(mixed.precision.settings["trials"]) == 1
    assert abs(mixed.size - plain.size) < 0.01 * plain.size


def test_a_budget_that_leaves_nothing_says_so_and_the_others_stay(tmp_path):
    options = BuildOptions(measure=False, precisions=("fp32",), budget=Budget.of("worst_cosine >= 0.99999999"))
    _, bundle = build(source(Planted()), tmp_path / "model", options)
    with pytest.raises(BudgetError, match="No product of this graph can be quantized within the budget") as caught:
        build_variant(bundle, "ort-cpu-int8-mixed", tmp_path, BuildOptions(measure=False))
    assert len(caught.value.trials) > 3
    assert "ort-cpu-int8-mixed" not in bundle.variants


def test_what_was_tried_in_vain_is_in_the_model(tmp_path):
    budget = Budget.of("worst_cosine >= 0.99999999")
    options = BuildOptions(measure=False, precisions=("fp32", "ort-cpu-int8-mixed"), budget=budget)
    _, bundle = build(source(Planted()), tmp_path / "model", options)
    assert "ort-cpu-int8-mixed" in bundle.manifest.skipped
    (search,) = searches(bundle)
    assert (search.variant, search.outcome) == ("ort-cpu-int8-mixed", "")
    assert {one["what"] for one in search.trials if one.get("passed")} <= {"0 by blocks and 6 in fp32 of 6 products"}
    assert [str(one) for one in search.budget] == ["worst_cosine >= 0.99999999"]


def test_no_more_graphs_are_tried_than_was_said_but_for_the_last_count(tmp_path):
    options = BuildOptions(measure=False, precisions=("ort-cpu-int8-mixed",), search_trials=4)
    _, bundle = build(source(Planted()), tmp_path / "model", options)
    record = bundle.variants["ort-cpu-int8-mixed"].precision.settings
    assert record["cut_short"] is True
    assert len([one for one in record["trials"] if "distance" in one]) <= 4


def test_the_same_model_gives_the_same_bytes(planted, tmp_path):
    _, bundle = planted
    _, again = build(source(Planted()), tmp_path / "model", MIXED)
    assert again.variants["ort-cpu-int8-mixed"].digest == bundle.variants["ort-cpu-int8-mixed"].digest


def test_a_model_that_is_logged_gets_it_afterwards(planted, tmp_path):
    _, bundle = build(source(Planted()), tmp_path / "model", BuildOptions(measure=False, precisions=("fp32",)))
    (tmp_path / "work").mkdir()
    built = build_variant(bundle, "ort-cpu-int8-mixed", tmp_path / "work", BuildOptions(measure=False))
    assert not built.variant.dropped
    assert (
        built.variant.precision.settings["blocks"]
        == (planted[1].variants["ort-cpu-int8-mixed"].precision.settings["blocks"])
    )


def test_products_are_spared_as_is_said(tmp_path):
    onnx.save(nameless(), tmp_path / "nameless.onnx")
    with pytest.raises(BuildError, match="no names of their own"):
        products(tmp_path / "nameless.onnx")
    prepare(tmp_path / "nameless.onnx", tmp_path / "plain.onnx")
    names = products(tmp_path / "plain.onnx")
    assert len(set(names)) == len(names) == 3
    x = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    (exact,) = run(tmp_path / "nameless.onnx", x)
    np.testing.assert_allclose(run(tmp_path / "plain.onnx", x)[0], exact, rtol=1e-5, atol=1e-5)
    off = {}
    for kind, spared in (("blocks", {"blocks": names}), ("kept", {"kept": names}), ("channels", {})):
        quantize_mixed(tmp_path / "plain.onnx", tmp_path / "q.onnx", **spared)
        (got,) = run(tmp_path / "q.onnx", x)
        off[kind] = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert off["kept"] < 1e-5 < off["blocks"] < off["channels"]
    quantize_mixed(tmp_path / "plain.onnx", tmp_path / "q.onnx", blocks=names[:1], kept=names[1:2])
    kinds = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert {"MatMulNBits", "MatMul", "MatMulInteger"} <= kinds


def run(path, x):
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": x})


def nameless() -> onnx.ModelProto:
    """Return a product, one with its weights turned and a bias, and another product, all without a name."""
    random = np.random.default_rng(1)
    weights = [
        numpy_helper.from_array(random.normal(size=size).astype(np.float32), name)
        for name, size in (("a", (WIDTH, WIDTH)), ("b", (WIDTH, WIDTH)), ("bias", (WIDTH,)), ("c", (WIDTH, WIDTH)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Gemm", ["h", "b", "bias"], ["i"], transB=1),
        helper.make_node("MatMul", ["i", "c"], ["y"]),
    ]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_every_trial_is_told_and_recorded(planted, tmp_path):
    told = []
    _, bundle = build(source(Planted()), tmp_path / "model", MIXED, told.append)
    tried = [one for one in told if one.name == "  try ort-cpu-int8-mixed"]
    record = bundle.variants["ort-cpu-int8-mixed"].precision.settings["trials"]
    assert len(tried) == len(record) > 3
    assert tried[0].detail.startswith("0 by blocks and 0 in fp32 of 6 products: over the budget (worst_cosine 0.")
    assert record[0]["passed"] is False
    assert record[-1]["passed"] is True


def test_a_search_that_is_late_takes_what_it_knows(tmp_path):
    options = BuildOptions(measure=False, precisions=("auto",), search_seconds=0.0)
    _, bundle = build(source(Planted()), tmp_path / "model", options)
    assert {"ort-cpu-fp32", "ort-cpu-int8-mixed"} <= set(bundle.variants)
    record = bundle.variants["ort-cpu-int8-mixed"].precision.settings["trials"]
    groups = [one for one in record if "distance" in one and "3 in fp32" in one["what"]]
    assert not groups, "no order was looked for"


def test_what_became_of_each_product_is_read_back(planted, tmp_path):
    _, bundle = planted
    mixed = bundle.variants["ort-cpu-int8-mixed"]
    found = applied(bundle.path(mixed.entry))
    assert found == dict(mixed.precision.settings["products"])
    assert sorted(found.values()) == ["fp32"] + ["int8"] * (LAYERS - 1)
    assert found[mixed.precision.kept[0]] == "fp32"
    assert "not_as_asked" not in mixed.precision.settings
    told = read_back(bundle.path(mixed.entry), {**found, mixed.precision.kept[0]: "int8", "unknown": "int8"})
    assert told["not_as_asked"] == {mixed.precision.kept[0]: "int8", "unknown": "int8"}
    assert told["products"]["unknown"] == "not there"
    shown = CliRunner().invoke(inspect, [str(bundle.root.parent), "--products"])
    assert shown.exit_code == 0, shown.output
    (table,) = [one for one in shown.output.split("\n\n") if one.startswith(mixed.id)]
    rows = dict(line.split()[:2] for line in table.splitlines()[2:])
    assert rows == found
    spared = [line for line in table.splitlines() if " spared " in line]
    assert len(spared) == len(mixed.precision.kept)
