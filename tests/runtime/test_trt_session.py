"""The logic of TensorRT sessions over a FAKE of TensorRT and CUDA; nothing here says anything about a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import FileRecord, Variant
from mlflow_tdeploy.runtime.backends import _trt_lane
from mlflow_tdeploy.runtime.backends._cuda import Cuda
from mlflow_tdeploy.runtime.backends._trt_engine import TrtEngine, TrtOptions, layers_of
from mlflow_tdeploy.runtime.backends._trt_session import TrtSession
from tests.bundles import SIGNATURE, WEIGHTS
from tests.runtime.fake_gpu import LISTING, SCRATCH, TRT, FakeCuda, FakeEngine

VARIANT = Variant(
    "trt-fp16-sm86", "trt", Precision("fp16", "fp16"), "cuda", "files/trt-fp16-sm86/model.plan",
    (FileRecord("files/trt-fp16-sm86/model.plan", "0" * 64, 10),),
)  # fmt: skip
WHOLE = ((1, 4), (2, 4), (8, 4))
SHORT, LONG = ((1, 4), (1, 4), (2, 4)), ((2, 4), (4, 4), (8, 4))


class Opened:
    def __init__(self, profiles=(WHOLE,), dtype="FLOAT", memory=1 << 20, keeps=False, **options):
        self.cuda = FakeCuda(memory)
        self.engine = FakeEngine(self.cuda, WEIGHTS, profiles, dtype, keeps=keeps)
        self.errors = []
        engine = TrtEngine(TRT, self.engine, Cuda(self.cuda, self.cuda), TrtOptions(**options), self.errors)
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
    assert opened.cuda.launched == 4
    assert len({context.scratch for context in opened.engine.contexts}) == 1
    for rows in (8, 2, 2, 2):  # larger buffers: what was recorded with the old addresses is not used again
        opened(rows, 3.0)


def test_shapes_in_turn_do_not_record_graphs_forever(monkeypatch):
    monkeypatch.setattr(_trt_lane, "_MOST_GRAPHS", 2)
    opened = Opened(contexts=1)
    for _ in range(20):
        for rows in (8, 3, 2):
            opened(rows)
    assert opened.cuda.instantiated == 2
    for _ in range(40):  # what comes more often now gets its graph
        opened(2)
    assert opened.cuda.instantiated == 3


def test_a_graph_that_cannot_be_made_ready_costs_nothing_but_itself():
    opened = Opened(contexts=1)
    opened.cuda.failing.add("cudaGraphInstantiate")
    for value in range(4):
        opened(2, value)
    assert (opened.cuda.launched, opened.cuda.graphs, len(opened.cuda.streams)) == (0, {}, 1)
    assert opened.cuda.last == 0
    assert len(opened.engine.contexts) == 2  # tried once


def test_no_graph_is_recorded_when_they_are_off():
    opened = Opened(cuda_graphs=False)
    for _ in range(5):
        opened(2)
    assert opened.cuda.launched == 0


def test_calls_from_many_threads_get_their_own_answers_from_as_many_lanes_as_allowed():
    opened = Opened(contexts=3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: opened(1 + index % 8, float(index)), range(200)))
    assert len(opened.cuda.streams) <= 3
    assert len({context.scratch for context in opened.engine.contexts}) == len(opened.cuda.streams)


def test_an_output_whose_shape_depends_on_values_is_returned_as_it_came():
    opened = Opened(keeps=True, contexts=1)
    for signs in ([1, -1, 1], [-1, -1], [1, 1, 1, 1], [1]):
        x = np.repeat(np.array(signs, np.float32)[:, None], 4, axis=1)
        np.testing.assert_allclose(opened.session.infer({"x": x})["y"], x[x[:, 0] >= 0] @ WEIGHTS)
    assert opened.cuda.instantiated == 0
    opened.session.close()
    assert opened.cuda.blocks == {}


class OnTensors(TrtSession):
    """Takes torch tensors of the CPU for those of its device."""

    device = "cpu"


def test_tensors_on_the_device_are_read_and_answered_where_they_are(monkeypatch):
    torch = pytest.importorskip("torch")
    opened = Opened(contexts=1)
    session = OnTensors(opened.session._engine, VARIANT, SIGNATURE)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    x, made, real = torch.ones(2, 4), [], torch.empty

    def empty(*arguments, **options):
        made.append(real(*arguments, **options))
        opened.cuda.adopt(made[-1].data_ptr(), made[-1].nbytes)
        return made[-1]

    opened.cuda.adopt(x.data_ptr(), x.nbytes)
    monkeypatch.setattr(torch, "empty", empty)
    answer = session.infer_tensors({"x": x})["y"]
    assert answer is made[0]
    np.testing.assert_allclose(answer.numpy(), x.numpy() @ WEIGHTS)
    assert [other for _, other in opened.cuda.waits] == [77]  # what computes the inputs ends first
    assert opened.cuda.host == {}  # nothing went through the host
    np.testing.assert_allclose(
        session.infer({"x": 2 * x.numpy()})["y"], 2 * x.numpy() @ WEIGHTS
    )  # its own memory again


def test_arrays_after_tensors_of_the_same_shape_are_not_read_where_those_were(monkeypatch):
    torch = pytest.importorskip("torch")
    opened = Opened(contexts=1, cuda_graphs=False)
    opened(2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    lane = opened.session._free.get()
    theirs = {name: np.ones(shape, np.float32) for name, shape in (("x", (2, 4)), ("y", (2, WEIGHTS.shape[1])))}
    for array in theirs.values():
        opened.cuda.adopt(array.ctypes.data, array.nbytes)
    lane.run_tensors({"x": theirs["x"]}, 0, lambda tensor, shape: theirs[tensor.name].ctypes.data, 77)
    np.testing.assert_allclose(theirs["y"], theirs["x"] @ WEIGHTS)  # done when it returns
    for array in theirs.values():  # theirs again
        del opened.cuda.blocks[array.ctypes.data]
    opened.session._free.put(lane)
    opened(2, 3.0)


def test_the_callers_device_is_his_own_again_after_a_call():
    opened = Opened(contexts=1)
    opened.cuda.cudaSetDevice(1)
    for _ in range(3):
        opened(2)
        assert opened.cuda.thread.device == 1
    opened.session.close()
    assert (opened.cuda.thread.device, opened.cuda.blocks) == (1, {})


def test_a_device_that_nobody_uses_is_not_chosen_again():
    """Every thread begins with the first one: choosing it takes memory there, and fails where it is occupied."""
    opened = Opened(contexts=1)
    opened.cuda.occupied.add(1)
    opened.cuda.thread.device = 1  # what a thread has that chose none
    opened(2)
    assert opened.cuda.used_devices == {0}


def test_what_a_failed_call_left_is_waited_for_before_its_memory_goes():
    opened = Opened(contexts=1, cuda_graphs=False)
    opened(2)
    copy, opened.cuda.cudaMemcpyAsync = opened.cuda.cudaMemcpyAsync, lambda *_: opened.cuda._error(1)
    lane = opened.session._free.get()
    lane._send = lambda tensor, array: opened.cuda.later(lane._stream, lambda: None)
    opened.session._free.put(lane)
    with pytest.raises(SessionError, match="CUDA error 1"):
        opened(2)
    opened.cuda.cudaMemcpyAsync = copy
    assert (opened.cuda.blocks, opened.cuda.queued) == ({}, {})
    opened(2)


def test_an_error_of_the_library_itself_is_a_session_error_and_leaves_no_lane():
    opened = Opened(contexts=1)
    opened.session._engine.profile_for = lambda shapes: 1 / 0
    with pytest.raises(SessionError, match="'trt-fp16-sm86': ZeroDivisionError: division by zero"):
        opened(2)


def test_sizes_that_grow_step_by_step_do_not_make_every_graph_useless():
    opened = Opened(profiles=(((1, 4), (2, 4), (64, 4)),), contexts=1)
    for rows in range(1, 65):
        opened(rows)
    opened(60)
    opened(60)
    assert opened.cuda.launched == 1  # recorded at its second call: no memory had to grow since the first


def test_tensors_elsewhere_are_copied():
    torch = pytest.importorskip("torch")
    answer = Opened().session.infer_tensors({"x": torch.ones(2, 4)})["y"]
    assert (answer.device.type, answer.dtype) == ("cpu", torch.float32)
    np.testing.assert_allclose(answer.numpy(), np.ones((2, 4)) @ WEIGHTS)


def test_facts_tell_profiles_and_layers():
    facts = Opened((SHORT, LONG), "HALF").session.facts()
    assert facts["profiles"] == [{"x": [[1, 4], [2, 4]]}, {"x": [[2, 4], [8, 4]]}]
    assert (facts["tensors"], facts["device_memory"]) == ({"x": "float16", "y": "float16"}, SCRATCH)
    assert facts["layers"] == layers_of(LISTING) == [
        {"name": "/MatMul", "type": "gemm", "outputs": "Row major linear FP16 format [8, 2]", "tactic": "sm80_gemm"},
        {"name": "cast", "type": "Reformat", "outputs": "", "tactic": ""},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("listing", "names"),
    [
        ('{"Layers": ["a", "b"]}', ["a", "b"]),
        ("", []),
        ("[]", []),
        ('{"Layers": null}', []),
        ('{"Layers": [{}]}', [""]),
    ],
)
def test_layers_of_reads_what_there_is(listing, names):
    assert [layer["name"] for layer in layers_of(listing)] == names


def test_infer_says_how_much_memory_is_missing_and_answers_smaller_requests_afterwards():
    opened = Opened(memory=100 + SCRATCH, contexts=1)
    with pytest.raises(SessionError, match="out of GPU memory: 0 MiB wanted"):
        opened(8)
    assert opened.cuda.last == 0  # nobody takes it for an error of his own
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
