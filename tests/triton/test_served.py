"""Every task on a real Triton, behind a stable name: the answers of the loader, for every form of a request."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.wire import ANSWER
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.triton.local import local_triton
from mlflow_tdeploy.triton.options import TritonOptions
from mlflow_tdeploy.triton.repository import render
from tests.core.text_assets import LABELS, OUTPUTS
from tests.triton.deployables import TEXTS, bundle_of, deployable, rows

KINDS = {"FP32": np.float32, "INT64": np.int64}


#: Those of which there are bundles made by hand; items of several texts are asked for in tests/deploy/test_tasks.py.
MADE = [name for name in TASKS.names() if name in (*OUTPUTS, "tensors")]


@pytest.fixture(scope="module", params=MADE)
def served(request, server, tmp_path_factory):
    """Yield the task's name, the loader's model and a running server with it as ``m``."""
    folder = tmp_path_factory.mktemp(request.param)
    bundle = bundle_of(request.param, folder / "model")
    render(deployable(bundle), folder / "repository", TritonOptions(instances=2))
    with (
        open_model(folder / "model", policy=Policy(variant="onnx-fp32")) as model,
        local_triton(folder / "repository", models=["m.v7", "m"], server=server) as triton,
    ):
        yield request.param, model, triton


def tensors(module, arrays):
    found = []
    for name, array in arrays.items():
        kind = "BYTES" if array.dtype == object else next(key for key, dtype in KINDS.items() if array.dtype == dtype)
        found.append(module.InferInput(name, array.shape, kind))
        found[-1].set_data_from_numpy(array)
    return found


def ask(triton, arrays, outputs=(), module=http, version="", **params):
    port = triton.http if module is http else triton.grpc
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    wanted = [module.InferRequestedOutput(name) for name in outputs] or None
    try:
        result = client.infer(
            "m", tensors(module, arrays), outputs=wanted, parameters=params or None, model_version=version
        )
    finally:
        client.close()
    names = [
        out["name"] if module is http else out.name
        for out in (result.get_response()["outputs"] if module is http else result.get_response().outputs)
    ]
    return {name: result.as_numpy(name) for name in names}


def texts(values):
    return {"text": np.array([value.encode() for value in values], dtype=object).reshape(-1, 1)}


def asked(task):
    """Return texts; of a task that fills masks each has one: the word that is not known."""
    return [f"a {text} cat" for text in TEXTS] if task == "fill-mask" else TEXTS


def request_of(task, count=5):
    if task == "tensors":
        arrays = rows(count)
        return arrays, {**arrays, "weight": arrays["weight"][:, None]}
    given = asked(task)[:count]
    return given, texts(given)


def check(task, expected, got):
    if task == "tensors":
        for name, array in expected.items():
            np.testing.assert_allclose(got[name].reshape(array.shape), array, rtol=1e-5, atol=1e-6)
    elif task == "sentence-embedding":
        np.testing.assert_allclose(got["sentence_embedding"], expected, rtol=1e-5, atol=1e-6)
    elif task == "text-classification":
        assert [label.decode() for label in got["label"].ravel()] == [one["label"] for one in expected]
        np.testing.assert_allclose(got["score"].ravel(), [one["score"] for one in expected], rtol=1e-5)
        assert [json.loads(text)["label"] for text in got[ANSWER].ravel()] == [one["label"] for one in expected]
    elif task in ("token-classification", "fill-mask", "zero-shot-classification"):
        for text, answer in zip(got[ANSWER].ravel(), expected, strict=True):
            assert json.loads(text) == close_to(answer)
    else:
        for text, one in zip(got[ANSWER].ravel(), expected, strict=True):
            np.testing.assert_allclose(json.loads(text), one, rtol=1e-5, atol=1e-6)


def close_to(answer):
    """Return lists of records of which scores need only be close."""
    if isinstance(answer, list):
        return [close_to(one) for one in answer]
    return {name: pytest.approx(one, abs=1e-6) if name.startswith("score") else one for name, one in answer.items()}


@pytest.mark.parametrize("module", [http, grpc])
def test_the_answer_is_that_of_the_loader(served, module):
    task, model, triton = served
    plain, arrays = request_of(task)
    check(task, model.predict(plain), ask(triton, arrays, module=module))


def test_a_version_can_be_asked_for_by_number(served):
    task, model, triton = served
    plain, arrays = request_of(task)
    check(task, model.predict(plain), ask(triton, arrays, version="7"))
    with pytest.raises(InferenceServerException, match="version"):
        ask(triton, arrays, version="6")


def test_a_request_longer_than_a_batch_of_the_graph_is_split(served):
    task, model, triton = served
    if task == "tensors":
        with pytest.raises(InferenceServerException, match="outside its range 1..8"):
            ask(triton, request_of(task, 9)[1])
    else:
        check(task, model.predict(asked(task)), ask(triton, texts(asked(task))))


def test_many_at_once_get_their_own_answers_and_their_own_errors(served):
    task, model, triton = served
    if task == "tensors":
        requests = [rows(1 + index % 4, index) for index in range(48)]
        sent = [{**one, "weight": one["weight"][:, None]} for one in requests]
        wrong = {"x": np.full((2, 3), np.nan, np.float32), "weight": np.ones((2, 1), np.float32)}
        says = "NaN"
    else:
        some = asked(task)
        requests = [[some[index % 8], *some[: index % 3]] for index in range(48)]
        sent = [texts(one) for one in requests]
        wrong, says = {"text": np.array([[b"cat"], [b"\xff\xfe"]], dtype=object)}, "Text 1 is not UTF-8"
    for index in range(0, 48, 6):
        sent[index] = wrong

    def answer(arrays):
        try:
            return ask(triton, arrays)
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(answer, sent))
    for index, (plain, got) in enumerate(zip(requests, answers, strict=True)):
        if index % 6:
            check(task, model.predict(plain), got)
        else:
            assert says in str(got)
            assert got.status() == "400"
    (statistics,) = triton.ask("v2/models/m/stats")["model_stats"]
    assert int(statistics["inference_count"]) > int(statistics["execution_count"])  # rows of several requests in one


def test_raw_tensors_go_in_and_out(served):
    task, model, triton = served
    if task == "tensors":
        pytest.skip("they have no other form")
    feeds = {name: np.array([[2, 3, 4], [5, 2, 0]]) for name in ("input_ids", "attention_mask")}
    feeds["attention_mask"] = (feeds["input_ids"] > 0).astype(np.int64)
    output = OUTPUTS[task].name
    got = ask(triton, feeds)
    assert list(got) == [output]
    np.testing.assert_allclose(got[output], model.infer(feeds)[output], rtol=1e-5, atol=1e-6)
    with pytest.raises(InferenceServerException, match=r"'text' or the graph's own tensors, not both"):
        ask(triton, {**feeds, **texts(["cat", "dog"])})
    with pytest.raises(InferenceServerException, match="'attention_mask' is missing"):
        ask(triton, {"input_ids": feeds["input_ids"]})


def test_params_are_those_of_predict(served):
    task, model, triton = served
    if task == "token-classification":
        long = " ".join(TEXTS * 3)
        params = {"aggregation_strategy": "simple", "stride": 2, "ignore_labels": [LABELS[0]]}
        expected = model.predict([long, *TEXTS], params)
        assert max(one["end"] for one in expected[0]) > 60
        assert LABELS[0] not in {one["entity_group"] for entities in expected for one in entities}
        got = ask(triton, texts([long, *TEXTS]), **{**params, "ignore_labels": json.dumps([LABELS[0]])})
        check(task, expected, got)
        return
    if task == "zero-shot-classification":
        given, arrays = request_of(task)
        params = {"candidate_labels": ["film", "good film", "bad"], "multi_label": True}
        expected = model.predict(given, params)
        assert {label for one in expected for label in one["labels"]} == {"film", "good film", "bad"}
        check(task, expected, ask(triton, arrays, **{**params, "candidate_labels": "film, good film, bad"}))
        return
    if task == "fill-mask":
        given, arrays = request_of(task)
        expected = model.predict(given, {"top_k": 2, "targets": ["bad", "film", "good"]})
        check(task, expected, ask(triton, arrays, top_k=2, targets="bad, film, good"))
        return
    if task != "text-classification":
        with pytest.raises(InferenceServerException, match="Unknown parameter 'top_k'"):
            ask(triton, request_of(task)[1], top_k=2)
        return
    got = ask(triton, texts(TEXTS[:3]), top_k=2)
    assert set(got) == {ANSWER}
    expected = model.predict(TEXTS[:3], {"top_k": 2})
    assert [[one["label"] for one in json.loads(text)] for text in got[ANSWER].ravel()] == [
        [one["label"] for one in answer] for answer in expected
    ]
    with pytest.raises(InferenceServerException, match="top_k must be at least 1"):
        ask(triton, texts(TEXTS[:3]), top_k=-1)


def test_only_what_is_wanted_is_sent(served):
    task, _, triton = served
    if task == "text-classification":
        assert set(ask(triton, texts(["cat"]), ["label"])) == {"label"}


def test_what_triton_itself_takes_from_a_request_is_no_parameter_of_the_task(served):
    """A priority, a timeout, an id: Triton's own, also where a client sends them beside parameters of the task."""
    task, _, triton = served
    client = http.InferenceServerClient(f"127.0.0.1:{triton.http}")
    given = tensors(http, request_of(task)[1])
    client.infer("m", given, request_id="7", timeout=5_000_000, priority=1)
    client.close()
