"""Every graph function keeps the answers, at several sizes, with right- and left-padded masks."""

import importlib
import logging
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.build import graphs
from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.build.half import to_fp16
from mlflow_tdeploy.build.quantize import quantize_dynamic_int8
from mlflow_tdeploy.core.errors import BuildError

from .test_export import batch_of, bert_signature, tiny_bert

SIZES = [(1, 1), (2, 8), (5, 24), (3, 17)]


def run(path, feeds, **options):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"], **options)
    return session.run(None, feeds)


@pytest.fixture(scope="module", params=[("dynamo", "sdpa"), ("torchscript", "eager")], ids=["dynamo", "torchscript"])
def source(request, tmp_path_factory):
    exporter, implementation = request.param
    module = tiny_bert(implementation)
    path = tmp_path_factory.mktemp("src") / "model.onnx"
    export_module(module, batch_of(2, 8), bert_signature(), path, exporter=exporter)
    return module, path


def feeds_of(rows, columns, left):
    feeds = batch_of(rows, columns, seed=rows * 31 + columns)
    if left:
        feeds = {name: array[:, ::-1].copy() for name, array in feeds.items()}
    return feeds


def worst(module, path, left=False, **options):
    """Return the largest difference from torch at real tokens over all sizes."""
    difference = 0.0
    for rows, columns in SIZES:
        feeds = feeds_of(rows, columns, left)
        keep = feeds["attention_mask"].astype(bool)
        with torch.no_grad():
            expected = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        hidden, _ = run(path, feeds, **options)
        difference = max(difference, float(np.abs(hidden - expected.last_hidden_state.numpy())[keep].max()))
    return difference


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize("fusions", [graphs.FUSIONS, graphs.CPU_FUSIONS, graphs.CPU_INT8_FUSIONS])
def test_fused_graph_equals_torch(source, tmp_path, fusions, left):
    module, path = source
    counts = graphs.fuse_for_ort(path, tmp_path / "f.onnx", fusions=fusions, num_heads=4, hidden_size=32)
    assert counts.get("attention", 0) == (2 if "attention" in fusions else 0)
    assert worst(module, tmp_path / "f.onnx", left) < 1e-4


def test_each_fusion_can_be_left_out(source, tmp_path):
    _, path = source
    options = {"num_heads": 4, "hidden_size": 32}
    pairs = (("attention", "bias_gelu"), ("skip_layer_norm", "gelu"))  # two per run, bias_gelu needs gelu
    for absent, present in (*pairs, *(pair[::-1] for pair in pairs[:1])):
        counts = graphs.fuse_for_ort(path, tmp_path / "f.onnx", fusions=graphs.FUSIONS - {absent}, **options)
        assert absent not in counts
        if present != "gelu":
            assert counts[present] >= 2
        ops = graphs.op_counts(tmp_path / "f.onnx")
        assert not [op for op in graphs.FUSED_OPS[absent] if op in ops]
    assert graphs.fuse_for_ort(path, tmp_path / "f.onnx", fusions={"skip_layer_norm"}, **options).keys() <= {
        "layer_norm",
        "skip_layer_norm",
    }


def test_int8_fusions_leave_weights_to_the_quantizer(source, tmp_path):
    module, path = source
    graphs.fuse_for_ort(path, tmp_path / "f.onnx", fusions=graphs.CPU_INT8_FUSIONS, num_heads=4, hidden_size=32)
    quantize_dynamic_int8(tmp_path / "f.onnx", tmp_path / "q.onnx")
    counts = graphs.op_counts(tmp_path / "q.onnx")
    projections = counts["MatMulInteger"] + 3 * counts.get("com.microsoft.QAttention", 0)
    assert projections >= 2 * 6  # query, key, value, output, up and down of both layers
    assert "com.microsoft.Attention" not in counts
    assert counts["Gather"] == graphs.op_counts(tmp_path / "f.onnx")["Gather"]
    assert "DequantizeLinear" not in counts  # embedding tables stay exact
    assert 1e-7 < worst(module, tmp_path / "q.onnx") < 0.2


def test_excluded_nodes_stay_fp32(source, tmp_path):
    _, path = source
    names = [node.name for node in onnx.load(path).graph.node if node.op_type == "MatMul"]
    quantize_dynamic_int8(path, tmp_path / "q.onnx", exclude_nodes=names)
    counts = graphs.op_counts(tmp_path / "q.onnx")
    assert counts["MatMul"] == len(names)


def test_per_channel_scales_are_per_channel(source, tmp_path):
    _, path = source
    shapes = {}
    for per_channel in (True, False):
        quantize_dynamic_int8(path, tmp_path / "q.onnx", per_channel=per_channel)
        scales = [i for i in onnx.load(tmp_path / "q.onnx").graph.initializer if i.name.endswith("_scale")]
        shapes[per_channel] = {tuple(scale.dims) for scale in scales}
    assert (48,) in shapes[True]
    assert shapes[False] <= {(), (1,)}


def test_fp16_keeps_inputs_and_outputs(source, tmp_path):
    module, path = source
    to_fp16(path, tmp_path / "h.onnx")
    half, full = (onnx.load(p).graph for p in (tmp_path / "h.onnx", path))
    for side in ("input", "output"):
        assert [(v.name, v.type.tensor_type.elem_type) for v in getattr(half, side)] == [
            (v.name, v.type.tensor_type.elem_type) for v in getattr(full, side)
        ]
    big = [i for i in half.initializer if np.prod(i.dims) > 1000]
    assert big
    assert {i.data_type for i in big} == {TensorProto.FLOAT16}
    assert 1e-6 < worst(module, tmp_path / "h.onnx") < 0.02


def small_model(nodes, initializers=(), shape=("batch", 4)):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_fp16_does_not_overflow_a_sum_of_squares_or_a_mask(tmp_path):
    mask = numpy_helper.from_array(np.array([0, 0, 0, -3.4e38], np.float32), "mask")
    two = numpy_helper.from_array(np.array(2.0, np.float32), "two")
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["squared"]),
        helper.make_node("ReduceMean", ["squared", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sqrt", ["mean"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["y"]),
    ]
    onnx.save(small_model(nodes, [mask, two, axes]), tmp_path / "m.onnx")
    to_fp16(tmp_path / "m.onnx", tmp_path / "h.onnx")
    x = {"x": np.array([[400, 300, -350, 380]], np.float32)}  # squares are beyond fp16's 65504
    np.testing.assert_allclose(run(tmp_path / "h.onnx", x)[0], run(tmp_path / "m.onnx", x)[0], atol=2e-3)


def test_fp16_casts_a_value_once_when_several_fp32_nodes_use_it(tmp_path):
    """ALBERT's and GPT-2's gelu raises to a power that all layers share; the converter cast it once for each."""
    nodes = [
        helper.make_node("Add", ["x", "shift"], ["moved"]),
        helper.make_node("Pow", ["moved", "three"], ["cube"]),
        helper.make_node("Pow", ["cube", "three"], ["ninth"]),
        helper.make_node("Pow", ["moved", "moved"], ["self"]),
        helper.make_node("Add", ["ninth", "self"], ["y"]),
    ]
    constants = {"three": 3.0, "shift": 1.0}
    tensors = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()]
    onnx.save(small_model(nodes, tensors), tmp_path / "m.onnx")
    to_fp16(tmp_path / "m.onnx", tmp_path / "h.onnx")
    x = {"x": np.array([[0.1, 0.5, 0.75, 1.0]], np.float32)}
    np.testing.assert_allclose(run(tmp_path / "h.onnx", x)[0], run(tmp_path / "m.onnx", x)[0], rtol=1e-2)
    casts = [node for node in onnx.load(tmp_path / "h.onnx").graph.node if node.op_type == "Cast"]
    assert len({node.output[0] for node in casts}) == len(casts)


def test_fp16_keeps_an_output_that_comes_from_an_fp32_operator(tmp_path):
    nodes = [helper.make_node("Pow", ["x", "two"], ["y"])]
    two = numpy_helper.from_array(np.array(2.0, np.float32), "two")
    onnx.save(small_model(nodes, [two]), tmp_path / "m.onnx")
    to_fp16(tmp_path / "m.onnx", tmp_path / "h.onnx")
    x = {"x": np.array([[400, 300, -350, 380]], np.float32)}  # squares are beyond fp16's 65504
    np.testing.assert_allclose(run(tmp_path / "h.onnx", x)[0], x["x"] ** 2, rtol=1e-2)


@pytest.mark.parametrize("captured", ["node", "weight", "input"])
def test_fp16_keeps_branches_that_use_values_around_them(tmp_path, captured):
    """ONNX's branches see the outer graph's values; the converter turns those into fp16 and not the branches."""
    outer = {"node": "double", "weight": "w", "input": "x"}[captured]
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, [outer, "double"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name, op in (("then", "Add"), ("else", "Sub"))
    }
    weight = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    twice = numpy_helper.from_array(2 * np.eye(4, dtype=np.float32), "twice")
    zero = numpy_helper.from_array(np.array(0.0, np.float32), "zero")
    nodes = [
        helper.make_node("MatMul", ["x", "twice"], ["double"]),
        helper.make_node("Mul", ["double", "w"], ["scaled"]),
        helper.make_node("ReduceMax", ["scaled"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], **branches),
        helper.make_node("Mul", ["chosen", "scaled"], ["both"]),
        helper.make_node("MatMul", ["both", "twice"], ["y"]),  # what comes after the last weights stays fp32
    ]
    onnx.save(small_model(nodes, [weight, zero, twice]), tmp_path / "m.onnx")
    to_fp16(tmp_path / "m.onnx", tmp_path / "h.onnx")
    kinds = {one.name: one.data_type for one in onnx.load(tmp_path / "h.onnx").graph.initializer}
    assert kinds["w"] == kinds["twice"] == TensorProto.FLOAT16
    for sign in (1, -1):
        x = {"x": sign * np.array([[1, 2, 3, 4]], np.float32)}
        np.testing.assert_allclose(run(tmp_path / "h.onnx", x)[0], run(tmp_path / "m.onnx", x)[0], rtol=2e-3)


def test_simplify_folds_and_keeps_dynamic_dims(tmp_path):
    constants = [numpy_helper.from_array(np.full(4, v, np.float32), n) for n, v in (("a", 2.0), ("b", 3.0))]
    nodes = [
        helper.make_node("Mul", ["a", "b"], ["six"], name="folded"),
        helper.make_node("Sin", ["x"], ["unused"]),
        helper.make_node("Add", ["x", "six"], ["y"]),
    ]
    onnx.save(small_model(nodes, constants), tmp_path / "m.onnx")
    assert graphs.simplify(tmp_path / "m.onnx", tmp_path / "s.onnx")
    assert graphs.op_counts(tmp_path / "s.onnx") == {"Add": 1}
    dims = onnx.load(tmp_path / "s.onnx").graph.input[0].type.tensor_type.shape.dim
    assert (dims[0].dim_param, dims[1].dim_value) == ("batch", 4)
    np.testing.assert_array_equal(run(tmp_path / "s.onnx", {"x": np.ones((3, 4), np.float32)})[0], np.full((3, 4), 7))


def test_simplify_leaves_a_minimal_graph_alone(tmp_path):
    onnx.save(small_model([helper.make_node("Relu", ["x"], ["y"])]), tmp_path / "m.onnx")
    assert not graphs.simplify(tmp_path / "m.onnx", tmp_path / "s.onnx")
    assert graphs.op_counts(tmp_path / "s.onnx") == {"Relu": 1}


def test_simplified_model_equals_torch(source, tmp_path):
    module, path = source
    graphs.simplify(path, tmp_path / "s.onnx")
    assert worst(module, tmp_path / "s.onnx") < 1e-4


def test_external_weights_survive_every_step(source, tmp_path, monkeypatch):
    module, path = source
    monkeypatch.setattr(graphs.save_ir, "__kwdefaults__", {"external_data": True, "threshold": 0})
    small = tmp_path / "0"
    graphs.simplify(path, small / "model.onnx")
    assert (small / "model.onnx.data").stat().st_size > 10_000
    steps = {
        "fused": lambda a, b: graphs.fuse_for_ort(a, b, external_data=True, num_heads=4, hidden_size=32),
        "int8": lambda a, b: quantize_dynamic_int8(a, b, external_data=True),
        "half": to_fp16,
    }
    for name, step in steps.items():
        target = tmp_path / name / "model.onnx"
        target.parent.mkdir()
        step(small / "model.onnx", target)
        assert sorted(file.name for file in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"], name
        assert worst(module, target) < 0.2, name
    assert sorted(file.name for file in small.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_nothing_is_logged_and_logging_is_as_before(source, tmp_path, capfd):
    _, path = source
    state = (list(logging.root.handlers), logging.root.manager.disable)
    graphs.fuse_for_ort(path, tmp_path / "f.onnx")
    quantize_dynamic_int8(tmp_path / "f.onnx", tmp_path / "q.onnx")
    assert capfd.readouterr() == ("", "")
    assert (list(logging.root.handlers), logging.root.manager.disable) == state


def test_versions_and_errors(source, tmp_path):
    _, path = source
    assert graphs.opset_and_ir(path)[0] == 18
    assert graphs.opset_and_ir(path)[1] <= 10
    with pytest.raises(BuildError, match=r"Unknown fusion 'attentoin'. Available: attention, bias_gelu"):
        graphs.fuse_for_ort(path, tmp_path / "f.onnx", fusions={"attentoin"})


def noted(path):
    """Return everything in a graph file that only says where it comes from."""
    model = onnx.load(path)
    found = [model.doc_string, *model.metadata_props]

    def visit(graph):
        found.extend([graph.doc_string, *getattr(graph, "metadata_props", [])])
        values = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
        for part in (*graph.node, *values):
            found.extend([part.doc_string, *part.metadata_props])
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            found.append(attribute.doc_string)
            if attribute.HasField("g"):
                visit(attribute.g)

    visit(model.graph)
    return [note for note in found if note]


def chatty_model():
    """Return a graph that carries notes at every place a graph can carry them."""
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"], doc_string="secret")], "then", [],
        [helper.make_tensor_value_info("n", TensorProto.FLOAT, None, doc_string="secret")], doc_string="secret",
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["m"])], "else", [],
        [helper.make_tensor_value_info("m", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other, name="choice")]
    graph = helper.make_graph(
        nodes, "outer",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4], doc_string="secret"),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.ones(4, np.float32), "w")], doc_string="secret",
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, doc_string="secret")
    graph = model.graph  # make_model copies
    inner_node = graph.node[0].attribute[0].g.node[0]
    for part in (model, graph, graph.node[0], inner_node, graph.input[0], graph.initializer[0]):
        part.metadata_props.add(key="where", value="secret")
    graph.initializer[0].doc_string = "secret"
    return model


def test_no_written_graph_carries_notes(tmp_path):
    onnx.save(chatty_model(), tmp_path / "m.onnx")
    assert len(noted(tmp_path / "m.onnx")) == 13
    graphs.simplify(tmp_path / "m.onnx", tmp_path / "s.onnx")
    graphs.fuse_for_ort(tmp_path / "m.onnx", tmp_path / "f.onnx")
    for name in "sf":
        path = tmp_path / f"{name}.onnx"
        onnx.checker.check_model(path)
        assert noted(path) == []
        assert b"secret" not in path.read_bytes()


def test_fuse_says_which_onnxscript_it_knows_when_the_fusions_moved(source, tmp_path, monkeypatch):
    importlib.import_module("onnxscript.rewriter.ort_fusions._core")  # there, whichever tests ran before
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter.ort_fusions._core", None)
    monkeypatch.delattr("onnxscript.rewriter.ort_fusions._core")
    with pytest.raises(BuildError, match=r"onnxscript \d.*onnxscript>=0\.5\.6,<0\.8"):
        graphs.fuse_for_ort(source[1], tmp_path / "f.onnx")


def test_quantize_says_so_when_a_graph_has_nothing_to_quantize(tmp_path):
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, ["b"])], [value("y", 1, ["b"])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(BuildError, match="nothing to quantize: the graph has none of Attention, Gemm, MatMul"):
        quantize_dynamic_int8(tmp_path / "m.onnx", tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()
