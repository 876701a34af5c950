"""Labels of a request are given as by the Hugging Face pipeline, one among them or several."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.token_models import MODELS, entailer
from tests.served import pipeline_of, texts

LABELS = ["politics", "sport", "a bird", "mathematics"]
TASK = "zero-shot-classification"


@pytest.fixture(scope="module", params=MODELS)
def both(request, minilm_path, tmp_path_factory):
    """The pipeline of transformers, and ours, of one model."""
    from transformers import pipeline

    folder = entailer(request.param, minilm_path, tmp_path_factory.mktemp("entailer"))
    original = pipeline(TASK, model=str(folder), device="cpu")
    return original, pipeline_of(resolve(folder, task=TASK), tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def folder(minilm_path, tmp_path_factory):
    return entailer("bert", minilm_path, tmp_path_factory.mktemp("entailer"))


@pytest.fixture(scope="module")
def bert(folder, tmp_path_factory):
    return pipeline_of(resolve(folder, task=TASK), tmp_path_factory.mktemp("assets"))


def same(got, wanted):
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine["sequence"] == theirs["sequence"]
        assert mine["scores"] == pytest.approx(theirs["scores"], abs=2e-5)
        scores = dict(zip(theirs["labels"], theirs["scores"], strict=True))  # those of equal scores may change places
        assert [scores[label] for label in mine["labels"]] == pytest.approx(mine["scores"], abs=2e-5)


def test_predict_equals_the_pipeline(both):
    original, ours = both
    wanted = [text for text in texts(200) if text.strip()]  # the pipeline takes no empty ones
    assert len(wanted) >= 200
    same(ours(wanted, {"candidate_labels": LABELS}), [original(text, LABELS) for text in wanted])


@pytest.mark.parametrize(
    ("params", "theirs"),
    [
        ({"multi_label": True}, {"multi_label": True}),
        ({"hypothesis_template": "It is about {}, surely."}, {"hypothesis_template": "It is about {}, surely."}),
        ({"candidate_labels": ["one"]}, {"candidate_labels": ["one"]}),
        ({"candidate_labels": "one, two"}, {"candidate_labels": "one, two"}),
    ],
)
def test_what_a_request_says_counts(both, params, theirs):
    original, ours = both
    wanted = [text for text in texts(20) if text.strip()]
    asked = {"candidate_labels": LABELS, **theirs}
    same(ours(wanted, {"candidate_labels": LABELS, **params}), [original(text, **asked) for text in wanted])


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({}, "names no labels to choose among"),
        ({"candidate_labels": []}, "names no labels to choose among"),
        ({"candidate_labels": ["a", " "]}, "has an empty one"),
        ({"candidate_labels": ["a", "b", "a"]}, "has one twice"),
        ({"candidate_labels": {"a": 1}}, "'candidate_labels' must be a list"),
        ({"candidate_labels": ["a"], "hypothesis_template": "no place"}, "needs {} where the label goes"),
        ({"candidate_labels": ["a"], "hypothesis_template": "{} and {}"}, "needs {} where the label goes"),
        ({"candidate_labels": ["a"], "multi_label": "perhaps"}, "'multi_label' must be of type boolean"),
        ({"candidate_labels": ["word " * 200]}, "leaves no room for a text: the model takes 128 tokens"),
    ],
)
def test_requests_that_cannot_be_answered_say_why(bert, params, why):
    with pytest.raises(InvalidInputError, match=why):
        bert(["a text"], params)


def test_a_text_that_is_no_text_is_named(bert):
    with pytest.raises(InvalidInputError, match="Text 1 is not valid Unicode"):
        bert(["fine", "bad \ud800"], {"candidate_labels": LABELS})


def test_labels_that_the_model_was_logged_with_are_the_usual_ones(folder, tmp_path):
    ours = pipeline_of(resolve(folder, task=TASK, labels=LABELS), tmp_path)
    asked = pipeline_of(resolve(folder, task=TASK), tmp_path)
    assert ours(["a text"]) == asked(["a text"], {"candidate_labels": LABELS})
    ours.task.check_labels(["sport"])
    with pytest.raises(InvalidInputError, match=r"label 0 \('news'\) is none of those"):
        ours.task.check_labels(["news"])
    answers = [{"labels": ["sport", "politics"]}, {"labels": ["politics", "sport"]}]
    assert ours.task.metric(answers, ["sport", "sport"])["accuracy"] == 0.5


def test_a_model_that_knows_no_entailment_is_refused(tiny_bert):
    with pytest.raises(InvalidInputError, match="needs a model of natural language inference.*'maybe', 'no', 'yes'"):
        resolve(tiny_bert, task=TASK)
    assert resolve(tiny_bert).task == "text-classification"
