import dataclasses
import gc
import json
import logging
import re
import shutil
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, NoVariantError, SessionError
from mlflow_tdeploy.core.golden import GoldenRequest, check_golden
from mlflow_tdeploy.core.hardware import host_cpu
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu, OrtSession
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.runtime.sessions import check_encoding
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, linear_graph, make_bundle
from tests.flavor.text_bundles import make_text_bundle

X = np.array([[1, 2, 3, 4]], np.float32)
BOTH = {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}


def test_open_model_serves_the_best_variant(tmp_path):
    with open_model(make_bundle(tmp_path, BOTH)) as model:
        assert model.decision.chosen.variant == "ort-cpu-fp32"
        np.testing.assert_allclose(model.predict({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)
        np.testing.assert_allclose(model.infer({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)
        assert set(model.variants) == set(BOTH)


def test_open_model_falls_back_loudly_when_a_weight_was_tampered_with(tmp_path, caplog):
    root = make_bundle(tmp_path, BOTH)
    path = root / "tdeploy/files/ort-cpu-fp32/model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "mlflow_tdeploy"), open_model(root) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert "ort-cpu-fp32/model.onnx" in model.decision.failures[0]
    assert "ort-cpu-fp32 cannot serve" in caplog.text


def test_open_model_refuses_a_tokenizer_that_was_changed(tmp_path):
    """Of the same size, so that only its digest tells: no variant would answer as it should."""
    root = make_text_bundle(tmp_path)
    path = root / "tdeploy/assets/tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"good"', '"gxxd"'))
    assert len(path.read_text()) == len(text)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json' was changed"):
        open_model(root)


def test_open_model_refuses_a_library_that_encodes_a_golden_request_in_another_way(tmp_path, monkeypatch):
    root = make_text_bundle(tmp_path)
    task = Bundle.open(root).task()
    request = GoldenRequest(["good film"], dict(task.encode(["good film"]).collate([0])), {}, None)
    monkeypatch.setattr(Bundle, "golden", lambda self, cache=None: (request,))
    check_encoding(task, [request])
    with pytest.raises(IntegrityError, match="cannot be read on this host: "):
        check_encoding(task, [dataclasses.replace(request, inputs=[None])])
    request.feeds["input_ids"] = request.feeds["input_ids"] + 1
    with pytest.raises(IntegrityError, match="becomes another 'input_ids' on this host"):
        open_model(root)


def test_open_model_falls_back_when_the_golden_answer_is_wrong(tmp_path):
    wrong = WEIGHTS * np.array([1, -1, 1], np.float32)
    with open_model(make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": wrong})) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert "golden request is wrong: worst_cosine" in model.decision.failures[0]


def test_open_model_refuses_to_fall_back_when_strict(tmp_path):
    wrong = WEIGHTS * np.array([1, -1, 1], np.float32)
    root = make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": wrong})
    with pytest.raises(NoVariantError, match="golden request is wrong.*Without strict"):
        open_model(root, policy=Policy(strict=True))


def test_a_damaged_record_is_a_fallback_because_nobody_knows_what_it_was(tmp_path, caplog):
    root = make_bundle(tmp_path, BOTH)
    path = root / "tdeploy/variants/ort-cpu-fp32.json"
    path.write_text(path.read_text()[:40])
    with open_model(root) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert model.decision.failures[0].startswith("ort-cpu-fp32: damaged: ")
    assert "A variant that is, or may be, better cannot serve on this host: ort-cpu-fp32: damaged" in caplog.text
    with pytest.raises(NoVariantError, match="ort-cpu-fp32: damaged"):
        open_model(root, policy=Policy(strict=True))
    with open_model(root, policy=Policy(variant="onnx-fp32", strict=True)) as model:
        assert model.decision.failures == ()


def test_a_damaged_verdict_is_a_fallback_where_the_variant_would_have_come_first(tmp_path):
    root = make_bundle(tmp_path, {**BOTH, "onnx-aa": WEIGHTS})
    for name in ("ort-cpu-fp32", "onnx-aa"):
        (path,) = (root / "tdeploy/evidence" / name).iterdir()
        path.write_text(path.read_text()[:30])
    with open_model(root) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        (failure,) = model.decision.failures  # the portable one would not have come first
        assert failure.startswith("ort-cpu-fp32 on ort-cpu: its accuracy evidence cannot be read here")
    with pytest.raises(NoVariantError, match="its accuracy evidence cannot be read here"):
        open_model(root, policy=Policy(strict=True))


def test_open_model_reads_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_VARIANT", "onnx-fp32")
    with open_model(make_bundle(tmp_path, BOTH)) as model:
        assert model.decision.chosen.variant == "onnx-fp32"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schema_version": 2, "warp": {}}, r"written by a newer mlflow-tdeploy \(schema 2\)"),
        ({"format": "openvino"}, "no runtime opens the format 'openvino'"),
        ({"device": "npu"}, "made for npu"),
    ],
)
def test_open_model_serves_the_rest_when_a_newer_version_added_a_variant(tmp_path, changes, why):
    root = make_bundle(tmp_path, BOTH)
    path = root / "tdeploy/variants/ort-cpu-fp32.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with open_model(root, policy=Policy(strict=True)) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        lost = next(
            c for c in model.decision.candidates if c.variant == "ort-cpu-fp32" and c.runtime in ("", "ort-cpu")
        )
        assert re.search(why, lost.reason)
        with pytest.raises(NoVariantError, match=why):
            model.predict({"x": X}, variant="ort-cpu-fp32")
    with pytest.raises(NoVariantError, match=why):
        open_model(root, policy=Policy(variant="ort-cpu-fp32"))


def test_open_model_does_not_serve_a_variant_whose_newest_verdict_cannot_be_read(tmp_path):
    root = make_bundle(tmp_path, BOTH)
    record = {"schema_version": 2, "kind": "accuracy", "passed": False}
    (root / "tdeploy/evidence/ort-cpu-fp32/20990101T000000000000Z-0.json").write_text(json.dumps(record))
    with open_model(root) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert "cannot be read here: evidence/ort-cpu-fp32/2099" in model.decision.explain()


def test_open_model_says_why_for_each_when_nothing_can_serve(tmp_path):
    root = make_bundle(tmp_path, BOTH)
    for path in root.glob("tdeploy/files/*/model.onnx"):
        path.write_bytes(b"")
    with pytest.raises(NoVariantError) as caught:
        open_model(root)
    assert "files/onnx-fp32/model.onnx" in str(caught.value)
    assert "files/ort-cpu-fp32/model.onnx" in str(caught.value)


def test_open_model_refuses_when_golden_requests_were_changed(tmp_path):
    root = make_bundle(tmp_path)
    golden = root / "tdeploy/golden/golden.json"
    golden.write_text(golden.read_text().replace("0", "1"))
    with pytest.raises(IntegrityError, match=r"golden/golden\.json"):
        open_model(root)


def test_open_model_fetches_only_the_chosen_variant(tmp_path):
    root = make_bundle(tmp_path / "all", BOTH)
    stored = {path: path.read_bytes() for path in root.glob("tdeploy/files/*/*")}
    for path in stored:
        path.unlink()
    fetched = []

    def fetch(variant):
        fetched.append(variant.id)
        for path, data in stored.items():
            if variant.id == path.parent.name:
                path.write_bytes(data)

    with open_model(root, fetch=fetch) as model:
        assert fetched == ["ort-cpu-fp32"]
        model.predict({"x": X}, params={"variant": "onnx-fp32"})
        assert fetched == ["ort-cpu-fp32", "onnx-fp32"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'x' is missing"),
        ({"x": X, "z": X}, "Unknown input tensor 'z'"),
        ({"x": X.astype(np.float64)}, "must be float32, got float64"),
        ({"x": np.zeros((9, 4), np.float32)}, r"dimension 'batch' \(axis 0\) is 9, outside its range 1..8"),
        ({"x": np.zeros((1, 5), np.float32)}, "axis 1 must be 4, got 5"),
        ({"x": X[0]}, "must have 2 dimensions"),
        ({"x": X * np.nan}, "NaN"),
        ({"x": None}, "None"),
        ({"x": [["a", "b"]]}, "not a regular array of numbers"),
        ({"x": np.zeros((0, 4), np.float32)}, "empty"),
    ],
)
def test_predict_names_tensor_dim_value_and_range_when_the_input_is_bad(tmp_path, inputs, message):
    with open_model(make_bundle(tmp_path)) as model, pytest.raises(InvalidInputError, match=message):
        model.predict(inputs)


def test_predict_is_right_from_many_threads(tmp_path):
    with open_model(make_bundle(tmp_path, BOTH)) as model, ThreadPoolExecutor(8) as pool:
        inputs = [np.full((3, 4), value, np.float32) for value in range(100)]
        variants = ["onnx-fp32" if index % 2 else "" for index in range(100)]
        answers = list(pool.map(lambda x, v: model.predict({"x": x}, variant=v)["y"], inputs, variants))
    for x, y in zip(inputs, answers, strict=True):
        np.testing.assert_allclose(y, x @ WEIGHTS, rtol=1e-5)


def test_close_stops_threads_and_refuses_further_calls(tmp_path):
    before = threading.active_count()
    model = open_model(make_bundle(tmp_path, BOTH), options=SessionOptions(threads=2))
    model.close()
    model.close()
    assert threading.active_count() == before
    with pytest.raises(SessionError, match="closed"):
        model.predict({"x": X})


def test_predict_says_closed_when_the_model_is_closed_before_its_batches_start(tmp_path, monkeypatch):
    model = open_model(make_text_bundle(tmp_path), options=SessionOptions(threads=2))
    items = model.task.items
    monkeypatch.setattr(model.task, "items", lambda inputs: (model.close(), items(inputs))[1])
    with pytest.raises(SessionError, match=r"^The model is closed\.$"):
        model.predict(["a good film", "bad", "a"] * 10)


def test_predict_serves_the_batches_that_the_variants_record_asks_for(tmp_path, monkeypatch):
    root = make_text_bundle(tmp_path)
    for path in (root / "tdeploy/variants").iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "session": {"token_budget": 6}}))
    seen, infer = [], OrtSession.infer
    monkeypatch.setattr(OrtSession, "infer", lambda self, feeds: (seen.append(feeds), infer(self, feeds))[1])
    with open_model(root, options=SessionOptions(threads=2)) as model:
        model.predict(["a good film"] * 8)
    assert {feeds["input_ids"].shape for feeds in seen} == {(2, 3)}


def test_lone_requests_try_a_session_of_every_core_that_spins_and_writes_no_profile(tmp_path, monkeypatch):
    """One that does not spin is no faster than one thread, and two sessions must not write one profile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "hardware", lambda: dataclasses.replace(host_cpu(), cores=2))
    opened, original = [], OrtCpu.open

    def remember(self, root, variant, signature, options):
        opened.append(options)
        return original(self, root, variant, signature, options)

    monkeypatch.setattr(OrtCpu, "open", remember)
    given = SessionOptions(own={"arena": False, "profiling": "profile"})
    with open_model(make_bundle(tmp_path), options=given) as model:
        for _ in range(3):
            model.predict({"x": X})
    assert opened[0] == given
    own = {"arena": False, "profiling": "", "spinning": True}
    assert opened[1:] == [SessionOptions(intra_op_threads=2, own=own, lone=True)]


def test_a_lone_request_beside_bulk_work_keeps_to_one_thread(tmp_path, monkeypatch):
    """Two threads more would only take the cores from the batches that run."""
    monkeypatch.setattr(probe, "hardware", lambda: dataclasses.replace(host_cpu(), cores=2))
    used, inside, go_on, infer = [], threading.Event(), threading.Event(), OrtSession.infer

    def watched(self, feeds):
        if len(feeds["input_ids"]) > 1:
            inside.set()
            assert go_on.wait(60)
        else:
            used.append(self)
        return infer(self, feeds)

    monkeypatch.setattr(OrtSession, "infer", watched)
    root, until = make_text_bundle(tmp_path), time.monotonic() + 60
    with open_model(root, options=SessionOptions(threads=2)) as model, ThreadPoolExecutor(1) as bulk:
        model.predict(["good"])
        narrow = used[-1]
        while used[-1] is narrow:  # until the session with several threads is open and was tried
            model.predict(["good"])
            assert time.monotonic() < until
        running = bulk.submit(model.predict, ["a good film", "a bad film"] * 20)
        assert inside.wait(60)
        used.clear()
        for _ in range(200):  # long enough for a trial of each way
            model.predict(["good"])
        go_on.set()
        running.result(60)
    assert set(used) == {narrow}


def test_the_second_session_of_lone_requests_is_not_opened_when_the_file_was_changed_meanwhile(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(probe, "hardware", lambda: dataclasses.replace(host_cpu(), cores=2))
    root = make_bundle(tmp_path)
    path = root / "tdeploy/files/onnx-fp32/model.onnx"
    with open_model(root) as model:
        linear_graph(path, -7 * WEIGHTS)
        for _ in range(30):
            np.testing.assert_allclose(model.predict({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)
            time.sleep(0.01)
    assert "No second session for lone requests: " in caplog.text
    assert "was changed" in caplog.text


def test_close_closes_every_session_also_those_of_lone_and_forced_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "hardware", lambda: dataclasses.replace(host_cpu(), cores=2))
    sessions, original = [], OrtCpu.open
    monkeypatch.setattr(OrtCpu, "open", lambda *args: sessions.append(original(*args)) or sessions[-1])
    model = open_model(make_bundle(tmp_path, BOTH))
    for _ in range(4):
        model.predict({"x": X})
        for how in ({"variant": "onnx-fp32"}, {"variant": "onnx-fp32", "runtime": "ort-cpu"}):
            for strict in (True, False):
                model.predict({"x": X}, strict=strict, **how)
    model.close()
    assert len(sessions) <= 4  # two variants, each with one thread and with several: however they are named
    assert [session.device for session in sessions] == ["closed"] * len(sessions)


def test_a_model_that_nobody_holds_is_gone_without_the_garbage_collector(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "hardware", lambda: dataclasses.replace(host_cpu(), cores=2))
    model = open_model(make_bundle(tmp_path))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_open_model_leaves_no_session_open_when_it_fails(tmp_path, monkeypatch):
    closed = []
    original = OrtSession.close
    monkeypatch.setattr(OrtSession, "close", lambda self: (closed.append(self), original(self)))
    wrong = -WEIGHTS
    with pytest.raises(NoVariantError):
        open_model(make_bundle(tmp_path, {"onnx-fp32": wrong, "ort-cpu-fp32": wrong}))
    assert len(closed) == 2


def test_bundle_variants_lists_what_the_model_has(tmp_path):
    assert list(Bundle.open(make_bundle(tmp_path, BOTH)).variants) == ["onnx-fp32", "ort-cpu-fp32"]


def test_open_model_serves_the_next_variant_when_a_runtime_is_broken(tmp_path, monkeypatch, caplog):
    """An installed package whose import fails is a reason to fall back, loudly, not a crash."""
    original = OrtCpu.open

    def broken(self, root, variant, signature, options):
        if variant.id == "ort-cpu-fp32":
            raise ImportError("libonnxruntime.so: undefined symbol")
        return original(self, root, variant, signature, options)

    monkeypatch.setattr(OrtCpu, "open", broken)
    with open_model(make_bundle(tmp_path, BOTH)) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert "ImportError: libonnxruntime.so" in model.decision.failures[0]
    assert "undefined symbol" in caplog.text


def test_open_says_so_when_onnxruntime_cannot_be_imported(tmp_path, monkeypatch):
    root = make_bundle(tmp_path)
    monkeypatch.setattr(OrtCpu, "missing", lambda self: None)  # it is installed, and its import fails
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NoVariantError, match="cannot open variant 'onnx-fp32'"):
        open_model(root)


def test_open_model_fetches_again_when_the_copy_here_is_damaged(tmp_path):
    root = make_bundle(tmp_path)
    path = root / "tdeploy/files/onnx-fp32/model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fetched = []

    def fetch(variant):
        fetched.append(variant.id)
        path.write_bytes(whole)

    with open_model(root, fetch=fetch) as model:
        assert model.decision.failures == ()
    assert fetched == ["onnx-fp32"]


def test_open_model_goes_on_when_the_best_variant_cannot_be_fetched(tmp_path):
    root = make_bundle(tmp_path, BOTH)
    (root / "tdeploy/files/ort-cpu-fp32/model.onnx").unlink()

    def fetch(variant):
        raise ConnectionError("store is down")

    with open_model(root, fetch=fetch) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert "ConnectionError: store is down" in model.decision.failures[0]


@pytest.mark.parametrize("bad", [None, [1], "x"])
def test_infer_and_params_refuse_what_is_no_mapping(tmp_path, bad):
    with open_model(make_bundle(tmp_path)) as model:
        with pytest.raises(InvalidInputError, match="mapping from name to array"):
            model.infer(bad)
        if bad is not None:
            with pytest.raises(InvalidInputError, match="params must be a mapping"):
                model.predict({"x": X}, params=bad)


@pytest.mark.parametrize(("others", "passes"), [(0, False), (3, True)])
def test_the_other_golden_requests_tell_what_is_next_to_nothing(tmp_path, others, passes):
    """Beside answers around 1 an answer of 1e-6 is noise, whatever its sign; alone it is all there is to know."""
    bundle = Bundle.open(make_bundle(tmp_path))
    x = np.array([[1, 2, 3, 4]], np.float32)
    small = GoldenRequest({"x": x}, {"x": x}, {"y": -1e-6 * (x @ WEIGHTS)}, None)
    usual = GoldenRequest({"x": x}, {"x": x}, {"y": x @ WEIGHTS}, None)
    requests = [small, *[usual] * others]
    why = check_golden(bundle.task(), bundle.manifest.budget, requests, lambda feeds: {"y": 1e-6 * (x @ WEIGHTS)})
    assert (why is None) is passes


def test_infer_takes_torch_tensors_and_answers_with_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    with open_model(make_bundle(tmp_path)) as model:
        x = torch.tensor([[1.0, 2, 3, 4]])
        answer = model.infer({"x": x})["y"]
        assert isinstance(answer, torch.Tensor)
        np.testing.assert_allclose(answer.numpy(), x.numpy() @ WEIGHTS, rtol=1e-6)
        with pytest.raises(InvalidInputError, match="'x', dimension 'batch' .* is 9, outside its range"):
            model.infer({"x": torch.ones(9, 4)})
        with pytest.raises(InvalidInputError, match="must be float32, got float64"):
            model.infer({"x": torch.ones(1, 4, dtype=torch.float64)})
        with pytest.raises(InvalidInputError, match="has the dtype torch.complex64, which no model takes"):
            model.infer({"x": torch.ones(1, 4, dtype=torch.complex64)})
        with pytest.raises(InvalidInputError, match="not some of each"):
            model.infer({"x": x, "z": np.ones(1)})
    with pytest.raises(SessionError, match="closed"):
        model.infer({"x": x})


@pytest.mark.parametrize("lost", ["", "ort-cpu-fp32"])
def test_evidence_that_is_gone_is_a_fallback(tmp_path, caplog, lost):
    """A variant that was kept has been checked: without what was found nobody can tell, and strict refuses."""
    root = make_bundle(tmp_path, BOTH)
    shutil.rmtree(root / "tdeploy/evidence" / lost)
    with open_model(root) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
    assert "that is, or may be, better cannot serve on this host: ort-cpu-fp32" in caplog.text
    with pytest.raises(NoVariantError):
        open_model(root, policy=Policy(strict=True))
