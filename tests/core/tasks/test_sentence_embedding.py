from __future__ import annotations

import numpy as np
import pytest

from mlflow_tdeploy.source.resolve import resolve
from tests.served import pipeline_of, task_of, texts


@pytest.fixture(scope="module")
def model(minilm_path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_path), device="cpu")


@pytest.fixture(scope="module")
def pipeline(model, tmp_path_factory):
    return pipeline_of(resolve(model), tmp_path_factory.mktemp("assets"))


def test_predict_equals_encode_for_real_and_odd_texts(model, pipeline):
    wanted = texts(200)
    assert len(wanted) > 200
    got = pipeline(wanted)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, model.encode(wanted), atol=1e-5)


def test_predict_returns_one_row_when_given_one_text(model, pipeline):
    got = pipeline("a single text")
    assert got.shape == (1, 384)
    np.testing.assert_allclose(got[0], model.encode("a single text"), atol=1e-5)


def test_predict_pads_up_to_the_smallest_sizes_when_a_graph_wants_them(model, tmp_path):
    small = resolve(model, shapes={"batch": (4, 4, 8), "sequence": (32, 32, 256)})
    task = task_of(small, tmp_path)
    feeds = task.encode(["one", "two words"]).collate([0, 1])
    assert feeds["input_ids"].shape == (4, 32)
    got = pipeline_of(small, tmp_path)(["one", "two words"])
    np.testing.assert_allclose(got, model.encode(["one", "two words"]), atol=1e-5)


def test_predict_cuts_texts_when_shapes_allows_less_than_the_model(model, tmp_path):
    short = pipeline_of(resolve(model, shapes={"sequence": (1, 8, 8)}), tmp_path)
    long = "one two three four five six seven eight nine ten"
    np.testing.assert_allclose(short([long])[0], short(["one two three four five six"])[0], atol=1e-5)


def test_answer_form_names_the_width(pipeline):
    form = pipeline.task.answer_form()
    assert (form.kind, form.width) == ("array", 384)


def test_comparison_sees_a_turned_vector(pipeline):
    comparison = pipeline.task.comparison()
    a = {"sentence_embedding": np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)}
    b = {"sentence_embedding": np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)}
    comparison.add(a, b, {})
    assert comparison.metrics()["worst_cosine"] == pytest.approx(np.sqrt(0.5))
