"""The logic of TensorRT sessions over a FAKE of TensorRT and CUDA; nothing here says anything about a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import FileRecord, Variant
from mlflow_tdeploy.runtime.backends._cuda import Cuda
from mlflow_tdeploy.runtime.backends._trt_session import TrtEngine, TrtOptions, TrtSession
from tests.bundles import SIGNATURE, WEIGHTS
from tests.runtime.fake_gpu import TRT, FakeCuda, FakeEngine

VARIANT = Variant(
    "trt-fp16-sm86", "trt", Precision("fp16", "fp16"), "cuda", "files/trt-fp16-sm86/model.plan",
    (FileRecord("files/trt-fp16-sm86/model.plan", "0" * 64, 10),),
)  # fmt: skip
WHOLE = ((1, 4), (2, 4), (8, 4))
SHORT, LONG = ((1, 4), (1, 4), (2, 4)), ((2, 4), (4, 4), (8, 4))


class Opened:
    def __init__(self, profiles=(WHOLE,), dtype="FLOAT", memory=1 << 20, **options):
        self.cuda = FakeCuda(memory)
        self.engine = FakeEngine(self.cuda, WEIGHTS, profiles, dtype)
        self.errors = []
        engine = TrtEngine(TRT, self.engine, Cuda(self.cuda), TrtOptions(**options), self.errors)
        self.session = TrtSession(engine, VARIANT, SIGNATURE)

    def __call__(self, rows, value=1.0):
        x = np.full((rows, 4), value, np.float32)
        np.testing.assert_allclose(self.session.infer({"x": x})["y"], x @ WEIGHTS, rtol=2e-3)


def test_infer_answers_for_sizes_that_grow_and_shrink():
    opened = Opened()
    for rows in (2, 1, 8, 3, 8, 1):
        opened(rows, rows)


def test_infer_converts_to_the_engines_dtypes_and_back():
    opened = Opened(dtype="HALF")
    result = opened.session.infer({"x": np.ones((2, 4), np.float32)})["y"]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, np.ones((2, 4)) @ WEIGHTS, rtol=2e-3)


def test_answers_of_earlier_calls_stay_what_they_were():
    opened = Opened(contexts=1)
    first = opened.session.infer({"x": np.ones((2, 4), np.float32)})["y"]
    kept = first.copy()
    opened(2, 5.0)
    np.testing.assert_array_equal(first, kept)


def test_infer_takes_the_narrowest_profile_that_covers_the_request():
    opened = Opened((LONG, SHORT), contexts=1, cuda_graphs=False)
    for rows in (1, 2, 3, 8, 1):
        opened(rows)
    assert opened.engine.contexts[0].used_profiles == [1, 1, 0, 0, 1]


def test_infer_says_what_the_engine_takes_when_no_profile_covers_the_request():
    with pytest.raises(
        SessionError, match=r"'trt-fp16-sm86'.*covers 'x' of shape \(9, 4\); it takes \(1, 4\) to \(8, 4\)"
    ):
        Opened().session.infer({"x": np.ones((9, 4), np.float32)})


def test_a_shape_that_comes_again_is_replayed_as_a_graph_and_answers_the_same():
    opened = Opened(contexts=1)
    for value in range(6):
        opened(2, value)
    assert opened.cuda.launched == 5
    for rows in (8, 2, 2, 2):  # larger buffers: what was recorded with the old addresses is not used again
        opened(rows, 3.0)


def test_no_graph_is_recorded_when_they_are_off():
    opened = Opened(cuda_graphs=False)
    for _ in range(5):
        opened(2)
    assert opened.cuda.launched == 0


def test_calls_from_many_threads_get_their_own_answers_from_as_many_contexts_as_allowed():
    opened = Opened(contexts=3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: opened(1 + index % 8, float(index)), range(200)))
    assert len(opened.engine.contexts) <= 3


def test_infer_says_how_much_memory_is_missing_and_answers_smaller_requests_afterwards():
    opened = Opened(memory=100, contexts=1)
    with pytest.raises(SessionError, match="out of GPU memory: 0 MiB wanted"):
        opened(8)
    opened(2)


def test_a_context_that_failed_is_closed_and_another_one_takes_its_place():
    opened = Opened(contexts=1, cuda_graphs=False)
    opened(2)
    opened.engine.contexts[0].fails = True
    opened.errors.append("Error Code 1: something  broke")
    with pytest.raises(SessionError, match="could not run the engine: Error Code 1: something broke"):
        opened(2)
    opened(2)
    assert len(opened.engine.contexts) == 2


def test_an_error_of_cuda_is_a_session_error():
    opened = Opened(contexts=1)
    opened.cuda.failing.add("cudaStreamSynchronize")
    with pytest.raises(
        SessionError, match="cudaStreamSynchronize failed with CUDA error 700: an illegal memory access"
    ):
        opened(2)


def test_close_gives_everything_back_and_refuses_afterwards():
    opened = Opened(contexts=2)
    for _ in range(4):
        opened(2)
    opened.session.close()
    opened.session.close()
    cuda = opened.cuda
    assert (cuda.blocks, cuda.host, cuda.streams, cuda.graphs) == ({}, {}, set(), {})
    with pytest.raises(SessionError, match="closed"):
        opened(2)
