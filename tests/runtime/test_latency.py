import dataclasses
import threading
import time

import numpy as np
import pytest

from mlflow_tdeploy.core.evidence import recorded_shapes
from mlflow_tdeploy.core.hardware import Fingerprint, host_cpu
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime import latency, probe
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu, OrtSession
from mlflow_tdeploy.runtime.backends.ort_gpu import OrtCuda
from mlflow_tdeploy.runtime.backends.tensorrt import TensorRt
from mlflow_tdeploy.runtime.backends.torch_reference import TorchReference
from mlflow_tdeploy.runtime.base import Bulk
from mlflow_tdeploy.runtime.latency import Contender, measure_latency, time_shape
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.options import SessionOptions
from tests.flavor.text_bundles import make_text_bundle

HOST = Fingerprint("x86_64", "some CPU", cores=2, memory=1)


@pytest.fixture
def task(tmp_path):
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    output = TensorSpec("y", "float32", ("batch",))
    dims = (Dim("batch", 1, 4, 8), Dim("sequence", 4, 128, 512))
    return TASKS.get("tensors")({}, Signature(dims, (ids,), (output,)), tmp_path)


class Seen:
    """An ``infer`` that remembers the shapes it was given and the threads it ran in."""

    def __init__(self, seconds=0.0):
        self.seconds, self.shapes, self.threads = seconds, [], set()

    def __call__(self, feeds):
        self.shapes.append(feeds["input_ids"].shape)
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return feeds

    def contender(self, name="v", *, split=True):
        return Contender(name, "ort-cpu", self, Bulk(2, 256, 1) if split else Bulk(1, 4096, 2))


def test_recorded_shapes_are_one_short_item_and_opt(task):
    assert recorded_shapes(task.signature) == ({"batch": 1, "sequence": 16}, {"batch": 4, "sequence": 128})


def test_recorded_short_shape_stays_within_the_range():
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence", "channel"))
    dims = (Dim("batch", 2, 4, 8), Dim("sequence", 32, 64, 128), Dim("channel", 3, 5, 9))
    assert recorded_shapes(Signature(dims, (ids,), (TensorSpec("y", "float32", ("batch",)),)))[0] == {
        "batch": 2,
        "sequence": 32,
        "channel": 3,
    }


def test_a_batch_is_timed_as_it_is_served(task):
    served, whole = Seen(0.002), Seen()
    time_shape([served.contender(), whole.contender(split=False)], task, {"batch": 4, "sequence": 128}, seconds=0.1)
    assert set(served.shapes) == {(2, 128)}  # 256 tokens a batch, side by side
    assert len(served.threads) == 2
    assert set(whole.shapes) == {(4, 128)}
    assert whole.threads == {threading.get_ident()}


def test_a_batch_is_split_by_the_variants_token_budget(task):
    narrow = Seen()
    one = dataclasses.replace(narrow.contender(), bulk=Bulk(2, 128, 1))
    time_shape([one], task, {"batch": 4, "sequence": 128}, seconds=0.1)
    assert set(narrow.shapes) == {(1, 128)}


def test_short_and_opt_figures_are_each_of_their_own_shape(task):
    class ByTokens(Seen):
        def __call__(self, feeds):
            self.seconds = feeds["input_ids"].size / 50_000  # 0.3 and 10 ms
            return super().__call__(feeds)

    whole = ByTokens()
    (record,) = measure_latency([whole.contender(split=False)], task, HOST, seconds=0.4)
    assert set(whole.shapes) == {(1, 16), (4, 128)}
    assert record.metrics["short_p50_ms"] < 9 < record.metrics["p50_ms"]
    assert record.settings["workers"] == 1


def test_timings_come_in_the_order_of_the_contenders(task):
    slow, fast = Seen(0.01), Seen(0.001)
    timings = time_shape([slow.contender("s"), fast.contender("f")], task, {"batch": 1, "sequence": 8}, seconds=0.3)
    assert timings[0].p50_ms > 9 > timings[1].p50_ms
    assert timings[0].count == timings[1].count >= 3


def test_each_call_is_preceded_by_a_rest(task, monkeypatch):
    """Without it a call pays for the threads that the one before left spinning."""
    rests = []
    monkeypatch.setattr(latency, "_PAUSE", 0.02)  # as it is outside of tests (conftest.py)
    monkeypatch.setattr(time, "sleep", rests.append)
    timings = time_shape(
        [Seen().contender(), Seen().contender()], task, {"batch": 1, "sequence": 8}, rounds=5, seconds=9
    )
    assert [rest for rest in rests if rest >= 0.01] == [0.02] * 2 * timings[0].count


def test_evidence_tells_what_was_measured_where(task):
    found = measure_latency([Seen(0.001).contender("b"), Seen(0.002).contender("a")], task, HOST, seconds=0.4)
    assert [record.variant for record in found] == ["b", "a"]
    record = found[0]
    assert record.shapes == ("short_p50_ms: batch=1,sequence=16", "p50_ms: batch=4,sequence=128")
    assert {key: record.settings[key] for key in ("runtime", "intra_op_threads", "token_budget")} == {
        "runtime": "ort-cpu",
        "intra_op_threads": 1,
        "token_budget": 256,
    }
    assert record.settings["interleaved_with"] == ["a", "b"]
    assert "split as they are served" in record.settings["batches"]
    assert record.host == HOST
    assert 0 < record.metrics["short_p50_ms"] < record.metrics["p50_ms"] * 2
    assert record.metrics["short_count"] >= 3
    assert np.isfinite(list(record.metrics.values())).all()


def test_nothing_to_measure_is_no_evidence(task):
    assert measure_latency([], task, HOST) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Bulk(4, 256, 1)),
        ({"intra_op_threads": 2}, Bulk(2, 256, 2)),
        ({"intra_op_threads": 8}, Bulk(1, 256, 8)),
        ({"threads": 3, "token_budget": 64}, Bulk(3, 64, 1)),
        ({"threads": 1}, Bulk(1, 256, 1)),
    ],
)
def test_processors_are_shared_out_among_batches_that_run_side_by_side(options, expected):
    variant = Variant("onnx-fp32", "onnx", Precision(), "any", "files/onnx-fp32/model.onnx", ())
    assert OrtCpu().bulk(variant, SessionOptions(**options), 4) == expected
    hinted = dataclasses.replace(variant, session={"token_budget": 32})
    assert OrtCpu().bulk(hinted, SessionOptions(), 4) == Bulk(4, 32, 1)


def test_a_runtime_that_takes_the_whole_device_gets_large_batches_one_after_the_other():
    variant = Variant("hf", "hf", Precision(), "any", "source", ())
    for runtime in (TorchReference(), OrtCuda()):
        bulk = runtime.bulk(variant, SessionOptions(), 4)
        assert bulk.workers == 1
        assert bulk.token_budget >= 4096
        assert bulk.threads == (4 if runtime.name == "torch" else 1)
    assert TensorRt().bulk(variant, SessionOptions(own={"contexts": 3}), 4).workers == 3


@pytest.mark.parametrize("options", [{}, {"intra_op_threads": 2}, {"threads": 2, "token_budget": 8}])
def test_what_is_measured_is_what_is_served(tmp_path, monkeypatch, options):
    """The graph sees the same batches, whether a request or a benchmark brings them."""
    monkeypatch.setattr(probe, "hardware", lambda: dataclasses.replace(host_cpu(), cores=2))
    monkeypatch.setattr(latency, "usable_cores", lambda: 2)
    seen, infer = [], OrtSession.infer
    monkeypatch.setattr(OrtSession, "infer", lambda self, feeds: (seen.append(feeds), infer(self, feeds))[1])
    root, given = make_text_bundle(tmp_path), SessionOptions(**options)
    with open_model(root, options=given) as model:
        seen.clear()
        model.predict(["a good film a good film a good"] * 4)
        served = sorted(feeds["input_ids"].shape for feeds in seen)
        chosen, bundle = model.decision.chosen, model.bundle
        runtime = OrtCpu()
        session = runtime.open(bundle.root, bundle.variants[chosen.variant], model.signature, given)
        contender = Contender.served(bundle.variants[chosen.variant], runtime, session.infer, given)
        seen.clear()
        time_shape([contender], model.task, {"batch": 4, "sequence": 8}, rounds=1, seconds=1)
        assert sorted(feeds["input_ids"].shape for feeds in seen) == sorted(served * (len(seen) // len(served)))
        session.close()
