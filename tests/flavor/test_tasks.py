"""Tasks from a Hugging Face model to what MLflow loads: as the pipeline answers, whatever variant serves."""

from __future__ import annotations

import mlflow
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

import mlflow_tdeploy
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.store.bundle import Bundle
from tests.core.tasks.token_models import asker, entailer, filler, ranker, tagger
from tests.served import close_to, texts


@pytest.fixture(scope="module")
def entities(minilm_path, tmp_path_factory):
    """A token classifier that was saved from its folder; yields that and the model's."""
    folder = tmp_path_factory.mktemp("entities")
    source = tagger("bert", minilm_path, folder / "source")
    given = texts(250)
    labels = [[{"start": 0, "end": 3, "label": "PER"}] for _ in given]
    table = pd.DataFrame({"text": given, "label": labels})
    mlflow_tdeploy.save_model(source, folder / "model", precisions=["fp32", "int8"], verify_with=table)
    return source, folder / "model"


def test_entities_come_as_from_the_pipeline_with_mlflows_parameters(entities):
    from transformers import pipeline

    source, folder = entities
    loaded = mlflow.pyfunc.load_model(str(folder))
    wanted = texts(20)
    params = {"aggregation_strategy": "first", "ignore_labels": ["O", "B-ORG"]}
    got = loaded.predict(pd.DataFrame({"text": wanted}), params=params)
    original = pipeline("token-classification", model=str(source), device="cpu", ignore_labels=["O", "B-ORG"])
    expected = [original(text, aggregation_strategy="first") for text in wanted]
    assert got == [
        [{**one, "score": pytest.approx(float(one["score"]), abs=2e-5)} for one in each] for each in expected
    ]
    assert loaded.predict("Alice met Bob.")[0][0].keys() == {"entity", "score", "index", "word", "start", "end"}


def test_each_variant_is_scored_by_its_entities(entities):
    bundle = Bundle.open(entities[1])
    assert {"onnx-fp32", "ort-cpu-fp32", "ort-cpu-int8"} <= set(bundle.variants)
    found = latest_accuracy(bundle.evidence("ort-cpu-fp32"))
    assert found.passed
    assert {"precision", "recall", "f1", "f1_drop", "max_score_difference", "worst_cosine"} <= set(found.metrics)
    assert found.metrics["label_agreement"] > 0.999
    assert abs(found.metrics["f1_drop"]) < 0.01
    assert bundle.manifest.task == "token-classification"


def test_its_signature_says_what_comes_out(entities):
    signature = mlflow.models.get_model_info(str(entities[1])).signature
    assert [str(one) for one in signature.outputs] == [
        "Array({end: long (required), entity: string (required), index: long (required), score: double (required), "
        "start: long (required), word: string (required)}) (required)"
    ]
    assert {one.name: one.shape for one in signature.params}["ignore_labels"] == (-1,)


def test_masks_are_filled_by_every_variant_as_by_the_pipeline(minilm_path, tmp_path):
    from transformers import pipeline

    source = filler("roberta", minilm_path, tmp_path / "source")  # of few words: scores of all are compared
    mlflow_tdeploy.save_model(source, tmp_path / "model", precisions=["fp32", "int8"])
    bundle = Bundle.open(tmp_path / "model")
    assert latest_accuracy(bundle.evidence("ort-cpu-fp32")).passed
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"variant": "ort-cpu-fp32"})
    wanted = ["the <mask> sat down.", "a <mask> of <mask>"]
    original = pipeline("fill-mask", model=str(source), device="cpu")
    got = loaded.predict(wanted, params={"top_k": 2})
    expected = [original(text, top_k=2) for text in wanted]
    assert [one["sequence"] for one in got[0]] == [one["sequence"] for one in expected[0]]
    assert [[one["token"] for one in each] for each in got[1]] == [
        [one["token"] for one in each] for each in expected[1]
    ]


def test_labels_of_a_request_are_given_as_by_the_pipeline(minilm_path, tmp_path):
    from transformers import pipeline

    source = entailer("bert", minilm_path, tmp_path / "source")
    mlflow_tdeploy.save_model(source, tmp_path / "model", task="zero-shot-classification", precisions=["fp32", "int8"])
    bundle = Bundle.open(tmp_path / "model")
    assert latest_accuracy(bundle.evidence("ort-cpu-fp32")).passed
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"variant": "ort-cpu-fp32"})
    labels = ["sport", "science", "food"]
    got = loaded.predict(
        pd.DataFrame({"text": ["the cat sat", "a b"]}, index=[7, 9]), params={"candidate_labels": labels}
    )
    original = pipeline("zero-shot-classification", model=str(source), device="cpu")
    assert list(got.index) == [7, 9]
    for (_, row), text in zip(got.iterrows(), ["the cat sat", "a b"], strict=True):
        expected = original(text, labels)
        assert (row["sequence"], row["labels"]) == (text, expected["labels"])
        assert row["scores"] == pytest.approx(expected["scores"], abs=2e-5)
    with pytest.raises(MlflowException, match="names no labels to choose among"):
        loaded.predict(["a text"])


CONTEXT = "The cat sat on the mat, and the dog lay beside it. " * 12
SERVED = {
    "question-answering": (
        asker,
        {
            "dataframe_records": [
                {"question": "Who sat?", "context": CONTEXT},
                {"question": "Who lay?", "context": "It."},
            ]
        },
        {"question": ["Who sat?", "Who lay?"], "context": [CONTEXT, "It."]},
        {"doc_stride": 4, "top_k": 2},
    ),
    "text-ranking": (
        ranker,
        {"inputs": [{"query": "a cat", "documents": ["cats", "dogs"]}, {"query": "rain", "documents": ["the sky"]}]},
        pd.DataFrame({"query": ["a cat", "rain"], "documents": [["cats", "dogs"], ["the sky"]]}),
        {"return_documents": True},
    ),
    "zero-shot-classification": (
        entailer,
        {"instances": ["the cat sat", "it rains"]},
        ["the cat sat", "it rains"],
        {"candidate_labels": ["animals", "weather"], "multi_label": True},
    ),
}


@pytest.mark.parametrize("task", SERVED)
def test_the_scoring_server_answers_as_the_loader_does(minilm_path, tmp_path, task):
    write, body, given, params = SERVED[task]
    source = write("bert", minilm_path, tmp_path / "source")
    shapes = {"batch": (1, 4, 8), "sequence": (3, 16, 64)}
    mlflow_tdeploy.save_model(source, tmp_path / "model", task=task, precisions=["fp32"], shapes=shapes)
    loaded = mlflow_tdeploy.load_model(str(tmp_path / "model"))
    server = TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(tmp_path / "model"))))
    answer = server.post("/invocations", json={**body, "params": params})
    assert answer.status_code == 200, answer.text
    expected = loaded.predict(given, params)
    assert answer.json()["predictions"] == close_to(expected)
    wrong = server.post("/invocations", json={"inputs": [{"question": "a", "query": "b"}], "params": params})
    assert wrong.status_code == 400, wrong.text


@pytest.mark.parametrize("write", [asker, entailer])
def test_items_of_several_texts_are_analyzed(minilm_path, tmp_path, write):
    source = write("bert", minilm_path, tmp_path / "source")
    shapes = {"batch": (1, 4, 8), "sequence": (5, 16, 64)}
    mlflow_tdeploy.save_model(source, tmp_path / "model", precisions=["fp32"], shapes=shapes)
    quick = {"rounds": 2, "seconds": 0.2, "batches": [1, 2], "variants": ["onnx-fp32"]}
    model = str(tmp_path / "model")
    (one,) = mlflow_tdeploy.analyze_model(model, **quick).variants  # with the built-in texts, in pairs
    assert [each.items for each in one.speed] == [1, 2]
    if write is asker:
        data = {"question": ["Who?", "What?"], "context": ["Ann sat.", "It sat."], "label": ["Ann", ["It", "it sat"]]}
        (one,) = mlflow_tdeploy.analyze_model(model, data, **quick).variants
        assert {"f1", "exact_match"} <= set(one.quality)
