"""Engines through the public functions: built for real by TensorRT-RTX, run nowhere where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.build import engine_variant
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.engine import PlanHeader
from mlflow_tdeploy.core.errors import IntegrityError
from mlflow_tdeploy.core.evidence import OPENED, Evidence
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.writer import append_evidence
from tests.bundles import WEIGHTS, linear_graph, make_bundle

pytest.importorskip("tensorrt_rtx", reason="engines are built by the package tensorrt-rtx")
pytestmark = pytest.mark.skipif(probe.gpu()[0] is not None, reason="what is said where there is no GPU")

X = np.array([[1, 2, 3, 4]], np.float32)
SHAPES = {"batch": (1, 2, 8)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def graph(tmp_path):
    linear_graph(tmp_path / "linear.onnx", WEIGHTS)
    return tmp_path / "linear.onnx"


@pytest.fixture
def registered(tracking, tmp_path):
    return mlflow_tdeploy.log_model(make_bundle(tmp_path / "made"), "linear", registered_model_name="engines")


def test_log_model_builds_engines_of_the_graphs_that_it_makes(tracking, graph):
    profiles = [{"batch": (1, 1, 1)}, {"batch": (2, 4, 8)}]
    info = mlflow_tdeploy.log_model(
        str(graph), "linear", task="tensors", shapes=SHAPES, precisions=["fp32"],
        engines=["fp16", mlflow_tdeploy.EngineOptions("fp32", profiles=profiles)],
    )  # fmt: skip
    bundle = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri))
    assert {"onnx-fp32", "onnx-fp16", "trt-rtx-fp32", "trt-rtx-fp16"} <= set(bundle.variants)
    engine = bundle.variants["trt-rtx-fp32"]
    assert [profile["x"] for profile in engine.engine.profiles] == [
        ((1, 4), (1, 4), (1, 4)), ((2, 4), (4, 4), (8, 4))
    ]  # fmt: skip
    assert engine.engine.contradicts(PlanHeader.read(bundle.path(engine.entry).read_bytes())) is None
    assert MlflowClient().get_logged_model(info.model_id).tags["tdeploy.variant.trt-rtx-fp32"] == "unverified"
    model = mlflow.pyfunc.load_model(info.model_uri)
    np.testing.assert_allclose(model.predict({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)


@pytest.fixture
def plan(tmp_path):
    """A real plan, built by TensorRT-RTX."""
    root = make_bundle(tmp_path / "elsewhere")
    (added,) = mlflow_tdeploy.extend_model(root, engines=["fp32"])
    return root / "tdeploy" / added.entry


@pytest.mark.parametrize("how", ["log", "extend"])
def test_a_plan_that_was_built_elsewhere_is_taken_as_it_is(tracking, graph, tmp_path, plan, how):
    engine = mlflow_tdeploy.EnginePlan(
        plan, "trt-own", "int8", gpu="NVIDIA L4", compute_capability="8.9", flags=("TF32",), targets=("8.9",)
    )
    given = {"task": "tensors", "shapes": SHAPES, "precisions": ["fp32"]}
    info = mlflow_tdeploy.log_model(str(graph), "m", **given, **({"engines": [engine]} if how == "log" else {}))
    if how == "extend":
        mlflow_tdeploy.extend_model(info.model_uri, engines=[engine])
    bundle = Bundle.open(mlflow.artifacts.download_artifacts(info.model_uri))
    variant = bundle.variants["trt-own"]
    bundle.verify(variant)
    assert bundle.path(variant.entry).read_bytes() == plan.read_bytes()
    assert (variant.format, variant.precision.name, variant.parent) == ("trt", "int8", None)
    record = variant.engine
    assert (record.module, record.gpu, record.compute_capability) == ("tensorrt_rtx", "NVIDIA L4", "8.9")
    assert (record.version, record.flags, record.driver) == (tensorrt_rtx_version(), ("TF32",), "")
    assert variant.built_for is None


def tensorrt_rtx_version():
    import tensorrt_rtx

    return tensorrt_rtx.__version__


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no TensorRT engine"),
        (b"ftrt", "is cut off after 4 bytes"),
        (b"PK\x03\x04" + bytes(60), "is no TensorRT engine"),
        (None, "Cannot read the engine"),
    ],
)
def test_what_is_no_plan_is_refused_and_nothing_is_left(graph, tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.plan").write_bytes(content)
    engine = mlflow_tdeploy.EnginePlan(tmp_path / "own.plan", "trt-own", "fp16")
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.save_model(str(graph), tmp_path / "out", task="tensors", shapes=SHAPES, engines=[engine])
    assert not (tmp_path / "out").exists()
    root = make_bundle(tmp_path / "made")
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.extend_model(root, engines=[engine])
    assert set(Bundle.open(root).variants) == {"onnx-fp32"}


def test_a_plan_cannot_take_the_id_of_a_graph(graph, tmp_path, plan):
    engine = mlflow_tdeploy.EnginePlan(plan, "onnx-fp32", "fp32")
    with pytest.raises(MlflowException, match="a variant 'onnx-fp32' already"):
        mlflow_tdeploy.save_model(str(graph), tmp_path / "out", task="tensors", shapes=SHAPES, engines=[engine])


def test_the_command_takes_a_plan(tmp_path, plan):
    root = make_bundle(tmp_path / "made")
    output = run("engine", root, "--plan", plan, "--id", "trt-own", "--precision", "fp32", "--gpu", "NVIDIA L4")
    assert "take trt-own" in output
    assert Bundle.open(root).variants["trt-own"].engine.gpu == "NVIDIA L4"
    assert "--plan needs --id" in run("engine", root, "--plan", plan, ok=False)
    assert "--workspace is about building" in run(
        "engine", root, "--plan", plan, "--id", "x", "--workspace", "1GB", ok=False
    )
    assert "say where a --plan was built" in run("engine", root, "--gpu", "NVIDIA L4", ok=False)


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        ("fp16", r"engines is a list of precisions, EngineOptions and EnginePlans, like \['fp16'\], got 'fp16'"),
        ([16], "engines is a list"),
        (["fp8"], "no 'onnx-fp8'. Possible here: onnx-bf16-modelopt, onnx-fp16, "),
        (["fp16", "fp16"], "Two engines would both be the variant 'trt-rtx-fp16'"),
    ],
)
def test_save_model_refuses_engines_that_cannot_be_and_leaves_nothing(graph, tmp_path, engines, message):
    with pytest.raises(MlflowException, match=message) as caught:
        mlflow_tdeploy.save_model(str(graph), tmp_path / "out", task="tensors", shapes=SHAPES, engines=engines)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert not (tmp_path / "out").exists()


def test_full_tensorrt_is_refused_where_there_is_no_gpu(graph, tmp_path):
    engine = mlflow_tdeploy.EngineOptions("fp32", module="tensorrt")
    with pytest.raises(MlflowException, match="this host has none. Build it on such a host, or with module='tensorrt"):
        mlflow_tdeploy.save_model(str(graph), tmp_path / "out", task="tensors", shapes=SHAPES, engines=[engine])


def test_the_error_says_how_to_get_tensorrt_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MlflowException, match=r"pip install 'mlflow-tdeploy\[tensorrt-rtx\]'"):
        mlflow_tdeploy.save_model(
            "/no/such/model", tmp_path / "out", engines=[mlflow_tdeploy.EngineOptions(module="tensorrt_rtx")]
        )


def test_extend_model_adds_an_engine_once(registered):
    steps = []
    (added,) = mlflow_tdeploy.extend_model(
        "models:/engines/1", engines=["fp32"], builder_progress=lambda phase, done, of: steps.append((phase, done, of))
    )
    assert (added.id, added.format, added.parent) == ("trt-rtx-fp32", "trt", "onnx-fp32")
    assert steps
    assert all(0 < done <= of for _, done, of in steps)
    with mlflow_tdeploy.load_model("models:/engines/1") as model:
        assert model.variants["trt-rtx-fp32"].engine.module == "tensorrt_rtx"
        assert model.decision.chosen.runtime == "ort-cpu"
    with pytest.raises(MlflowException, match="has a variant 'trt-rtx-fp32' already"):
        mlflow_tdeploy.extend_model("models:/engines/1", engines=["fp32"])


def test_extend_model_builds_engines_of_what_it_adds_in_the_same_call(registered):
    added = mlflow_tdeploy.extend_model("models:/engines/1", precisions=["onnx-fp16"], engines=["fp16"])
    assert [variant.id for variant in added] == ["onnx-fp16", "trt-rtx-fp16"]


def test_of_two_that_build_one_engine_one_waits_for_the_other(registered, monkeypatch):
    built, build = [], engine_variant.build_engine
    monkeypatch.setattr(engine_variant, "build_engine", lambda *given: built.append(1) or build(*given))
    extend = lambda _: mlflow_tdeploy.extend_model("models:/engines/1", engines=["fp32"])  # noqa: E731
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(extend, range(2))
    assert first == second
    assert len(built) == 1


def test_a_build_that_is_killed_leaves_the_model_as_it_was_and_nobody_waiting(tmp_path):
    root = make_bundle(tmp_path / "made")
    before = sorted(path for path in root.rglob("*") if path.is_file())
    script = (
        "import os, signal, sys, mlflow_tdeploy\n"
        "kill = lambda phase, done, of: os.kill(os.getpid(), signal.SIGKILL)\n"
        "mlflow_tdeploy.extend_model(sys.argv[1], engines=['fp32'], builder_progress=kill)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert sorted(path for path in root.rglob("*") if path.is_file()) == before
    (added,) = mlflow_tdeploy.extend_model(root, engines=["fp32"])
    assert added.id == "trt-rtx-fp32"


def test_what_the_progress_raises_ends_the_build_and_adds_nothing(tmp_path):
    root = make_bundle(tmp_path / "made")

    def enough(phase, done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlflow_tdeploy.extend_model(root, engines=["fp32"], builder_progress=enough)
    assert set(Bundle.open(root).variants) == {"onnx-fp32"}


def run(*arguments, ok=True):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code == 0) is ok, result.output
    return result.output


def test_the_command_builds_adds_and_shows(tmp_path):
    root = make_bundle(tmp_path / "made")
    output = run(
        "engine", root, "--precision", "fp32", "--id", "trt-two", "--profile", "batch=1,1,1", "--profile",
        "batch=2,4,8", "--optimization-level", "1", "--workspace", "1GB", "--timing-cache", tmp_path / "cache.bin",
    )  # fmt: skip
    assert "build trt-two" in output
    assert "not checked: there is no GPU here" in output
    assert "Added trt-two" in output
    assert (tmp_path / "cache.bin").stat().st_size > 0
    assert len(Bundle.open(root).variants["trt-two"].engine.profiles) == 2
    assert "no accuracy evidence yet" in run("explain", root)
    assert "trt-two" in run("inspect", root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "batch=1,2,9"], "The profile has batch 1..9"),
        (["--profile", "batch=3,2,8"], "batch"),
        (["--profile", "batch=3"], "'batch' needs a smallest, a usual and a largest size"),
        (["--profile", "rows=1,2,3"], "No dimension 'rows'"),
        (["--precision", "fp8"], "no 'onnx-fp8' to be had. It has: onnx-fp32"),
        (["--flag", "FP16"], "is not one of"),
        (["--workspace", "much"], "Cannot read the size 'much'"),
        (["--target", "x"], "'x' is no version"),
        (["--module", "tensorrt"], "this host has none"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, message):
    root = make_bundle(tmp_path / "made")
    assert message in run("engine", root, "--precision", "fp32", *arguments, ok=False)
    assert set(Bundle.open(root).variants) == {"onnx-fp32"}


def test_a_stripped_engine_shares_the_graph_that_has_its_weights(tmp_path):
    """TensorRT-RTX strips no plan without a GPU: the plan is a whole one, the rest is as it would be."""
    root = make_bundle(tmp_path / "made")
    real = engine_variant.build_engine

    def build(trt, graph, plan, signature, host, options, progress):
        return real(trt, graph, plan, signature, host, mlflow_tdeploy.EngineOptions("fp32"), progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_variant, "build_engine", build)
        engine = mlflow_tdeploy.EngineOptions("fp32", id="trt-stripped", flags=("STRIP_PLAN",))
        mlflow_tdeploy.extend_model(root, engines=[engine])
    bundle = Bundle.open(root)
    variant, parent = bundle.variants["trt-stripped"], bundle.variants["onnx-fp32"]
    assert (variant.shared, variant.engine.weights) == (parent.files, parent.entry)
    assert variant.size < sum(file.size for file in variant.needed)
    bundle.verify(variant)
    path = bundle.path(parent.entry)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        bundle.verify(variant)


def test_the_layers_that_a_gpu_host_found_are_shown_as_a_table(tmp_path):
    root = make_bundle(tmp_path / "made")
    assert "no TensorRT engine" in run("inspect", root, "--layers", ok=False)
    (added,) = mlflow_tdeploy.extend_model(root, engines=["fp32"])
    assert f"{added.id}: not listed yet" in run("inspect", root, "--layers")
    host = Fingerprint("linux-x86_64", gpu=Gpu("NVIDIA L4", "8.9"))
    layer = {"name": "/MatMul", "type": "gemm", "outputs": "Half [8, 3]", "tactic": "sm80_gemm"}
    for created, layers in (("2026-01-02", [layer]), ("2026-01-01", [])):  # the newest counts
        append_evidence(
            root / "tdeploy",
            Evidence(added.id, OPENED, {}, host=host, settings={"layers": layers}, created=created, files=added.digest),
        )
    output = run("inspect", root, "--layers")
    assert f"{added.id}: 1 layers, listed on NVIDIA L4" in output
    assert ["/MatMul", "gemm", "Half", "[8,", "3]", "sm80_gemm"] in [line.split() for line in output.splitlines()]


def test_what_was_measured_by_earlier_builds_is_kept_on_this_host(tmp_path):
    root = make_bundle(tmp_path / "made")
    mlflow_tdeploy.extend_model(root, engines=["fp32"])
    (cache,) = (tmp_path / "cache").rglob("*.cache")
    assert cache.name.startswith("tensorrt-rtx-")
    assert cache.read_bytes()
