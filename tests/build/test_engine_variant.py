"""Engines as variants, built for real by TensorRT-RTX; without a GPU they are not run."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.build.engine_options import EngineOptions, engine_id
from mlflow_tdeploy.build.engine_variant import build_engine_variant
from mlflow_tdeploy.core.engine import PlanHeader
from mlflow_tdeploy.core.errors import BuildError, InvalidInputError
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.writer import append_variant

pytest.importorskip("tensorrt_rtx", reason="engines are built by the package tensorrt-rtx")
without_gpu = pytest.mark.skipif(probe.gpu()[0] is not None, reason="what is said where there is no GPU")


def test_engine_id_names_module_precision_and_gpu():
    host = Fingerprint("linux-x86_64", gpu=Gpu("NVIDIA H200", "9.0"))
    assert engine_id("tensorrt", "fp16", host) == "trt-fp16-sm90"
    assert engine_id("tensorrt_rtx", "fp32", host) == "trt-rtx-fp32"


@without_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_build_engine_variant_records_where_the_engine_comes_from(tiny_bundle, tmp_path, precision):
    bundle = Bundle.open(tiny_bundle)
    engine = EngineOptions(precision, profiles=[{"sequence": (3, 8, 16)}, {"sequence": (16, 32, 64)}])
    built = build_engine_variant(bundle, engine, tmp_path)
    variant, parent = built.variant, bundle.variants[f"onnx-{precision}"]
    assert (variant.id, variant.format, variant.parent) == (f"trt-rtx-{precision}", "trt", parent.id)
    assert variant.precision == parent.precision
    assert variant.engine.onnx_sha256 in {file.sha256 for file in parent.files}
    assert [profile["input_ids"] for profile in variant.engine.profiles] == [
        ((1, 3), (4, 8), (8, 16)), ((1, 16), (4, 32), (8, 64))
    ]  # fmt: skip
    plan = (built.staged / variant.entry).read_bytes()
    assert variant.engine.contradicts(PlanHeader.read(plan)) is None
    assert built.evidence == ()
    assert "not checked: there is no GPU here" in built.steps[-1].detail


@without_gpu
def test_an_engine_does_not_keep_onnx_runtime_from_serving_where_there_is_no_gpu(tiny_bundle, tmp_path):
    import shutil

    shutil.copytree(tiny_bundle, tmp_path / "model")
    (tmp_path / "work").mkdir()
    bundle = Bundle.open(tmp_path / "model")
    built = build_engine_variant(bundle, EngineOptions("fp16"), tmp_path / "work")
    append_variant(bundle.root, built.variant, built.staged, built.evidence)
    with open_model(tmp_path / "model") as model:
        assert model.decision.chosen.runtime == "ort-cpu"
        reasons = {(c.variant, c.runtime): c.reason for c in model.decision.candidates}
        assert reasons["trt-rtx-fp16", "tensorrt-rtx"] == "no accuracy evidence yet"


def test_build_engine_variant_says_which_graphs_there_are(tiny_bundle, tmp_path):
    with pytest.raises(InvalidInputError, match="no 'onnx-fp8' to be had. It has: onnx-fp16, onnx-fp32"):
        build_engine_variant(Bundle.open(tiny_bundle), EngineOptions("fp8"), tmp_path)


def test_build_engine_variant_leaves_nothing_staged_when_the_builder_fails(tiny_bundle, tmp_path):
    with pytest.raises(BuildError, match="built no engine.*workspace"):
        build_engine_variant(Bundle.open(tiny_bundle), EngineOptions("fp32", workspace=1024), tmp_path)
    assert not (tmp_path / "staged").exists()
