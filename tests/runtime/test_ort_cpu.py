"""The contract of a runtime, on ONNX Runtime's CPU provider."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.core.errors import RefusedInputError, SessionError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu, OrtOptions
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import SIGNATURE, WEIGHTS, make_bundle

X = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32)


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "onnx-fp16": WEIGHTS.astype(np.float16)}))


def open_session(bundle, variant_id="onnx-fp32", **options):
    runtime = RUNTIMES.get("ort-cpu")()
    return runtime.open(bundle.root, bundle.variants[variant_id], SIGNATURE, SessionOptions.of(options, [OrtOptions]))


def test_session_infers_what_the_graph_computes(bundle):
    session = open_session(bundle)
    np.testing.assert_allclose(session.infer({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)
    assert session.device == "CPUExecutionProvider"


def test_session_takes_and_returns_the_signatures_dtypes_when_the_graphs_differ(bundle):
    result = open_session(bundle, "onnx-fp16").infer({"x": X})["y"]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, X @ WEIGHTS, rtol=1e-2)


def test_session_is_safe_from_several_threads(bundle):
    session = open_session(bundle)
    inputs = [np.full((2, 4), value, np.float32) for value in range(64)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: session.infer({"x": x})["y"], inputs))
    for x, y in zip(inputs, results, strict=True):
        np.testing.assert_allclose(y, x @ WEIGHTS, rtol=1e-5)


def test_session_says_what_failed_when_the_graph_refuses_the_shape(bundle):
    with pytest.raises(SessionError, match=r"variant 'onnx-fp32'.*x"):
        open_session(bundle).infer({"x": np.zeros((1, 5), np.float32)})


def test_session_refuses_after_close(bundle):
    session = open_session(bundle)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.infer({"x": X})


def test_open_says_what_failed_when_the_file_is_no_graph(bundle):
    bundle.path("files/onnx-fp32/model.onnx").write_bytes(b"not a graph")
    with pytest.raises(SessionError, match="cannot open variant 'onnx-fp32'"):
        open_session(bundle)


def test_open_refuses_when_the_graph_lacks_an_output(bundle):
    other = dataclasses.replace(SIGNATURE, outputs=(dataclasses.replace(SIGNATURE.outputs[0], name="z"),))
    with pytest.raises(SessionError, match="no output 'z'"):
        RUNTIMES.get("ort-cpu")().open(bundle.root, bundle.variants["onnx-fp32"], other, SessionOptions())


@pytest.mark.parametrize("level", ["disable", "basic", "extended", "layout", "all"])
def test_open_takes_every_graph_level(bundle, level):
    session = open_session(bundle, graph_level=level, execution_mode="parallel", arena="false", spinning="on")
    np.testing.assert_allclose(session.infer({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)


def test_open_writes_a_profile_when_asked(bundle, tmp_path):
    session = open_session(bundle, profiling=str(tmp_path / "new" / "profile"))
    session.infer({"x": X})
    session.close()
    assert list((tmp_path / "new").glob("profile*.json"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "enable_cpu_mem_arena": True}),
        ({"intra_op_threads": 2, "arena": False}, {"intra_op_num_threads": 2, "enable_cpu_mem_arena": False}),
        ({"execution_mode": "parallel", "threads": 3}, {"inter_op_num_threads": 3}),
    ],
)
def test_open_hands_the_options_to_onnx_runtime(bundle, monkeypatch, options, expected):
    import onnxruntime as ort

    seen = []
    original = ort.InferenceSession

    def remember(*args, sess_options, **keywords):
        seen.append(sess_options)
        return original(*args, sess_options=sess_options, **keywords)

    monkeypatch.setattr(ort, "InferenceSession", remember)
    open_session(bundle, **options)
    assert {name: getattr(seen[0], name) for name in expected} == expected
    parallel = options.get("execution_mode") == "parallel"
    assert (seen[0].execution_mode == ort.ExecutionMode.ORT_PARALLEL) is parallel
    assert seen[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_value_that_the_graph_cannot_take_is_the_callers_error(tmp_path):
    path = tmp_path / "table.onnx"
    table = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"])], "table",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "table")],
    )  # fmt: skip
    onnx.save(helper.make_model(table, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    signature = Signature(
        (Dim("batch", 1, 2, 8),), (TensorSpec("x", "int64", ("batch",)),), (TensorSpec("y", "float32", ("batch", 2)),)
    )
    variant = Variant("onnx-fp32", "onnx", Precision(), "any", "table.onnx", ())
    session = OrtCpu().open(tmp_path, variant, signature, SessionOptions())
    with pytest.raises(RefusedInputError, match="index beyond a table") as caught:
        session.infer({"x": np.array([99])})
    assert caught.value.code == "INVALID_PARAMETER_VALUE"
    np.testing.assert_array_equal(session.infer({"x": np.array([2])})["y"], np.ones((1, 2)))
