from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.flavor.config import full_config, split_config
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu, OrtOptions
from tests.bundles import WEIGHTS, make_bundle
from tests.flavor.text_bundles import HEAD, LABELS, embed, make_text_bundle

TEXTS = ["a good film", "bad", "good good bad film a", "unknown words"]
X = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)


@pytest.fixture
def load(tmp_path):
    """Return a function that saves the hand-made model of a task and loads it with mlflow.pyfunc."""

    def make(task, *, saved=None, model_config=None):
        made = make_text_bundle(tmp_path / "made", task) if task != "tensors" else make_bundle(tmp_path / "made")
        mlflow_tdeploy.save_model(made, tmp_path / "model", pip_requirements=["mlflow"], model_config=saved)
        return mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=model_config)

    return make


@pytest.fixture
def opened_with(monkeypatch):
    """Return a list that gets the options of every session that is opened."""
    options, original = [], OrtCpu.open

    def remember(self, root, variant, signature, given):
        options.append(given)
        return original(self, root, variant, signature, given)

    monkeypatch.setattr(OrtCpu, "open", remember)
    return options


@pytest.mark.parametrize(
    "form",
    [
        list,
        pd.Series,
        np.array,
        lambda texts: pd.DataFrame({"review": texts}),
        lambda texts: pd.DataFrame({0: texts}),
        lambda texts: pd.DataFrame({"id": ["7"] * len(texts), "text": texts}),
        lambda texts: {"text": texts},
        lambda texts: [{"id": "7", "text": text} for text in texts],
    ],
    ids=["list", "Series", "ndarray", "DataFrame", "nameless DataFrame", "text and another", "dict", "records"],
)
def test_predict_returns_float32_vectors_in_order_when_given_texts_in_any_form(load, form):
    vectors = load("sentence-embedding").predict(form(TEXTS))
    assert isinstance(vectors, np.ndarray)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.stack([embed(text) for text in TEXTS]), rtol=1e-3)


def test_predict_returns_a_table_of_labels_when_the_task_classifies(load):
    table = load("text-classification").predict(TEXTS)
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == ["label", "score"]
    logits = np.stack([embed(text) @ HEAD for text in TEXTS])
    assert table["label"].tolist() == [LABELS[index] for index in logits.argmax(axis=1)]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(table["score"], scores.max(axis=1), rtol=1e-3)


def test_predict_returns_lists_of_records_when_several_labels_are_asked_for(load):
    model = load("text-classification")
    answers = model.predict(TEXTS, params={"top_k": 0})
    assert [len(answer) for answer in answers] == [3] * len(TEXTS)
    assert all(answer[0]["score"] >= answer[1]["score"] >= answer[2]["score"] for answer in answers)
    assert len(model.predict(["good"], params={"top_k": 2})[0]) == 2


def test_predict_returns_nested_lists_without_padding_when_the_task_extracts_features(load):
    answers = load("feature-extraction").predict(TEXTS)
    assert [np.shape(answer) for answer in answers] == [(1, len(text.split()), 4) for text in TEXTS]
    assert isinstance(answers[0][0][0][0], float)


def test_predict_takes_and_returns_arrays_by_name_when_the_task_is_tensors(load):
    answer = load("tensors").predict({"x": X})
    assert list(answer) == ["y"]
    np.testing.assert_allclose(answer["y"], X @ WEIGHTS, rtol=1e-6)


def test_predict_serves_another_variant_when_a_parameter_forces_it(load):
    model = load("sentence-embedding")
    chosen = model.predict(["good"])
    forced = model.predict(["good"], params={"variant": "onnx-fp32"})
    np.testing.assert_array_equal(forced[0], embed("good"))
    assert not np.array_equal(chosen, forced)
    np.testing.assert_array_equal(model.predict(["good"]), chosen)  # the choice is for that call only


@pytest.mark.parametrize(
    ("inputs", "params", "message"),
    [
        ([], None, "request is empty"),
        ({}, None, "request is empty"),
        (pd.DataFrame({"id": ["7"], "review": ["good"]}), None, r"which column.*'id', 'review'"),
        (pd.DataFrame({"text": ["good"], "text_pair": ["bad"]}), None, "reads no pairs of texts"),
        (np.array([["good", "bad"]]), None, r"shape \(1, 2\)"),
        ([pd.NA], None, "missing"),
        (pd.DataFrame({"text": []}, dtype="str"), None, "empty"),
        (["good"], {"variant": "no-such"}, "Unknown variant 'no-such'.*onnx-fp32"),
        (["good"], {"runtime": "no-such"}, "Unknown runtime 'no-such'.*ort-cpu"),
        (["good"], {"variant": "onnx-fp32", "runtime": "torch"}, "asked for: variant='onnx-fp32', runtime='torch'"),
        ([5], None, "string|schema"),
        ([None], None, "missing|schema|None"),
    ],
)
def test_predict_refuses_bad_input_with_an_mlflow_error(load, inputs, params, message):
    model = load("sentence-embedding")
    with pytest.raises(MlflowException, match=f"(?s){message}") as caught:
        model.predict(inputs, params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"x": np.ones((9, 4), np.float32)}, "'x'.*'batch'.*9.*1..8"),
        ({"x": np.ones((1, 5), np.float32)}, "(?i)shape"),
        ({"x": np.full((1, 4), np.nan, np.float32)}, "NaN"),
        ({"x": np.ones((1, 4), np.float64)}, "float"),
        ({"z": np.ones((1, 4), np.float32)}, "x"),
    ],
    ids=["out of range", "wrong size", "NaN", "wrong dtype", "wrong name"],
)
def test_predict_refuses_tensors_that_do_not_fit(load, feed, message):
    with pytest.raises(MlflowException, match=f"(?s){message}") as caught:
        load("tensors").predict(feed)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_predict_gives_each_thread_its_own_answer(load):
    model = load("sentence-embedding")
    requests = [[TEXTS[(start + step) % 4] for step in range(1 + start % 7)] for start in range(60)]
    forced = [{"variant": ("", "onnx-fp32")[index % 2]} for index in range(60)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda pair: model.predict(pair[0], params=pair[1]), zip(requests, forced, strict=True))
        )
    for texts, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer, np.stack([embed(text) for text in texts]), rtol=1e-3)


def test_load_pyfunc_forces_what_model_config_says(load):
    model = load("sentence-embedding", model_config={"variant": "onnx-fp32", "threads": 1})
    assert model.get_raw_model().decision.chosen.variant == "onnx-fp32"
    np.testing.assert_array_equal(model.predict(["good"])[0], embed("good"))


def test_load_pyfunc_passes_on_options_that_were_unknown_when_the_model_was_logged(load, opened_with):
    load("sentence-embedding", model_config={"session": {"arena": False, "threads": 1}})
    assert (opened_with[-1].threads, opened_with[-1].settings(OrtOptions).arena) == (1, False)


def test_load_pyfunc_ignores_a_saved_option_of_a_newer_version_with_a_warning(tmp_path, caplog):
    """A host with an older package serves what it knows; it is the default of a runtime that it has not."""
    mlflow_tdeploy.save_model(make_text_bundle(tmp_path / "made"), tmp_path / "model", pip_requirements=["mlflow"])
    mlmodel = tmp_path / "model/MLmodel"
    mlmodel.write_text(mlmodel.read_text().replace("    config:\n", "    config:\n      warp_speed: 9\n", 1))
    assert "warp_speed" in mlmodel.read_text()
    assert len(mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(["good"])) == 1
    assert "'warp_speed' was saved with the model and is unknown to this version" in caplog.text
    with pytest.raises(MlflowException, match="Unknown model_config key 'warp_speed'"):
        mlflow_tdeploy.load_model(str(tmp_path / "model"), model_config={"warp_speed": 8})


def test_load_pyfunc_forces_what_the_environment_says(load, monkeypatch):
    monkeypatch.setenv("TDEPLOY_VARIANT", "onnx-fp32")
    assert load("sentence-embedding").get_raw_model().decision.chosen.variant == "onnx-fp32"


def test_load_pyfunc_serves_the_default_that_was_saved_with_the_model(load):
    model = load("sentence-embedding", saved={"variant": "onnx-fp32"})  # it would choose ort-cpu-int8
    assert model.get_raw_model().decision.chosen.variant == "onnx-fp32"


def test_load_pyfunc_lets_the_environment_overrule_what_was_saved_and_a_caller_overrule_both(
    load, tmp_path, monkeypatch
):
    """An operator must be able to move a host's models to another variant, whatever was saved with them."""
    monkeypatch.setenv("TDEPLOY_VARIANT", "ort-cpu-int8")
    assert load("sentence-embedding", saved={"variant": "onnx-fp32"}).get_raw_model().decision.chosen.variant == (
        "ort-cpu-int8"
    )
    path = str(tmp_path / "model")
    assert mlflow_tdeploy.load_model(path).decision.chosen.variant == "ort-cpu-int8"
    assert mlflow_tdeploy.load_model(path, variant="onnx-fp32").decision.chosen.variant == "onnx-fp32"
    monkeypatch.setenv("TDEPLOY_VARIANT", "onnx-fp32")
    forced = mlflow.pyfunc.load_model(path, model_config={"variant": "ort-cpu-int8"})
    assert forced.get_raw_model().decision.chosen.variant == "ort-cpu-int8"


def test_load_pyfunc_raises_an_mlflow_error_when_nothing_can_serve(tmp_path):
    made = make_text_bundle(tmp_path / "made", failed=("onnx-fp32", "ort-cpu-int8"))
    mlflow_tdeploy.save_model(made, tmp_path / "model", pip_requirements=["mlflow"])
    with pytest.raises(MlflowException, match="No variant of this model can serve here.*over budget") as caught:
        mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert caught.value.error_code == "INVALID_STATE"


def test_full_config_has_every_key_so_that_each_can_be_overridden():
    config = full_config({"threads": 2})
    assert set(config) == {
        *("variant", "runtime", "strict", "threads", "intra_op_threads", "spinning", "arena", "graph_level"),
        *("execution_mode", "profiling", "token_budget", "session", "contexts", "cuda_graphs", "device_id"),
        "weight_streaming_budget",
    }
    assert config["threads"] == 2
    assert (config["variant"], config["runtime"], config["strict"]) == ("", "", "")


def test_full_config_ignores_the_environment(monkeypatch):
    monkeypatch.setenv("TDEPLOY_VARIANT", "onnx-fp32")  # of the host that logs, not of the one that serves
    assert full_config(None)["variant"] == ""


def test_full_config_saves_what_is_given_apart_beside_the_rest():
    """Saved apart, it would come before what a caller says later."""
    config = full_config({"arena": False, "threads": 3, "session": {"spinning": True, "threads": 2}})
    assert (config["arena"], config["spinning"], config["threads"], config["session"]) == (False, True, 2, {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"thread": 2}, "'thread'.*threads"),
        ({"graph_level": "most"}, "graph_level"),
        ({"strict": 3}, "strict"),
        ({"session": {"thread": 2}}, "'thread'.*threads"),
    ],
)
def test_split_config_refuses_unknown_keys_and_values(config, message):
    with pytest.raises(InvalidInputError, match=message):
        split_config(config)


def test_answers_in_a_table_keep_the_index_of_the_one_that_was_asked(tmp_path):
    """So that ``table["label"] = model.predict(table)["label"]`` puts each label beside its text."""
    mlflow_tdeploy.save_model(make_text_bundle(tmp_path / "made", "text-classification"), tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    texts = ["good film", "bad", "a good film"]
    plain = model.predict(texts)
    assert list(plain.index) == [0, 1, 2]
    for asked in (pd.DataFrame({"text": texts}, index=[7, 3, 5]), pd.Series(texts, index=list("xyz"))):
        answer = model.predict(asked)
        assert list(answer.index) == list(asked.index)
        assert answer["label"].tolist() == plain["label"].tolist()
