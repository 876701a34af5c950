"""Engines, built for real by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from mlflow_tdeploy.build.engine import _configured, build_engine, engine_profiles
from mlflow_tdeploy.build.engine_options import EngineOptions, tensorrt_module
from mlflow_tdeploy.core.engine import PlanHeader
from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, MissingDependencyError
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from tests.bundles import SIGNATURE, linear_graph

HOST = Fingerprint("linux-x86_64", gpu=Gpu("NVIDIA A10", "8.6", driver="570.86.10"))


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="engines are built by the package tensorrt-rtx")


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "graph" / "model.onnx"
    linear_graph(path)
    return path


def build(trt, graph, tmp_path, options=None, signature=SIGNATURE, progress=None):
    target = tmp_path / "out" / "model.plan"
    return target, build_engine(trt, graph, target, signature, HOST, options, progress)


def test_build_engine_writes_a_plan_and_says_how_it_was_made(trt, graph, tmp_path):
    options = EngineOptions(flags=("WEIGHT_STREAMING", "TF32"), targets=("8.6", "8.9"), optimization_level=1)
    target, record = build(trt, graph, tmp_path, options)
    assert record.contradicts(PlanHeader.read(target.read_bytes())) is None
    assert (record.gpu, record.compute_capability, record.driver) == ("NVIDIA A10", "8.6", "570.86.10")
    assert (record.flags, record.targets) == (("TF32", "WEIGHT_STREAMING"), ("8.6", "8.9"))
    assert record.profiles == ({"x": ((1, 4), (2, 4), (8, 4))},)
    assert [path.name for path in target.parent.iterdir()] == ["model.plan"]


@pytest.mark.parametrize("flags", [(), ("TF32",)])
def test_fp32_is_computed_in_fp32_unless_it_is_told_otherwise(trt, flags):
    """TF32 is on by default and keeps ten bits: what a CPU has verified would not be what a GPU computes."""
    config = _configured(trt, trt.Builder(trt.Logger()), EngineOptions(flags=flags), (), None)
    assert config.get_flag(trt.BuilderFlag.TF32) is bool(flags)


def test_what_a_build_measured_need_not_be_kept(trt, graph, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    target, _ = build(trt, graph, tmp_path, EngineOptions(timing_cache=blocked / "timings.cache"))
    assert target.is_file()
    assert "What this build measured is not kept" in caplog.text


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_build_engine_takes_the_precision_of_the_graph(trt, tmp_path, dtype):
    sizes = {}
    for width, kind in ((512, np.float32), (512, dtype)):
        linear_graph(tmp_path / "model.onnx", np.ones((width, width), kind))
        model = onnx.load(tmp_path / "model.onnx")
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[1].dim_value = width
        onnx.save(model, tmp_path / "model.onnx")
        wide = Signature(
            (Dim("batch", 1, 2, 8),),
            (TensorSpec("x", "float32", ("batch", width)),),
            (TensorSpec("y", "float32", ("batch", width)),),
        )
        target, _ = build(trt, tmp_path / "model.onnx", tmp_path, signature=wide)
        sizes[kind] = target.stat().st_size
    assert sizes[dtype] < 0.7 * sizes[np.float32] or dtype is np.float32


def test_build_engine_makes_several_profiles(trt, graph, tmp_path):
    _, record = build(trt, graph, tmp_path, EngineOptions(profiles=[{"batch": (1, 1, 1)}, {"batch": (2, 4, 8)}]))
    assert [profile["x"] for profile in record.profiles] == [((1, 4), (1, 4), (1, 4)), ((2, 4), (4, 4), (8, 4))]


def test_build_engine_tells_its_phases(trt, graph, tmp_path):
    seen = []
    build(trt, graph, tmp_path, progress=lambda phase, step, steps: seen.append((phase, step, steps)))
    assert {"Building engine"} < {phase for phase, _, _ in seen}
    assert all(1 <= step <= steps for _, step, steps in seen)


def test_build_engine_ends_and_leaves_nothing_when_progress_raises(trt, graph, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(trt, graph, tmp_path, progress=interrupt)
    assert not (tmp_path / "out").exists()


def test_build_engine_names_the_node_that_cannot_be_parsed(trt, graph, tmp_path):
    model = onnx.load(graph)
    model.graph.node[0].op_type, model.graph.node[0].name = "NoSuchOperator", "odd/one"
    onnx.save(model, graph)
    with pytest.raises(
        BuildError, match=r"cannot parse 'model\.onnx'\. node 'odd/one' \(NoSuchOperator\).*standard op"
    ):
        build(trt, graph, tmp_path)
    assert not (tmp_path / "out").exists()


def test_build_engine_says_what_the_builder_said_when_it_fails(trt, graph, tmp_path):
    wrong = Signature(SIGNATURE.dims, (TensorSpec("x", "float32", ("batch", 5)),), SIGNATURE.outputs)
    with pytest.raises(BuildError, match=r"TensorRT-RTX .* built no engine .*profile has min=5.*but tensor has 4"):
        build(trt, graph, tmp_path, signature=wrong)
    assert not (tmp_path / "out").exists()


def test_build_engine_keeps_the_timing_cache_and_replaces_one_that_it_cannot_read(trt, graph, tmp_path):
    cache = tmp_path / "cache" / "timing"
    build(trt, graph, tmp_path, EngineOptions(timing_cache=cache))
    first = cache.read_bytes()
    assert first
    cache.write_bytes(b"not a cache")
    build(trt, graph, tmp_path, EngineOptions(timing_cache=cache))
    assert cache.read_bytes()[:4] == first[:4]


def test_build_engine_refuses_a_target_that_this_tensorrt_does_not_know(trt, graph, tmp_path):
    with pytest.raises(InvalidInputError, match=r"has no ComputeCapability SM90\. It has: .*SM86"):
        build(trt, graph, tmp_path, EngineOptions(targets=("9.0",)))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([{"batch": (4, 2, 8)}], "needs 1 <= min <= opt <= max"),
        ([{"batch": (1, 2, 9)}], r"batch 1\.\.9 .*leaves the model's range: batch 1\.\.8"),
        ([{"sequence": (1, 2, 3)}], "sequence"),
        ([], "at least one profile"),
    ],
)
def test_engine_profiles_refuses_what_the_signature_does_not_allow(wanted, message):
    with pytest.raises(InvalidInputError, match=message):
        engine_profiles(SIGNATURE, wanted)


@pytest.mark.parametrize("wrong", [{"flags": ("FP16",)}, {"hardware_compatibility": "ALL"}, {"optimization_level": 6}])
def test_options_refuse_what_is_unknown(wrong):
    with pytest.raises(InvalidInputError):
        EngineOptions(**wrong)


def test_tensorrt_module_says_how_to_get_it():
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlflow-tdeploy\[no-such-tensorrt\]'"):
        tensorrt_module("no_such_tensorrt")
