"""ONNX Runtime's GPU providers, as far as a machine without a GPU shows; the CPU's provider stands in where said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.backends.ort_gpu import OrtCuda, OrtGpuOptions, OrtTensorRt, profile_shapes
from mlflow_tdeploy.runtime.base import Fit
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import SIGNATURE, WEIGHTS, make_bundle

X = np.array([[1, 2, 3, 4]], np.float32)
HOST = Fingerprint("linux-x86_64", gpu=Gpu("NVIDIA H200", "9.0"))
without_gpu = pytest.mark.skipif(probe.gpu()[0] is not None, reason="what is said where there is no GPU")


class StandIn(OrtCuda):
    """The same code over the CPU's provider: no evidence about any GPU."""

    provider = "CPUExecutionProvider"
    memory = "cpu"

    def _providers(self, variant, signature, device):
        return [self.provider]


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(make_bundle(tmp_path))


def variant(bundle, **changes):
    return dataclasses.replace(bundle.variants["onnx-fp32"], **changes)


def test_a_bound_session_infers_what_the_graph_computes(bundle):
    session = StandIn().open(bundle.root, variant(bundle), SIGNATURE, SessionOptions())
    for rows in (1, 3, 2):
        x = np.repeat(X, rows, axis=0)
        np.testing.assert_allclose(session.infer({"x": x})["y"], x @ WEIGHTS, rtol=1e-6)
    with pytest.raises(SessionError, match="ONNX Runtime failed in variant 'onnx-fp32'"):
        session.infer({"x": np.ones((1, 5), np.float32)})
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.infer({"x": X})


@without_gpu
@pytest.mark.parametrize("runtime", [OrtCuda, OrtTensorRt])
def test_a_provider_that_is_quietly_left_out_is_an_error(bundle, runtime):
    """ONNX Runtime goes on with the CPU where CUDA cannot be loaded, and says nothing that a program could see."""
    with pytest.raises(SessionError, match=f"left out its {runtime.provider} and would use CPUExecutionProvider"):
        runtime().open(bundle.root, variant(bundle), SIGNATURE, SessionOptions())
    with pytest.raises(SessionError, match="left out its"):
        runtime().self_test()


@pytest.mark.parametrize(
    ("runtime", "changes", "fit"),
    [
        (OrtCuda, {}, Fit.USABLE),
        (OrtCuda, {"device": "cuda"}, Fit.OPTIMAL),
        (OrtCuda, {"device": "cpu"}, Fit.UNSUPPORTED),
        (OrtTensorRt, {}, Fit.USABLE),
        (OrtTensorRt, {"device": "cuda"}, Fit.UNSUPPORTED),
    ],
)
def test_probe_says_what_fits_a_gpu(bundle, monkeypatch, runtime, changes, fit):
    monkeypatch.setattr(runtime, "version", lambda self: "1.31.1")
    assert runtime().probe(HOST, variant(bundle, **changes)).fit is fit
    assert runtime().probe(Fingerprint("linux-x86_64"), variant(bundle, **changes)).reason.startswith("no NVIDIA GPU")
    newer = runtime().probe(HOST, variant(bundle, requires={"onnxruntime": "99"}, **changes))
    assert newer.otherwise is (fit if fit is not Fit.UNSUPPORTED else None)


def test_profiles_are_the_signatures_ranges():
    dims = (Dim("batch", 1, 8, 32), Dim("sequence", 1, 128, 512))
    inputs = (TensorSpec("ids", "int64", ("batch", "sequence")), TensorSpec("k", "float32", ()))
    signature = Signature(dims, inputs, (TensorSpec("y", "float32", ("batch", 4)),))
    assert profile_shapes(signature, "min") == "ids:1x1"
    assert profile_shapes(signature, "opt") == "ids:8x128"
    assert profile_shapes(signature, "max") == "ids:32x512"


def test_options_of_the_gpu_are_keys_of_model_config():
    options = SessionOptions.of({"device_id": "1", "arena": False}, [OrtGpuOptions])
    assert options.settings(OrtGpuOptions) == OrtGpuOptions(device_id=1, arena=False)


def test_engines_of_one_graph_with_other_weights_are_kept_apart(tmp_path, monkeypatch):
    """ONNX Runtime names them by the graph: version 8 of a model would get the engine of version 7."""
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    folders = set()
    for index, weights in enumerate((WEIGHTS, WEIGHTS + 1, WEIGHTS)):
        bundle = Bundle.open(make_bundle(tmp_path / str(index), {"onnx-fp32": weights}))
        (_, settings), *_ = OrtTensorRt()._providers(bundle.variants["onnx-fp32"], bundle.manifest.signature, 0)
        folders.add(settings["trt_engine_cache_path"])
    assert len(folders) == 2


@pytest.mark.parametrize("kind", [OrtCuda, OrtTensorRt])
def test_full_precision_stays_full_on_cuda(bundle, tmp_path, monkeypatch, kind):
    """ONNX Runtime takes TF32 by itself, which is not what a verdict on fp32 from elsewhere is about."""
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    providers = kind()._providers(bundle.variants["onnx-fp32"], bundle.manifest.signature, 1)
    (options,) = [given for name, given in (one for one in providers if len(one) == 2) if name.startswith("CUDA")]
    assert options == {"device_id": 1, "use_tf32": 0}
