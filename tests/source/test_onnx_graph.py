from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.build.inspect_graph import precision_of
from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, NotFoundError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.source._onnx_signature import read_graph
from mlflow_tdeploy.source.resolve import resolve
from tests.served import pipeline_of

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


def _model(weights=WEIGHTS, shape=("batch", 4), out=("batch", 3), name="y", op="MatMul", domain=""):
    kind = helper.np_dtype_to_tensor_dtype(weights.dtype)
    output = helper.make_tensor_value_info(name, kind, out)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], [name], domain=domain)],
        "linear",
        [helper.make_tensor_value_info("x", kind, shape)],
        [output],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _classifier(width=3, name="logits", shape=("b", "s")):
    """Logits: a row of a table for each token, summed over the tokens of the mask."""
    table = np.random.default_rng(0).standard_normal((30522, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "two"], ["mask"]),
        helper.make_node("Mul", ["rows", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], [name], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, shape) for n in ("input_ids", "attention_mask")]
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, (shape[0], "classes"))
    weights = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([1]), "one"),
        numpy_helper.from_array(np.array([2]), "two"),
    ]
    graph = helper.make_graph(nodes, "classifier", inputs, [output], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_resolve_reads_the_signature_from_a_graph_in_memory():
    source = resolve(_model())
    assert source.task == "tensors"
    assert str(source.signature.inputs[0]) == "x: float32[batch, 4]"
    assert str(source.signature.outputs[0]) == "y: float32[batch, 3]"
    assert list(source.graphs) == ["onnx-fp32"]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(source.reference({"x": x})["y"], x @ WEIGHTS)
    path = source.graphs["onnx-fp32"]
    assert path.is_file()
    source.close()
    assert not path.exists()


def test_resolve_takes_the_graph_as_it_is_when_given_a_path(tmp_path):
    onnx.save(_model(), tmp_path / "linear.onnx")
    for model in (tmp_path / "linear.onnx", str(tmp_path / "linear.onnx")):
        source = resolve(model, shapes={"batch": (2, 4, 6)})
        assert source.graphs == {"onnx-fp32": tmp_path / "linear.onnx"}
        assert str(source.signature.dim("batch")) == "batch 2..6 (opt 4)"
        assert source.record.name == "linear"
        source.close()
    assert (tmp_path / "linear.onnx").is_file()


def test_resolve_changes_nothing_of_the_callers_graph_when_its_weights_are_written_outside(monkeypatch):
    model = _model()
    before = model.SerializeToString()
    monkeypatch.setattr("mlflow_tdeploy.source._onnx_signature.ONE_FILE", 16)
    source = resolve(model)
    path = source.graphs["onnx-fp32"]
    assert [file.name for file in sorted(path.parent.iterdir())] == ["model.onnx", "model.onnx.data"]
    assert model.SerializeToString() == before
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(source.reference({"x": x})["y"], x @ WEIGHTS)
    source.close()


def test_resolve_reads_no_weights_when_they_are_external(tmp_path):
    onnx.save(_model(), tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    source = resolve(tmp_path / "big.onnx")
    np.testing.assert_allclose(source.reference({"x": np.eye(4, dtype=np.float32)})["y"], WEIGHTS)
    source.close()
    os.truncate(tmp_path / "big.data", 0)  # its content is not needed to read the signature
    assert resolve(tmp_path / "big.onnx").signature == source.signature
    (tmp_path / "big.data").unlink()
    with pytest.raises(NotFoundError, match=r"weights in 'big\.data'"):
        resolve(tmp_path / "big.onnx")


def test_resolve_asks_for_the_path_when_a_graph_in_memory_has_its_weights_in_files(tmp_path):
    onnx.save(_model(), tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    with pytest.raises(InvalidInputError, match="Pass the graph's path"):
        resolve(onnx.load(tmp_path / "big.onnx", load_external_data=False))


def test_resolve_takes_graphs_of_several_precisions_and_compares_with_the_most_exact(tmp_path):
    onnx.save(_model(), tmp_path / "fp32.onnx")
    source = resolve({"onnx-fp16": _model(WEIGHTS.astype(np.float16)), "onnx-fp32": tmp_path / "fp32.onnx"})
    assert list(source.graphs) == ["onnx-fp32", "onnx-fp16"]
    assert source.reference_id == "onnx-fp32"
    assert source.signature.inputs[0].dtype == "float32"
    source.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_model(name="z"), "'b' has the outputs z; 'a' has y"),
        (_model(np.ones((5, 3), np.float32), shape=("batch", 5)), r"'b' has the input x: float32\[batch, 5\]"),
        (_model(shape=("batch", 1, 4), out=("batch", 1, 3)), "Variants of one model must agree"),
    ],
)
def test_resolve_refuses_variants_when_they_are_not_of_one_model(other, message):
    with pytest.raises(InvalidInputError, match=message):
        resolve({"a": _model(), "b": other})


@pytest.mark.parametrize(
    ("model", "message"),
    [({}, "is empty"), ({"a": b"x"}, "'a' must be an ONNX path or ModelProto"), ({"../a": _model()}, "variant id")],
)
def test_resolve_refuses_a_mapping_when_it_holds_no_graphs(model, message):
    with pytest.raises(InvalidInputError, match=message):
        resolve(model)


def test_resolve_names_the_id_after_precision_and_operators():
    assert list(resolve(_model(WEIGHTS.astype(np.float16))).graphs) == ["onnx-fp16"]
    assert list(resolve(_model(op="FusedMatMul", domain="com.microsoft")).graphs) == ["ort-fp32"]


def test_resolve_names_dims_that_the_graph_does_not_name():
    source = resolve(_model(shape=(None, None, 4), out=(None, None, 3)))
    assert source.signature.inputs[0].shape == ("batch", "x_1", 4)
    assert [dim.name for dim in source.signature.dims] == ["batch", "x_1"]
    with pytest.raises(InvalidInputError, match="It has: batch, x_1"):
        resolve(_model(shape=(None, None, 4), out=(None, None, 3)), shapes={"sequence": (1, 2, 3)})


def test_resolve_makes_names_usable_when_the_exporter_wrote_expressions():
    source = resolve(_model(shape=("batch size+1", 4), out=("batch size+1", 3)))
    assert source.signature.inputs[0].shape == ("batch_size_1", 4)


def test_resolve_asks_onnx_runtime_when_an_output_has_no_shape():
    model = _model()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert str(resolve(model).signature.outputs[0]) == "y: float32[batch, 3]"


def test_resolve_refuses_a_file_when_it_is_damaged(tmp_path):
    onnx.save(_model(), tmp_path / "cut.onnx")
    content = (tmp_path / "cut.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match="damaged"):
        resolve(tmp_path / "cut.onnx")


def test_resolve_leaves_no_files_behind_when_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InvalidInputError):
        resolve(_model(), shapes={"nothing": 1})
    assert list(tmp_path.iterdir()) == []


def test_resolve_checks_the_example_when_one_is_given():
    model = _classifier()
    feeds = {name: np.full((2, 3), 7, np.int64) for name in ("input_ids", "attention_mask")}
    source = resolve(model, example=feeds)
    assert source.task_config == {"integer_ranges": {"input_ids": 30522}}
    with pytest.raises(InvalidInputError, match="'attention_mask' is missing"):
        resolve(model, example={"input_ids": feeds["input_ids"]})
    with pytest.raises(InvalidInputError, match="fails on its example inputs"):
        resolve(model, example={**feeds, "input_ids": feeds["input_ids"] + 40000})


def test_resolve_makes_a_text_model_of_a_graph_when_a_tokenizer_is_given(tokenizer, tmp_path):
    source = resolve(_classifier(), tokenizer=tokenizer, labels=["a", "b", "c"], shapes={"sequence": (1, 16, 40)})
    assert source.task == "text-classification"
    assert [str(spec) for spec in source.signature.inputs] == [
        "input_ids: int64[batch, sequence]",
        "attention_mask: int64[batch, sequence]",
    ]
    assert str(source.signature.outputs[0]) == "logits: float32[batch, 3]"
    assert source.signature.dim("sequence").max == 40
    answers = pipeline_of(source, tmp_path)(["a text", "another, longer text"])
    ids = tokenizer("a text")["input_ids"]
    table = numpy_helper.to_array(next(t for t in _classifier().graph.initializer if t.name == "table"))
    assert answers[0]["label"] == "abc"[int(table[ids].sum(0).argmax())]


def test_resolve_keeps_the_width_when_a_text_graph_has_a_fixed_one(tokenizer, tmp_path):
    source = resolve(_classifier(shape=("b", 12)), tokenizer=tokenizer)
    assert source.signature.inputs[0].shape == ("batch", 12)
    assert source.task_config["max_length"] == 12
    assert len(pipeline_of(source, tmp_path)(["a text", "long " * 40])) == 2
    with pytest.raises(InvalidInputError, match="'sequence', which is fixed"):
        resolve(_classifier(shape=("b", 12)), tokenizer=tokenizer, shapes={"sequence": (1, 2, 3)})


def test_resolve_says_what_a_text_graph_lacks(tokenizer):
    with pytest.raises(InvalidInputError, match="'logits'; this graph has scores"):
        resolve(_classifier(name="scores"), task="text-classification", tokenizer=tokenizer)
    with pytest.raises(InvalidInputError, match="cannot fill the graph input x"):
        resolve(_model(name="logits"), task="text-classification", tokenizer=tokenizer)
    with pytest.raises(InvalidInputError, match="needs the model's tokenizer"):
        resolve(_classifier(), task="text-classification")
    with pytest.raises(InvalidInputError, match="1 names, the model has 3 classes"):
        resolve(_classifier(), tokenizer=tokenizer, labels=["a"])


@pytest.mark.parametrize(
    ("weights", "name"), [(np.float32, "fp32"), (np.float16, "fp16"), (np.float64, "fp64"), (np.int8, "int8")]
)
def test_id_and_precision_of_a_graph_agree(tmp_path, weights, name):
    """A table of another type beside the weights must not make the id say one thing and the record another."""
    model = _model()
    spare = numpy_helper.from_array(np.zeros((4, 5), weights), "spare")
    model.graph.initializer.append(spare)
    onnx.save(model, tmp_path / "g.onnx")
    facts = read_graph(tmp_path / "g.onnx")
    assert facts.precision == precision_of(tmp_path / "g.onnx").name
    assert facts.variant_id == f"onnx-{facts.precision}"
    assert facts.precision == ("fp32" if name == "fp64" else name)


@pytest.mark.parametrize("wrap", ["", "Cast", "DequantizeLinear"])
def test_ids_are_known_to_be_rows_of_the_table_they_are_looked_up_in(tmp_path, wrap):
    """Made-up ids of 0 and 1 would say nothing about the other 998 rows."""
    table = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    weights, nodes = [numpy_helper.from_array(table, "table")], []
    if wrap == "Cast":
        nodes.append(helper.make_node("Cast", ["ids"], ["rows"], to=TensorProto.INT32))
    if wrap == "DequantizeLinear":
        weights = [numpy_helper.from_array((table * 30).astype(np.int8), "q")]
        weights.append(numpy_helper.from_array(np.float32(1 / 30), "s"))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s"], ["table"]))
    nodes.append(helper.make_node("Gather", ["table", "rows" if wrap == "Cast" else "ids"], ["e"]))
    nodes.append(helper.make_node("ReduceMean", ["e"], ["y"], axes=[1], keepdims=0))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    source = resolve(model)
    assert source.task_config == {"integer_ranges": {"ids": 1000}}
    example = {"ids": np.full((1, 3), 5, np.int64)}
    assert resolve(model, example=example).task_config == {"integer_ranges": {"ids": 1000}}
    task = TASKS.get("tensors")(source.task_config, source.signature, tmp_path)
    assert task.example_feeds("opt", ragged=False)["ids"].max() > 500
