from __future__ import annotations

import numpy as np
import pytest

from mlflow_tdeploy.source.resolve import resolve
from tests.served import pipeline_of, texts


@pytest.fixture(scope="module")
def original(tiny_bert):
    from transformers import AutoModel, AutoTokenizer, pipeline

    model = AutoModel.from_pretrained(tiny_bert)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    cut = {"truncation": True, "max_length": 128}
    return pipeline("feature-extraction", model=model, tokenizer=tokenizer, tokenize_kwargs=cut, device="cpu")


@pytest.fixture(scope="module")
def pipeline(original, tmp_path_factory):
    return pipeline_of(resolve(original), tmp_path_factory.mktemp("assets"))


def test_predict_equals_the_pipeline_for_real_and_odd_texts(original, pipeline):
    wanted = texts(120)
    got = pipeline(wanted)
    theirs = original(wanted)
    assert len(got) == len(theirs)
    for mine, other in zip(got, theirs, strict=True):
        assert mine.shape == np.shape(other)
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_predict_equals_the_pipeline_when_padding_is_on_the_left(original, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(original.tokenizer.name_or_path, padding_side="left")
    model = resolve(original.model, tokenizer=tokenizer)
    assert model.task_config["padding_side"] == "left"
    task = pipeline_of(model, tmp_path).task
    feeds = task.encode(["one", "one two three"]).collate([0, 1])
    assert feeds["attention_mask"][0].tolist() == [0, 0, 1, 1, 1]
    assert feeds["input_ids"][0, :2].tolist() == [0, 0]
    decoded = task.decode({"last_hidden_state": np.arange(20.0).reshape(2, 5, 2)}, feeds, 2, {})
    assert decoded[0].tolist() == [[[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]]


def test_comparison_leaves_padding_out(pipeline):
    comparison = pipeline.task.comparison()
    reference = {"last_hidden_state": np.ones((1, 2, 3), np.float32)}
    got = {"last_hidden_state": np.array([[[1, 1, 1], [-9, 9, 9]]], np.float32)}
    comparison.add(reference, got, {"attention_mask": np.array([[1, 0]])})
    assert comparison.metrics()["max_difference"] == 0.0
    assert comparison.metrics()["rows"] == 1
    comparison.add(reference, got, {"attention_mask": np.array([[1, 1]])})
    assert comparison.metrics()["max_difference"] == 10.0
