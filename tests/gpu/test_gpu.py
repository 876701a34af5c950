"""What only a GPU can show: ``pytest -m gpu``, and ``-m tensorrt`` for what needs a TensorRT, too.

Never run yet, see docs/verified.md. Elsewhere each test says why it is skipped.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.store.bundle import Bundle

pytestmark = pytest.mark.gpu
SHAPES = {"batch": (1, 4, 8), "sequence": (1, 16, 32)}
TEXTS = ["a good film", "bad", "a rather long text about a film that was neither good nor bad", "good"]


@pytest.fixture(scope="module", autouse=True)
def gpu():
    found, why = probe.gpu()
    if found is None:
        pytest.skip(f"needs an NVIDIA GPU: {why}")
    return found


def _module():
    for name, runtime in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        if importlib.util.find_spec(name) is not None and RUNTIMES.get(runtime)().missing() is None:
            return name
    pytest.skip("needs tensorrt or tensorrt-rtx, and cuda-bindings")
    return ""


@pytest.fixture(scope="module")
def model(tiny_bert, tmp_path_factory):
    """A logged classifier with graphs in both precisions."""
    path = tmp_path_factory.mktemp("gpu") / "model"
    mlflow_tdeploy.save_model(str(tiny_bert), path, shapes=SHAPES, precisions=["fp32", "fp16"])
    return path


@pytest.fixture(scope="module")
def reference(model):
    with mlflow_tdeploy.load_model(model, variant="onnx-fp32", runtime="ort-cpu") as opened:
        return opened.predict(TEXTS)


def _scores(answers):
    return [answer["score"] for answer in answers]


def test_the_driver_tells_what_the_gpu_is(gpu):
    assert gpu.name
    assert float(gpu.compute_capability) >= 5
    assert gpu.memory > 2**30


@pytest.mark.parametrize("variant", ["onnx-fp32", "onnx-fp16"])
def test_ort_cuda_answers_as_the_cpu_does(model, reference, variant):
    if why := RUNTIMES.get("ort-cuda")().missing():
        pytest.skip(why)
    mlflow_tdeploy.verify_model(model, [variant])
    with mlflow_tdeploy.load_model(model, variant=variant, runtime="ort-cuda") as opened:
        assert (opened.decision.chosen.variant, opened.decision.chosen.runtime) == (variant, "ort-cuda")
        np.testing.assert_allclose(_scores(opened.predict(TEXTS)), _scores(reference), atol=0.02)


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_that_is_built_here_is_verified_and_serves(model, reference, gpu, precision):
    module = _module()
    engine = mlflow_tdeploy.EngineOptions(precision=precision, module=module, id=f"trt-test-{precision}")
    (added,) = mlflow_tdeploy.extend_model(str(model), engines=[engine])
    assert added.built_for.gpu == gpu
    assert added.engine.gpu == gpu.name
    (verdict, *_) = Bundle.open(model).evidence(added.id)
    assert verdict.passed, verdict.violations
    with mlflow_tdeploy.load_model(model, variant=added.id) as opened:
        np.testing.assert_allclose(_scores(opened.predict(TEXTS)), _scores(reference), atol=0.02)
        with ThreadPoolExecutor(8) as pool:  # more callers than contexts
            answers = list(pool.map(lambda index: opened.predict(TEXTS[index % 4 :]), range(64)))
        for index, answer in enumerate(answers):
            np.testing.assert_allclose(_scores(answer), _scores(reference[index % 4 :]), atol=0.02)


@pytest.mark.tensorrt
def test_repeated_shapes_answer_alike_with_and_without_cuda_graphs(model):
    module = _module()
    engine = mlflow_tdeploy.EngineOptions(precision="fp32", module=module, id="trt-test-graphs")
    mlflow_tdeploy.extend_model(str(model), engines=[engine])
    bundle = Bundle.open(model)
    runtime = RUNTIMES.get("tensorrt" if module == "tensorrt" else "tensorrt-rtx")()
    variant, signature = bundle.variants["trt-test-graphs"], bundle.manifest.signature
    feeds = bundle.task().example_feeds("opt", ragged=True)
    answers = []
    for graphs in (False, True):
        session = runtime.open(bundle.root, variant, signature, SessionOptions(own={"cuda_graphs": graphs}))
        answers += [session.infer(feeds)["logits"] for _ in range(4)]  # the second call records, the third replays
        session.close()
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=1e-4)


@pytest.mark.tensorrt
def test_a_shape_that_no_profile_covers_is_named(model):
    module = _module()
    engine = mlflow_tdeploy.EngineOptions(
        precision="fp32", module=module, id="trt-test-narrow", profiles=[{"batch": (1, 2, 2)}]
    )
    mlflow_tdeploy.extend_model(str(model), engines=[engine])
    bundle = Bundle.open(model)
    runtime = RUNTIMES.get("tensorrt" if module == "tensorrt" else "tensorrt-rtx")()
    session = runtime.open(bundle.root, bundle.variants["trt-test-narrow"], bundle.manifest.signature, SessionOptions())
    with pytest.raises(SessionError, match=r"no profile of the engine covers 'input_ids' of shape \(8, 32\)"):
        session.infer(bundle.task().example_feeds("max", ragged=False))
    session.close()
