"""Entities equal those of the Hugging Face pipeline: every strategy, characters, long texts in parts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import InvalidInputError, ManifestError
from mlflow_tdeploy.core.records import to_plain
from mlflow_tdeploy.core.tasks.token_classification import TokenClassification
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.token_models import MODELS, tagger
from tests.served import pipeline_of, texts

STRATEGIES = ("none", "simple", "first", "average", "max")


@pytest.fixture(scope="module", params=MODELS)
def both(request, minilm_path, tmp_path_factory):
    """The pipeline of transformers, and ours, of one model."""
    from transformers import pipeline

    folder = tagger(request.param, minilm_path, tmp_path_factory.mktemp("tagger"))
    original = pipeline("token-classification", model=str(folder), device="cpu")
    return original, pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def bert(minilm_path, tmp_path_factory):
    folder = tagger("bert", minilm_path, tmp_path_factory.mktemp("tagger"))
    return pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


def same(got, wanted):
    assert len(got) == len(wanted)
    for text, theirs in zip(got, wanted, strict=True):
        assert [without_score(one) for one in text] == [without_score(one) for one in theirs]
        np.testing.assert_allclose([one["score"] for one in text], [float(one["score"]) for one in theirs], atol=2e-5)


def without_score(entity):
    return {name: value for name, value in entity.items() if name != "score"}


def of_pipeline(original, wanted, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tokenizers without words
        return [original(text, **more) for text in wanted]  # many at once it pads, and computes a little differently


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_predict_equals_the_pipeline_by_every_strategy(both, strategy):
    original, ours = both
    wanted = texts(200)
    got = ours(wanted, {"aggregation_strategy": strategy})
    same(got, of_pipeline(original, wanted, aggregation_strategy=strategy))
    assert sum(map(len, got)) > 200


@pytest.mark.parametrize(("stride", "strategy"), [(0, "simple"), (1, "max"), (30, None)])
def test_long_texts_are_read_to_their_end_in_parts(both, stride, strategy, tmp_path):
    from transformers import pipeline

    original, ours = both
    parts = pipeline(
        "token-classification", model=original.model, tokenizer=original.tokenizer, stride=stride,
        aggregation_strategy=strategy, device="cpu",
    )  # fmt: skip
    given = texts(40)
    wanted = [" ".join(given[begin : begin + 30]) for begin in (0, 10, 30)] + given[-6:]
    asked = {"aggregation_strategy": strategy} if strategy else {}
    got = ours(wanted, {**asked, "stride": stride})
    same(got, of_pipeline(parts, wanted))
    cut = ours(wanted, asked)
    assert max(one["end"] for one in got[0]) > max(one["end"] for one in cut[0]) + 100
    served = pipeline_of(resolve(parts), tmp_path)  # as that pipeline was made
    assert served(wanted) == got


def test_what_is_ignored_can_be_said(both):
    original, ours = both
    wanted = texts(10)
    for ignored in ([], ["B-PER", "I-PER"]):
        said = ignored or [""]
        same(ours(wanted, {"ignore_labels": said}), of_pipeline(original, wanted, ignore_labels=ignored))
    as_text = ours(wanted, {"ignore_labels": "B-PER, I-PER"})
    assert as_text == ours(wanted, {"ignore_labels": '["B-PER", "I-PER"]'}) == ours(wanted, {"ignore_labels": said})


def test_requests_with_other_parameters_share_no_answer(bert):
    alone = [bert(["Alice met Bob."], {"aggregation_strategy": one})[0] for one in STRATEGIES]
    assert [len(one[0]) for one in alone] == [6, 5, 5, 5, 5]


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"aggregation_strategy": "best"}, "one of none, simple, first, average, max, got 'best'"),
        (
            {"stride": 126, "aggregation_strategy": "max"},
            "must be from 0 to 125, for the model takes 126",
        ),
        ({"stride": -2}, "got -2"),
        ({"ignore_labels": {"O": 1}}, "'ignore_labels' must be a list"),
        ({"ignore_labels": [1]}, "'ignore_labels' must be of type string"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(bert, params, why):
    with pytest.raises(InvalidInputError, match=why):
        bert(["a text"], params)


def test_labels_are_spans_and_entities_are_scored_by_them(bert):
    task = bert.task
    found = [[{"entity_group": "PER", "start": 0, "end": 5}], [], [{"entity": "ORG", "start": 2, "end": 4}]]
    right = [[{"label": "PER", "start": 0, "end": 5}], [{"label": "PER", "start": 1, "end": 2}]]
    right.append('[{"start": 2, "end": 4, "label": "PER"}]')  # as a table has it
    task.check_labels(right)
    assert task.metric(found, right) == {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    assert task.metric([[]], [[]]) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    for wrong, why in [
        ([[{"label": "LOC", "start": 0, "end": 1}]], "label 0 has 'LOC', which is no label of the model: O, ORG, PER"),
        ([[], "PER"], "label 1 must be a list like"),
        ([[{"label": "PER"}]], "label 0 must be a list like"),
        ([[{"start": 0, "end": 1, "kind": "PER"}]], "label 0 must be a list like"),
    ]:
        with pytest.raises(InvalidInputError, match=why):
            task.check_labels(wrong)


def test_labels_that_do_not_fit_the_graph_are_refused(bert, tmp_path):
    config = {**to_plain(bert.task.config), "labels": ["O"]}
    with pytest.raises(ManifestError, match="1 labels for a graph that returns 5 classes"):
        TokenClassification(config, bert.task.signature, tmp_path)
