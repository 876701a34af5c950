"""One suite over every registered runtime: what the code above it relies on, whatever the runtime."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.tensors import numpy_dtype
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES, Fit
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.store.bundle import Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_bert):
    """A classifier with an original and a portable graph: something to open for every runtime that exists."""
    from mlflow_tdeploy.build.options import BuildOptions
    from mlflow_tdeploy.build.pipeline import build_bundle
    from mlflow_tdeploy.source.resolve import resolve
    from mlflow_tdeploy.store.writer import BundleDraft

    root = tmp_path_factory.mktemp("contract")
    build_bundle(
        resolve(tiny_bert), BundleDraft(root / "tdeploy"), BuildOptions(precisions=("onnx-fp32",), measure=False)
    )
    return Bundle.open(root)


@pytest.fixture(params=RUNTIMES.names())
def runtime(request):
    found = RUNTIMES.get(request.param)()
    if reason := found.missing():
        pytest.skip(reason)
    if found.tier == 0 and probe.gpu()[0] is None:
        pytest.skip(f"{found.name} needs an NVIDIA GPU: {probe.gpu()[1]}")
    return found


@pytest.fixture
def variant(runtime, bundle):
    """The first variant that the runtime says it can open."""
    for variant in bundle.variants.values():
        if variant.format in runtime.formats and runtime.probe(probe.host(), variant).can_open:
            return variant
    if runtime.formats == {"trt"}:
        pytest.skip("engines are built and opened in tests/gpu")
    pytest.fail(f"{runtime.name} opens no variant of a plain classifier: {runtime.formats}")
    return None


@pytest.fixture
def session(runtime, variant, bundle):
    opened = runtime.open(bundle.root, variant, bundle.manifest.signature, SessionOptions())
    yield opened
    opened.close()


def test_runtime_describes_itself(runtime):
    assert runtime.name in RUNTIMES
    assert runtime.version()
    assert runtime.install.startswith("pip install ")


def test_probe_gives_a_reason_for_every_variant(runtime, bundle):
    for variant in bundle.variants.values():
        compat = runtime.probe(probe.host(), variant)
        assert isinstance(compat.fit, Fit)
        assert compat.reason


def test_session_answers_golden_requests_within_the_budget(session, bundle):
    for request in bundle.golden():
        got = session.infer(request.feeds)
        np.testing.assert_allclose(got["logits"], request.outputs["logits"], atol=1e-4)


def test_session_returns_the_signatures_outputs_and_dtypes(session, bundle):
    got = session.infer(bundle.golden()[0].feeds)
    assert {name: array.dtype for name, array in got.items()} == {
        spec.name: numpy_dtype(spec.dtype) for spec in bundle.manifest.signature.outputs
    }


def test_session_does_not_change_its_inputs(session, bundle):
    feeds = bundle.golden()[0].feeds
    before = {name: array.copy() for name, array in feeds.items()}
    session.infer(feeds)
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, before[name])


def test_session_gives_each_thread_its_own_answer(session, bundle):
    requests = list(bundle.golden()) * 8
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda request: session.infer(request.feeds)["logits"], requests))
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer, request.outputs["logits"], atol=1e-4)


def test_session_names_the_variant_when_it_fails(session, variant):
    with pytest.raises(SessionError, match=f"variant '{variant.id}'"):
        session.infer({"input_ids": np.zeros((1, 1, 1), np.int64)})


def test_session_refuses_after_close(session, bundle):
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.infer(bundle.golden()[0].feeds)


def test_open_raises_our_error_when_the_files_are_gone(runtime, variant, bundle, tmp_path):
    with pytest.raises(SessionError, match=f"variant '{variant.id}'"):
        runtime.open(tmp_path, variant, bundle.manifest.signature, SessionOptions())
