from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks._classes import ScoreComparison, apply_function
from mlflow_tdeploy.core.tasks.text_classification import TextClassification
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.token_models import MODELS, entailer
from tests.served import pipeline_of, texts

CUT = {"truncation": True, "max_length": 128}


@pytest.fixture(scope="module")
def original(tiny_bert):
    from transformers import pipeline

    return pipeline("text-classification", model=str(tiny_bert), device="cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_bert, tmp_path_factory):
    return pipeline_of(resolve(tiny_bert), tmp_path_factory.mktemp("assets"))


def _same(got, wanted):
    """Compare answers of any nesting; labels may only differ where scores are equal."""
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(mine, list):
            _same(mine, theirs)
            continue
        assert set(mine) == {"label", "score"}
        assert mine["label"] == theirs["label"]
        assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_predict_equals_the_pipeline_for_real_and_odd_texts(original, pipeline):
    wanted = texts(120)
    _same(pipeline(wanted), original(wanted, **CUT))


@pytest.fixture(scope="module", params=MODELS)
def of_pairs(request, minilm_path, tmp_path_factory):
    """The pipeline of transformers, and ours, of a model that was made for pairs."""
    from transformers import pipeline

    folder = entailer(request.param, minilm_path, tmp_path_factory.mktemp("pairs"))
    original = pipeline("text-classification", model=str(folder), device="cpu")
    source = resolve(folder, task="text-classification")
    return original, pipeline_of(source, tmp_path_factory.mktemp("assets"))


def test_predict_equals_the_pipeline_for_pairs(of_pairs):
    original, ours = of_pairs
    some = texts(200)
    pairs = list(zip(some, reversed(some), strict=True))
    wanted = [original({"text": text, "text_pair": pair}, top_k=None, **CUT) for text, pair in pairs]
    _same(ours(pairs, {"top_k": 0}), wanted)
    assert ours(pairs[:2]) != ours([text for text, _ in pairs[:2]])  # the second text counts


@pytest.mark.parametrize(("ours", "theirs"), [(0, None), (2, 2), (9, 9)])
def test_predict_equals_the_pipeline_when_several_labels_are_asked_for(original, pipeline, ours, theirs):
    wanted = texts(20)
    _same(pipeline(wanted, {"top_k": ours}), original(wanted, top_k=theirs, **CUT))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_predict_equals_the_pipeline_when_a_function_is_asked_for(original, pipeline, function):
    wanted = texts(20)
    _same(
        pipeline(wanted, {"function_to_apply": function, "top_k": 0}),
        original(wanted, function_to_apply=function, top_k=None, **CUT),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 1},
        {"num_labels": 1, "problem_type": "regression"},
        {"num_labels": 4, "problem_type": "multi_label_classification"},
        {"num_labels": 4, "problem_type": "single_label_classification"},
    ],
)
def test_predict_equals_the_pipeline_when_the_problem_is_another(tiny_bert, settings, tmp_path):
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **settings)
    model = BertForSequenceClassification(config).eval()
    original = pipeline("text-classification", model=model, tokenizer=tokenizer)
    served = pipeline_of(resolve(original), tmp_path)
    wanted = texts(15)
    _same(served(wanted, {"top_k": 0}), original(wanted, top_k=None, truncation=True, max_length=512))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"top_k": -1}, "at least 1"),
        ({"top_k": "2"}, "type integer"),
        ({"top_k": True}, "type integer"),
        ({"function_to_apply": "relu"}, "softmax, sigmoid, none"),
        ({"truncate": True}, "Unknown parameter 'truncate'.*top_k"),
    ],
)
def test_predict_refuses_parameters_when_they_cannot_be_used(pipeline, params, message):
    with pytest.raises(InvalidInputError, match=message):
        pipeline(["a text"], params)


def test_apply_function_stays_finite_when_logits_are_extreme():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    np.testing.assert_allclose(apply_function(logits, "softmax"), [[1, 0, 0]], atol=1e-12)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(apply_function(logits, "sigmoid"), [[1, 0, 0.5]], atol=1e-12)


def test_metric_takes_names_and_indices(pipeline):
    answers = [{"label": "yes"}, {"label": "no"}, {"label": "no"}, {"label": "maybe"}]
    found = pipeline.task.metric(answers, ["yes", 0, 2, "maybe"])
    assert found == pytest.approx({"accuracy": 0.75, "precision": 5 / 6, "recall": 5 / 6, "f1": 7 / 9})


def test_metric_of_all_scores_has_the_loss(pipeline):
    def scored(**scores):
        return [{"label": name, "score": score} for name, score in sorted(scores.items(), key=lambda one: -one[1])]

    answers = [scored(yes=0.5, no=0.25, maybe=0.25), scored(yes=0.125, no=0.75, maybe=0.125)]
    found = pipeline.task.metric(answers, ["yes", "maybe"])
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx(-np.log([0.5, 0.125]).mean())


def test_comparison_measures_scores_and_labels(pipeline):
    comparison = pipeline.task.comparison()
    comparison.add({"logits": np.zeros((2, 3))}, {"logits": np.log([[2.0, 1, 1], [1, 1, 1]])}, {})
    metrics = comparison.metrics()
    assert metrics["max_score_difference"] == pytest.approx(0.5 - 1 / 3)
    assert metrics["label_agreement"] == 1.0
    comparison.add({"logits": np.array([[0.0, 1, 0]])}, {"logits": np.array([[1.0, 0, 0]])}, {})
    assert comparison.metrics()["label_agreement"] == pytest.approx(2 / 3)


def _stars(tmp_path, labels=("1", "2", "3", "4", "5")):
    dims = (Dim("batch", 1, 2, 4), Dim("sequence", 1, 4, 8))
    ids = (TensorSpec("input_ids", "int64", ("batch", "sequence")),)
    signature = Signature(dims, ids, (TensorSpec("logits", "float32", ("batch", len(labels))),))
    return TextClassification({"labels": list(labels), "max_length": 8}, signature, tmp_path)


@pytest.mark.parametrize(
    ("labels", "answers"),
    [
        ([1, 4], ["1", "4"]),
        ([5, np.int64(1)], ["5", "1"]),
        ([2.0, 3.0], ["2", "3"]),
        (["5", 1], ["5", "1"]),
        ([0, 4], ["1", "5"]),  # 0 is no name, so these are indices
    ],
)
def test_metric_takes_whole_numbers_as_names_when_the_labels_are_numbers(tmp_path, labels, answers):
    task = _stars(tmp_path)
    task.check_labels(labels)
    assert task.metric([{"label": name} for name in answers], labels)["accuracy"] == 1.0


@pytest.mark.parametrize(("labels", "bad"), [([1, 6], 1), ([1, -1], 1), (["1", "good"], 1), ([1.5], 0)])
def test_check_labels_names_the_position_when_the_model_has_no_such_label(tmp_path, labels, bad):
    with pytest.raises(InvalidInputError, match=rf"The label {bad} \(.*is no label of the model: 1, 2, 3, 4, 5\."):
        _stars(tmp_path).check_labels(labels)


@pytest.mark.parametrize(
    ("budget", "labels", "message"),
    [
        ("max_part_error <= 1", True, "limits max_part_error, which task 'text-classification' does not measure"),
        ("accuracy_drop <= 0.1, mean_spread_error <= 0.1", True, "limits mean_spread_error"),
        ("loss_rise <= 0.1", False, "limits loss_rise, which needs the right answers"),
        ("accuracy >= 0.9", False, "limits accuracy, which needs the right answers.*labels"),
        ("accuracy_drop <= 0.1", False, "limits accuracy_drop, which needs the right answers"),
    ],
)
def test_check_budget_refuses_a_limit_when_it_will_not_be_measured(tmp_path, budget, labels, message):
    with pytest.raises(InvalidInputError, match=message):
        _stars(tmp_path).check_budget(Budget.of(budget), labels=labels)


def test_check_budget_takes_everything_that_is_measured(tmp_path):
    task = _stars(tmp_path)
    task.check_budget(Budget.of("accuracy >= 0.9, accuracy_drop <= 0.1, worst_cosine >= 0.9"), labels=True)
    task.check_budget(Budget.of("f1_drop <= 0.01, precision >= 0.5, recall_drop <= 0.1, loss_rise <= 0.1"), labels=True)
    task.check_budget(task.default_budget, labels=False)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_a_classifier_of_many_unsure_classes_is_told_from_a_broken_one(function):
    """No score of a thousand is far from any other, so a difference of scores says nothing."""
    random = np.random.default_rng(0)
    logits = 0.5 * random.standard_normal((300, 1000)) - (6 if function == "sigmoid" else 0)

    def violations(got):
        comparison = ScoreComparison(function)
        comparison.add({"logits": logits}, {"logits": got}, {})
        return TextClassification.default_budget.violations(comparison.metrics())

    assert violations(logits + 0.02 * random.standard_normal(logits.shape)) == ()
    for wrong in (
        0 * logits,
        -logits,
        random.permutation(logits),
        np.roll(logits, 1, axis=1),
        10 * logits,
    ):
        assert violations(wrong)


def test_numbers_of_a_regression_are_held_against_their_own_scale(pipeline, tmp_path):
    """Half precision makes another tenth of 300: no score of 0 to 1 is off by as much."""
    signature = dataclasses.replace(pipeline.task.signature, outputs=(TensorSpec("logits", "float32", ("batch", 1)),))
    plain = dataclasses.asdict(pipeline.task.config) | {"labels": ["LABEL_0"], "function_to_apply": "none"}
    task = TextClassification(plain, signature, tmp_path)
    random = np.random.default_rng(0)
    values = 300 + 100 * random.standard_normal((300, 1))

    def violations(got):
        comparison = task.comparison()
        comparison.add({"logits": values}, {"logits": got}, {})
        return task.usual_budget().violations(comparison.metrics())

    assert violations(values.astype(np.float16)) == ()
    for wrong in (-values, 1.2 * values, np.full_like(values, 300), random.permutation(values), values + 20):
        assert violations(wrong)
    assert pipeline.task.usual_budget() == TextClassification.default_budget


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_sure_classifier_may_have_noisy_logits(share):
    """All or most texts are of one class: their scores hardly differ, and neither do a good variant's."""
    random = np.random.default_rng(0)
    sign = np.where(np.arange(300) < 300 * share, -1.0, 1.0)[:, None]
    logits = sign * np.array([[4.4, -4.4]]) + 0.05 * random.standard_normal((300, 2))
    comparison = ScoreComparison("softmax")
    comparison.add({"logits": logits}, {"logits": logits + 0.1 * random.standard_normal((300, 2))}, {})
    assert TextClassification.default_budget.violations(comparison.metrics()) == ()


def test_classes_that_are_called_alike_are_refused_unless_they_are_named_anew():
    config = {"id2label": {0: "yes", 1: "no", 2: "yes"}}
    with pytest.raises(InvalidInputError, match=r"several classes 'yes'.*labels=.*each of its 3 classes"):
        TextClassification.settings_of(config, 3, None, {})
    assert TextClassification.settings_of(config, 3, ["a", "b", "c"], {})["labels"] == ["a", "b", "c"]
    with pytest.raises(InvalidInputError, match="several classes 'a'"):
        TextClassification.settings_of({}, 2, ["a", "a"], {})
