import os
import sys

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.core.errors import ConflictError, IntegrityError, MissingDependencyError, NotFoundError
from mlflow_tdeploy.store.external_data import copy_graph, external_files

WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)


def external(name, location):
    """A float tensor whose content is in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3, 2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def value(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def graph(location="model.onnx.data", nodes=()):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), *nodes]
    made = helper.make_graph(nodes, "g", [value("x", [1, 3])], [value("y", [1, 2])], [external("w", location)])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save(folder, model, *files):
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(WEIGHTS.tobytes())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_external_files_is_empty_when_all_is_inside(tmp_path):
    model = graph()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHTS, "w"))
    assert external_files(save(tmp_path, model)) == ()


def test_external_files_finds_tensors_wherever_a_graph_may_hold_one(tmp_path):
    def constant(location, attribute="value"):
        return helper.make_node("Constant", [], [location], **{attribute: external("c", location)})

    def branch(location, *nodes):
        return helper.make_graph([constant(location), *nodes], location, [], [value(location, [3, 2])])

    nested = helper.make_node("If", ["c"], ["n"], then_branch=branch("f-then"), else_branch=branch("f-else"))
    outer = helper.make_node("If", ["c"], ["o"], then_branch=branch("e", nested), else_branch=branch("e2"))
    model = graph("a", [constant("b"), outer])
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("s", "sparse"))
    sparse.indices.CopyFrom(external("i", "indices"))
    listed = helper.make_node("Custom", [], ["l"], domain="d")
    listed.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.extend([external("t", "listed")])
    model.graph.node.append(listed)
    model.functions.append(helper.make_function("d", "F", [], ["g"], [constant("g")], [helper.make_opsetid("", 17)]))
    model.training_info.add().algorithm.initializer.append(external("t", "training"))
    expected = ("a", "b", "e", "e2", "f-else", "f-then", "g", "indices", "listed", "sparse", "training")
    assert external_files(save(tmp_path, model)) == expected


def test_external_files_accepts_when_location_starts_with_a_dot(tmp_path):
    assert external_files(save(tmp_path, graph("./data/w.bin"))) == ("data/w.bin",)


@pytest.mark.parametrize("location", ["/etc/passwd", "../w", "a/../../w", "", "..\\w", "C:\\w", "a/../w"])
def test_external_files_refuses_when_location_is_outside(tmp_path, location):
    with pytest.raises(IntegrityError, match=r"model\.onnx' refers to external data at"):
        external_files(save(tmp_path, graph(location)))


def test_external_files_refuses_when_a_link_leads_outside(tmp_path):
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    path = save(tmp_path / "model", graph("w"))
    (path.parent / "w").symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match="leads out"):
        external_files(path)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08", b"\xff" * 100])
def test_external_files_says_damaged_when_file_is_no_graph(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.onnx' is not an ONNX graph"):
        external_files(tmp_path / "model.onnx")


def test_external_files_says_so_when_there_is_no_file(tmp_path):
    with pytest.raises(NotFoundError, match="no ONNX graph"):
        external_files(tmp_path / "model.onnx")


def test_external_files_names_the_install_line_when_onnx_is_missing(tmp_path, monkeypatch):
    path = save(tmp_path, graph())
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlflow-tdeploy\[build\]'"):
        external_files(path)


def test_copy_graph_gives_a_graph_that_runs_without_the_original(tmp_path):
    src = save(tmp_path / "src", graph("data/w.bin"), "data/w.bin", "unrelated")
    assert copy_graph(src, tmp_path / "dst", "renamed.onnx") == ("renamed.onnx", "data/w.bin")
    src.unlink()
    (tmp_path / "src" / "data" / "w.bin").write_bytes(b"")  # exporting again must not change the copy
    x = np.ones((1, 3), np.float32)
    (y,) = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "dst" / "renamed.onnx")).run(None, {"x": x})
    np.testing.assert_array_equal(y, x @ WEIGHTS)
    assert not (tmp_path / "dst" / "unrelated").exists()


def test_copy_graph_names_the_file_when_external_data_is_missing(tmp_path):
    src = save(tmp_path / "src", graph("w.bin"))
    with pytest.raises(IntegrityError, match=r"needs its external data file 'w\.bin', which is missing"):
        copy_graph(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_copy_graph_overwrites_nothing_when_a_name_is_taken(tmp_path):
    src = save(tmp_path / "src", graph("w.bin"), "w.bin")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "w.bin").write_text("mine")
    with pytest.raises(ConflictError, match=r"w\.bin': that name is taken"):
        copy_graph(src, tmp_path / "dst")
    assert os.listdir(tmp_path / "dst") == ["w.bin"]
    with pytest.raises(ConflictError):
        copy_graph(src, tmp_path / "other", name="w.bin")
