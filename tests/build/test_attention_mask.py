"""Packed attention takes the padding mask where its bias is that mask, and only there."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from mlflow_tdeploy.build import graphs
from mlflow_tdeploy.build.attention_mask import take_mask_input
from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.build.quantize import quantize_dynamic_int8

from .test_export import batch_of, bert_signature, tiny_bert

SIZES = [(1, 1), (2, 8), (5, 24)]


class Causal(torch.nn.Module):
    """A BERT whose tokens see no later ones: its bias depends on the mask and is not the mask."""

    def __init__(self):
        super().__init__()
        self.bert = tiny_bert("sdpa")

    def forward(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        seen = torch.tril(torch.ones(length, length)) * attention_mask[:, None, None, :]
        return self.bert(input_ids=input_ids, attention_mask=(1.0 - seen) * -1e9)


@pytest.fixture
def fused(tmp_path, monkeypatch):
    """Returns a fused graph as it is before any mask is taken."""

    def make(module):
        export_module(module, batch_of(2, 8), bert_signature(), tmp_path / "model.onnx", exporter="dynamo")
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "take_mask_input", lambda model: 0)
            graphs.fuse_for_ort(tmp_path / "model.onnx", tmp_path / "fused.onnx")
        return ir.load(tmp_path / "fused.onnx")

    return make


def attention(model):
    return [node for node in model.graph if node.op_type == "Attention"]


def difference(module, path):
    """Return the largest difference from torch at real tokens, padded on the right, on the left and inside."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows, columns in SIZES:
        feeds = batch_of(rows, columns, seed=columns)
        holes = feeds["attention_mask"].copy()
        holes[:, 1::3] = 0
        for mask in (feeds["attention_mask"], feeds["attention_mask"][:, ::-1].copy(), holes):
            given = {**feeds, "attention_mask": mask}
            with torch.no_grad():
                expected = module(**{name: torch.from_numpy(array) for name, array in given.items()})
            gap = np.abs(session.run(None, given)[0] - expected.last_hidden_state.numpy())
            worst = max(worst, float(gap[mask.astype(bool)].max()))
    return worst


def test_take_mask_input_keeps_the_answers_when_the_bias_is_a_padding_mask(fused, tmp_path):
    module = tiny_bert("sdpa")
    model = fused(module)
    assert all(node.inputs[5] is not None for node in attention(model))
    assert take_mask_input(model) == 2
    assert all(node.inputs[5] is None and node.inputs[3] is not None for node in attention(model))
    graphs.save_ir(model, tmp_path / "masked.onnx")
    assert difference(module, tmp_path / "masked.onnx") < 1e-4


def test_take_mask_input_lets_the_quantizer_take_attention_when_it_reads_the_mask(fused, tmp_path):
    model = fused(tiny_bert("sdpa"))
    take_mask_input(model)
    graphs.save_ir(model, tmp_path / "masked.onnx")
    quantize_dynamic_int8(tmp_path / "masked.onnx", tmp_path / "int8.onnx")
    assert graphs.op_counts(tmp_path / "int8.onnx")["com.microsoft.QAttention"] == 2


def test_take_mask_input_changes_nothing_when_the_bias_is_causal(fused):
    model = fused(Causal())
    before = [[value and value.name for value in node.inputs] for node in attention(model)]
    assert before  # it was fused at all
    assert take_mask_input(model) == 0
    assert [[value and value.name for value in node.inputs] for node in attention(model)] == before


def test_take_mask_input_changes_nothing_when_no_input_is_a_mask(fused):
    model = fused(tiny_bert("sdpa"))
    next(value for value in model.graph.inputs if value.name == "attention_mask").name = "keep"
    assert take_mask_input(model) == 0


_MADE_UP = {
    "zeros": (["bias = ConstantOfShape <value = float[1] {0}> (size)"], True),
    "ones": (["bias = ConstantOfShape <value = float[1] {1}> (size)"], False),
    "of the rows": (
        [
            "zeros = ConstantOfShape <value = float[1] {0}> (size)",
            "rows = Shape <start = 0, end = 1> (x)",
            "one = Constant <value = int64[1] {1}> ()",
            "more = Sub (rows, one)",
            "some = Cast <to = 1> (more)",
            "bias = Add (zeros, some)",
        ],
        False,
    ),
    "of what is asked": (
        ["zeros = ConstantOfShape <value = float[1] {0}> (size)", "sum = ReduceSum <keepdims = 0> (x)",
         "bias = Mul (zeros, sum)"],
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", _MADE_UP)
def test_a_bias_that_is_zero_for_any_rows_goes_and_no_other(kind):
    nodes, goes = _MADE_UP[kind]
    weights, zeros = ", ".join(["0.1"] * 192), ", ".join(["0"] * 24)
    newline = "\n"
    text = f"""
        <ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]>
        attends (float[n, 4, 8] x) => (float[n, 4, 8] y)
        <float[8, 24] w = {{{weights}}}, float[24] b = {{{zeros}}}>
        {{
            batch = Shape <start = 0, end = 1> (x)
            rest = Constant <value = int64[3] {{2, 4, 4}}> ()
            size = Concat <axis = 0> (batch, rest)
            {newline.join(nodes)}
            y = com.microsoft.Attention <num_heads = 2, qkv_hidden_sizes = [8, 8, 8]> (x, w, b, "", "", bias)
        }}
    """
    model = ir.from_onnx_text(text)
    assert take_mask_input(model) == int(goes)
    (node,) = attention(model)
    assert (node.inputs[5] is None) == goes
    assert ("qkv_hidden_sizes" in node.attributes) != goes


@pytest.mark.parametrize("bias", ["of the user", "of a window"])
def test_a_bias_that_is_zero_at_small_sizes_or_in_an_example_stays(bias):
    weights, zeros = ", ".join(["0.1"] * 192), ", ".join(["0"] * 24)
    inputs, nodes = {
        "of the user": (", float[n, 2, s, s] bias", ""),
        "of a window": (
            "",
            """
            length = Shape <start = 1, end = 2> (x)
            one = Constant <value_int = 1> ()
            zero = Constant <value_int = 0> ()
            size = Squeeze (length)
            places = Range (zero, size, one)
            last = Sub (size, one)
            axis = Constant <value = int64[1] {0}> ()
            other = Constant <value = int64[1] {1}> ()
            row = Unsqueeze (places, axis)
            column = Unsqueeze (places, other)
            apart = Sub (row, column)
            far = Constant <value_int = 8> ()
            hidden = Greater (apart, far)
            number = Cast <to = 1> (hidden)
            scale = Constant <value_float = -10000.0> ()
            flat = Mul (number, scale)
            front = Constant <value = int64[2] {0, 1}> ()
            bias = Unsqueeze (flat, front)
            """,
        ),
    }[bias]
    text = f"""
        <ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]>
        attends (float[n, s, 8] x{inputs}) => (float[n, s, 8] y)
        <float[8, 24] w = {{{weights}}}, float[24] b = {{{zeros}}}>
        {{
            {nodes}
            y = com.microsoft.Attention <num_heads = 2> (x, w, b, "", "", bias)
        }}
    """
    model = ir.from_onnx_text(text)
    assert take_mask_input(model) == 0
    assert attention(model)[0].inputs[5] is not None


def test_a_model_of_images_has_attention_without_a_bias_in_eight_bits(tmp_path):
    from mlflow_tdeploy.source.resolve import resolve
    from tests.core.tasks.image_models import model_of, processor_of

    source = resolve(model_of("vit"), image_processor=processor_of("vit"))
    feeds = {"pixel_values": np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)}
    export_module(source.module, feeds, source.signature, tmp_path / "model.onnx", exporter="dynamo")
    graphs.fuse_for_ort(tmp_path / "model.onnx", tmp_path / "fused.onnx")
    assert [len([one for one in node.inputs if one]) for node in attention(ir.load(tmp_path / "fused.onnx"))] == [3] * 3
    quantize_dynamic_int8(tmp_path / "fused.onnx", tmp_path / "int8.onnx")
    assert graphs.op_counts(tmp_path / "int8.onnx")["com.microsoft.QAttention"] == 3
    session = ort.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, feeds)[0], source.reference(feeds)["logits"], atol=1e-5)
