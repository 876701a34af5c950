"""Smoothing: large channels go over into the weights where that pays, and a graph answers the same in fp32."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.build.observe import by_channel, observe
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.quantize import weighted_products
from mlflow_tdeploy.build.smooth import Scale, _error, _scale, choose_scales, smooth
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.source.resolve import resolve
from tests.build.building import accuracy, build
from tests.build.test_int8_mixed import PLANTED, WIDTH, Planted

CHANNELS, ROWS = 48, 40
SEVEN_ROWS = partial(by_channel, most=7)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def graph(random, *, twice: bool = False) -> onnx.ModelProto:
    """Return two products of one input and one of the first's answer; the second may share the first's weights."""
    weights = {name: random.normal(size=(CHANNELS, CHANNELS)).astype(np.float32) for name in ("a", "b", "c")}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], "first"),
        helper.make_node("MatMul", ["x", "a" if twice else "b"], ["q"], "second"),
        helper.make_node("Tanh", ["p"], ["r"], "between"),
        helper.make_node("MatMul", ["r", "c"], ["s"], "third"),
        helper.make_node("Add", ["q", "s"], ["y"], "sum"),
    ]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CHANNELS]) for name in ("x", "y")]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "g", sides[:1], sides[1:], held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def batches(random, large: int | None = 5, count: int = 8):
    """Return requests in which one channel is 300 times as large as the others."""
    found = [random.normal(size=(ROWS, CHANNELS)).astype(np.float32) for _ in range(count)]
    for array in found:
        if large is not None:
            array[:, large] *= 300
    return [{"x": array} for array in found]


def answer(path, feeds):
    return onnxruntime.InferenceSession(str(path)).run(["y"], feeds)[0]


def test_only_products_of_the_large_channel_are_smoothed_and_by_it(random, tmp_path):
    onnx.save(graph(random), tmp_path / "g.onnx")
    scales = choose_scales(tmp_path / "g.onnx", batches(random))
    assert set(scales) == {"first", "second"}, "the third takes numbers within -1..1"
    assert scales["first"] is scales["second"], "what comes in is divided once"
    assert scales["first"].by.argmax() == 5
    assert scales["first"].gain > 3
    assert not choose_scales(tmp_path / "g.onnx", batches(random, None)), "nothing is large"


def test_what_is_large_in_some_batches_only_makes_none_of_them_worse(random, tmp_path):
    """By the quiet batches alone a channel would be blown up that is large in the loud ones, whose error would grow."""
    onnx.save(graph(random), tmp_path / "g.onnx")
    quiet, loud = batches(random, None, 4), batches(random, 7, 4)
    for one in quiet:
        one["x"][:, 7] /= 300
    asked = [one for pair in zip(quiet, loud, strict=True) for one in pair]
    ((_, seen),) = observe(tmp_path / "g.onnx", ["x"], asked, SEVEN_ROWS)
    weight = np.concatenate([w for _, source, w in weighted_products(tmp_path / "g.onnx") if source == "x"], axis=1)
    outputs = [one.rows @ weight for one in seen[1::2]]
    plain = _error(seen[1::2], outputs, weight, np.ones(CHANNELS, np.float32))
    by_the_quiet = _scale(seen[::2], weight, 0.7, 0.0)
    assert _error(seen[1::2], outputs, weight, by_the_quiet) > 1.5 * plain
    scale = choose_scales(tmp_path / "g.onnx", asked).get("first")
    assert _error(seen[1::2], outputs, weight, scale.by if scale else np.ones(CHANNELS, np.float32)) <= plain


@pytest.mark.parametrize("twice", [False, True])
def test_a_smoothed_graph_answers_the_same(random, tmp_path, twice):
    model = graph(random, twice=twice)
    onnx.save(model, tmp_path / "g.onnx")
    scales = {
        name: Scale(random.uniform(0.01, 100, CHANNELS).astype(np.float32), 2.0) for name in ("second", "third")
    }  # not the first one, which shares what comes in, and may share weights
    smooth(tmp_path / "g.onnx", tmp_path / "s.onnx", scales)
    (feeds,) = batches(random, None, 1)
    before = answer(tmp_path / "g.onnx", feeds)
    np.testing.assert_allclose(answer(tmp_path / "s.onnx", feeds), before, rtol=1e-4, atol=1e-3)
    smoothed = onnx.load(tmp_path / "s.onnx")
    assert [node.op_type for node in smoothed.graph.node].count("Mul") == 2
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in smoothed.graph.initializer}
    first = next(node for node in smoothed.graph.node if node.name == "first")
    assert first.input[0] == "x"
    np.testing.assert_array_equal(held[first.input[1]], numpy_helper.to_array(model.graph.initializer[0]))


def test_what_is_seen_is_what_the_graph_computes(random, tmp_path):
    onnx.save(graph(random), tmp_path / "g.onnx")
    asked = batches(random, count=3)
    asked[1]["x"][:] = np.nan
    seen = dict(
        observe(
            tmp_path / "g.onnx",
            ["r", "x"],
            [{**one, "unknown": one["x"]} for one in asked],
            SEVEN_ROWS,
        )
    )
    for one, feeds in zip(seen["x"], asked, strict=True):
        np.testing.assert_array_equal(one.low, feeds["x"].min(axis=0))
        np.testing.assert_array_equal(one.high, feeds["x"].max(axis=0))
        assert 1 < len(one.rows) <= 7
    assert [one.is_finite for one in seen["x"]] == [True, False, True]
    assert [one.high.max() < 1.01 for one in seen["r"]] == [True, False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"], "nothing is left beside the graph"


def test_a_graph_that_fails_on_the_data_says_so(random, tmp_path):
    onnx.save(graph(random), tmp_path / "g.onnx")
    with pytest.raises(BuildError, match="fails on data it is calibrated with"):
        list(
            observe(
                tmp_path / "g.onnx",
                ["r"],
                [{"x": np.zeros((2, CHANNELS + 1), np.float32)}],
                SEVEN_ROWS,
            )
        )


def requests(count: int = 6):
    random = np.random.default_rng(2)
    return [{"x": random.normal(size=(8, WIDTH)).astype(np.float32)} for _ in range(count)]


def test_a_planted_channel_is_smoothed_and_int8_is_close(tmp_path):
    """The module of the mixed recipe's test, whose plain int8 is over the budget: there nobody gave more than one."""
    source = resolve(Planted(), example=requests()[0], shapes={"batch": (1, 8, 16)})
    options = BuildOptions(measure=False, precisions=("int8",), data=VerifyData.of(requests()))
    _, bundle = build(source, tmp_path / "model", options)
    made = bundle.variants["ort-cpu-int8"]
    assert not made.dropped
    assert accuracy(bundle, "ort-cpu-int8").passed
    gains = made.precision.settings["smoothed"]
    assert max(gains, key=gains.get) == f"node_linear_{PLANTED}_MatMul"
    assert max(gains.values()) > 100
    assert made.precision.settings["calibration"]["items"] == 6
    _, again = build(source, tmp_path / "again", options)
    assert again.variants["ort-cpu-int8"].digest == made.digest


def test_made_up_requests_are_no_reason(tmp_path):
    module = Planted()
    source = resolve(module, shapes={"batch": (1, 8, 16)}, example=requests()[0])
    options = BuildOptions(measure=False, precisions=("int8",))
    _, bundle = build(source, tmp_path / "model", options)
    assert "smoothed" not in bundle.variants["ort-cpu-int8"].precision.settings
