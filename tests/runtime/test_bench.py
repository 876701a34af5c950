import dataclasses

import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import Bulk
from mlflow_tdeploy.runtime.bench import contenders, time_contenders
from mlflow_tdeploy.runtime.latency import Contender
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, make_bundle


@pytest.mark.parametrize(
    ("axes", "dims", "items"),
    [
        (("batch_size", 4), (Dim("batch_size", 1, 2, 8),), 8),  # as optimum calls it
        ((8, 4), (), 8),
        (("batch", 4), (Dim("batch", 1, 2, 8),), 8),
        ((), (), 1),
    ],
)
def test_throughput_counts_the_rows_whatever_their_dimension_is_called(tmp_path, axes, dims, items):
    bundle = Bundle.open(make_bundle(tmp_path))
    signature = Signature(dims, (TensorSpec("x", "float32", axes),), (TensorSpec("y", "float32", axes),))
    bundle.manifest = dataclasses.replace(bundle.manifest, signature=signature)
    one = Contender("v", "ort-cpu", lambda feeds: feeds, Bulk(1, 4096, 1))
    (row,) = time_contenders(bundle, [one], [{dim.name: dim.max for dim in dims}], rounds=3, seconds=1)
    assert row.throughput * row.timing.mean_ms / 1e3 == pytest.approx(items)


@pytest.mark.parametrize(("hint", "given", "used"), [(None, 0, 256), (96, 0, 96), (96, 64, 64), ("many", 0, 256)])
def test_contenders_take_the_token_budget_that_serves(tmp_path, hint, given, used):
    session = {} if hint is None else {"token_budget": hint}
    bundle = Bundle.open(make_bundle(tmp_path, changes={"onnx-fp32": {"session": session}}))
    candidates = decide_bundle(bundle, probe.hardware()).openable
    with contenders(bundle, candidates, SessionOptions(token_budget=given)) as (one,):
        assert one.bulk.token_budget == used


def test_contenders_leave_out_what_cannot_serve_and_say_so(tmp_path, caplog):
    root = make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": -WEIGHTS})
    candidates = decide_bundle(Bundle.open(root), probe.hardware()).openable
    with contenders(Bundle.open(root), candidates) as found:
        assert [one.variant for one in found] == ["onnx-fp32"]
    assert "ort-cpu-fp32 cannot serve on ort-cpu: its answer to a golden request is wrong" in caplog.text
    wrong = [candidate for candidate in candidates if candidate.variant == "ort-cpu-fp32"]
    with pytest.raises(SessionError, match="golden request"), contenders(Bundle.open(root), wrong):
        pass


def test_contenders_leave_out_what_cannot_be_fetched(tmp_path, caplog):
    root, fetched = make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}), []

    def fetch(variant):
        fetched.append(variant.id)
        if variant.id == "ort-cpu-fp32":
            raise ConnectionError("the store hung up")

    bundle = Bundle.open(root)
    candidates = decide_bundle(bundle, probe.hardware()).openable
    with contenders(bundle, candidates, fetch=fetch) as found:
        assert [one.variant for one in found] == ["onnx-fp32"]
    assert set(fetched) == {"onnx-fp32", "ort-cpu-fp32"}
    assert "ort-cpu-fp32 cannot serve on ort-cpu: the store hung up" in caplog.text
