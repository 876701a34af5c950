"""The exported graph is the module: at every size of the signature's ranges, with ragged masks, without noise."""

import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import BertConfig, BertModel

from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.core.errors import ExportError
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec

NAMES = ("input_ids", "attention_mask")


def bert_signature(batch=(1, 2, 5), sequence=(1, 8, 24)):
    axes = ("batch", "sequence")
    return Signature(
        (Dim("batch", *batch), Dim("sequence", *sequence)),
        tuple(TensorSpec(name, "int64", axes) for name in NAMES),
        (
            TensorSpec("last_hidden_state", "float32", (*axes, 32)),
            TensorSpec("pooler_output", "float32", ("batch", 32)),
        ),
    )


def tiny_bert(implementation):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        attn_implementation=implementation,
    )
    return BertModel(config).eval()


def batch_of(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows, columns), np.int64)
    for row in mask:
        row[: rng.integers(1, columns + 1)] = 1
    mask[0] = 1
    return {"input_ids": rng.integers(1, 97, (rows, columns)), "attention_mask": mask}


def run(path, feeds):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_equal_to_torch(module, path, feeds):
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    keep = feeds["attention_mask"].astype(bool)  # what padding positions hold is nobody's business
    hidden, pooled = run(path, feeds)
    np.testing.assert_allclose(hidden[keep], expected.last_hidden_state.numpy()[keep], atol=1e-4)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=1e-4)


@pytest.fixture(scope="module", params=[("dynamo", "sdpa"), ("torchscript", "eager")], ids=["dynamo", "torchscript"])
def exported(request, tmp_path_factory):
    exporter, implementation = request.param
    module, signature = tiny_bert(implementation), bert_signature()
    path = tmp_path_factory.mktemp(exporter) / "model.onnx"
    # An example of one row: traced as it is, a batch of 1 would be baked in.
    return module, signature, export_module(module, batch_of(1, 8), signature, path, exporter=exporter), exporter


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 8), (5, 24), (1, 24), (5, 1), (3, 17)])
def test_equals_torch_at_every_size(exported, rows, columns):
    module, _, result, _ = exported
    assert_equal_to_torch(module, result.path, batch_of(rows, columns, seed=rows * 31 + columns))


def test_graph_carries_the_signature(exported):
    _, signature, result, exporter = exported
    model = onnx.load(result.path)
    onnx.checker.check_model(model)
    found = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
    assert found == {spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)}
    assert {entry.domain for entry in model.opset_import if entry.domain == "com.microsoft"} == set()
    assert (result.exporter, result.opset, result.notes) == (exporter, 18, ())
    assert model.opset_import[0].version == 18
    assert result.ir_version == model.ir_version <= 10


class Secret(torch.nn.Module):
    def forward(self, x):
        return {"y": torch.relu(x)[:, :3] * 2}  # marker-of-the-source-line


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_graph_carries_no_source_lines_and_no_paths(tmp_path, exporter):
    path = tmp_path / "model.onnx"
    export_module(Secret(), {"x": np.ones((2, 4), np.float32)}, SIMPLE, path, exporter=exporter)
    written = path.read_bytes()
    checkout = str(Path(__file__).parents[2])
    for marker in ("marker-of-the-source-line", "torch.relu(x)", "Secret", "site-packages", "stack_trace", checkout):
        assert marker.encode() not in written
    onnx.checker.check_model(path, full_check=True)


class Dropping(torch.nn.Module):
    """Dropout at train time, and a value read from a tensor, which only tracing can export."""

    def __init__(self, traced_only=False):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.drop = torch.nn.Dropout(0.9)
        self.traced_only = traced_only

    def forward(self, x):
        logging.getLogger("torch.onnx").warning("noise from a logger")
        warnings.warn("noise from a warning", stacklevel=1)
        sys.stderr.write("noise from a print")
        if self.traced_only and float(x.sum()) > 1e9:
            return x[:, :3]
        return self.drop(self.linear(x))


SIMPLE = Signature(
    (Dim("batch", 1, 2, 4),), (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 3)),)
)


def test_falls_back_to_torchscript_silently_and_restores_everything(tmp_path, capfd):
    module = Dropping(traced_only=True).train()
    module.linear.eval()
    level = logging.getLogger("torch.onnx").level
    result = export_module(module, {"x": np.ones((1, 4), np.float32)}, SIMPLE, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level
    assert (module.training, module.linear.training, module.drop.training) == (True, False, True)
    assert result.exporter == "torchscript"
    assert "dynamo" in result.notes[0]
    x = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32)
    expected = module.linear(torch.from_numpy(x)).detach().numpy()  # dropout is off
    np.testing.assert_allclose(run(result.path, {"x": x})[0], expected, atol=1e-5)


def test_both_exporters_failing_says_why_of_each(tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ValueError("weights are missing")

    with pytest.raises(ExportError, match=r"Broken.*dynamo: .*weights are missing.*torchscript: .*weights are missing"):
        export_module(Broken(), {"x": np.ones((2, 4), np.float32)}, SIMPLE, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_dims_that_cannot_vary_are_fixed(tmp_path, exporter):
    class Add(torch.nn.Module):
        def forward(self, x):
            return {"other": x, "y": x + 1}  # a mapping is read by name

    signature = Signature(
        (Dim("one", 1, 1, 1), Dim("rows", 2, 2, 3)),
        (TensorSpec("x", "float32", ("one", "rows")),),
        (TensorSpec("y", "float32", ("one", "rows")),),
    )
    path = tmp_path / "model.onnx"
    result = export_module(Add(), {"x": np.zeros((1, 1), np.float32)}, signature, path, exporter=exporter)
    assert result.notes == ("dimension 'one' is fixed to 1",)
    x = np.arange(3, dtype=np.float32)[None]
    np.testing.assert_array_equal(run(path, {"x": x})[0], x + 1)
    shape = onnx.load(path).graph.output[0].type.tensor_type.shape.dim
    assert (shape[0].dim_value, shape[1].dim_param) == (1, "rows")


def test_a_missing_output_names_what_the_module_returns(tmp_path):
    class Other(torch.nn.Module):
        def forward(self, x):
            return {"logits": x}

    with pytest.raises(ExportError, match=r"returns logits, not the declared output 'y'"):
        export_module(Other(), {"x": np.ones((2, 4), np.float32)}, SIMPLE, tmp_path / "model.onnx")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_number_stays_a_number(tmp_path, exporter):
    class Times(torch.nn.Module):
        def forward(self, x, k):
            return {"y": x * k}

    inputs = (*SIMPLE.inputs, TensorSpec("k", "float32", ()))
    signature = Signature(SIMPLE.dims, inputs, (TensorSpec("y", "float32", ("batch", 4)),))
    example = {"x": np.ones((2, 4), np.float32), "k": np.float32(3)}
    export_module(Times(), example, signature, tmp_path / "model.onnx", exporter=exporter)
    (answer,) = run(tmp_path / "model.onnx", {"x": np.ones((3, 4), np.float32), "k": np.array(5, np.float32)})
    np.testing.assert_array_equal(answer, np.full((3, 4), 5, np.float32))


def test_weights_beside_the_graph(tmp_path):
    module = Dropping()
    module.linear = torch.nn.Linear(4, 3000)
    signature = Signature(SIMPLE.dims, SIMPLE.inputs, (TensorSpec("y", "float32", ("batch", 3000)),))
    example = {"x": np.ones((2, 4), np.float32)}
    for exporter in ("dynamo", "torchscript"):
        path = tmp_path / exporter / "model.onnx"
        export_module(module, example, signature, path, exporter=exporter, external_data=True)
        assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
        assert (path.parent / "model.onnx.data").stat().st_size >= 4 * 3000 * 4
        expected = module.eval()(torch.ones(2, 4)).detach().numpy()
        np.testing.assert_allclose(run(path, example)[0], expected, atol=1e-5)


def test_a_failing_export_writes_no_graph_to_the_console(tmp_path, capfd):
    class Unknown(torch.nn.Module):
        def forward(self, x):
            return torch.diff(x, dim=1)

    signature = Signature(
        (Dim("rows", 1, 2, 5),), (TensorSpec("x", "float32", ("rows", 4)),), (TensorSpec("y", "float32", ("rows", 3)),)
    )
    example = {"x": np.ones((2, 4), np.float32)}
    with pytest.raises(ExportError, match="aten::diff"):
        export_module(Unknown(), example, signature, tmp_path / "model.onnx", exporter="torchscript")
    written = capfd.readouterr()
    assert "prim::Constant" not in written.out + written.err


class Spells(torch.nn.Module):
    """A series at its own times: their distances go into a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = torch.nn.GRU(3, 8, batch_first=True), torch.nn.Linear(8, 2)

    def forward(self, x, time):
        apart = torch.diff(time, dim=1, prepend=time[:, :1] - 1)
        steps = torch.cat([x, apart.unsqueeze(-1)], dim=-1)
        return self.head(self.rnn(steps)[0][:, -1])


def test_a_recurrent_layer_keeps_its_length_open_in_every_export_of_a_process(tmp_path):
    series = TensorSpec("x", "float32", ("batch", "time", 2))
    signature = Signature(
        (Dim("batch", 1, 2, 8), Dim("time", 4, 12, 24)),
        (series, TensorSpec("time", "float32", ("batch", "time"))),
        (TensorSpec("output", "float32", ("batch", 2)),),
    )
    example = {"x": np.zeros((2, 12, 2), np.float32), "time": np.tile(np.arange(12, dtype=np.float32), (2, 1))}
    for number in range(2):
        module, path = Spells().eval(), tmp_path / f"{number}.onnx"
        export_module(module, example, signature, path, exporter="dynamo")
        feeds = {"x": np.ones((3, 17, 2), np.float32), "time": np.tile(np.arange(17, dtype=np.float32), (3, 1))}
        (got,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)
        with torch.inference_mode():
            want = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_an_input_that_the_module_does_not_use_stays_one(tmp_path, exporter):
    class Unused(torch.nn.Module):
        def forward(self, a, kinds, b):
            return a + b

    sides = tuple(TensorSpec(name, "float32", ("batch", 3)) for name in ("a", "b"))
    inputs = (sides[0], TensorSpec("kinds", "int64", ("batch", 3)), sides[1])
    signature = Signature((Dim("batch", 1, 2, 4),), inputs, (TensorSpec("y", "float32", ("batch", 3)),))
    feeds = {one.name: np.ones((2, 3), one.dtype) for one in inputs}
    export_module(Unused(), feeds, signature, tmp_path / "model.onnx", exporter=exporter)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in graph.input] == ["a", "kinds", "b"]
    assert graph.input[1].type.tensor_type.elem_type == onnx.TensorProto.INT64
    feeds = {one.name: np.ones((4, 3), one.dtype) for one in inputs}
    np.testing.assert_array_equal(run(tmp_path / "model.onnx", feeds)[0], 2 * np.ones((4, 3)))
