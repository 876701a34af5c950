"""Real models through the whole flavor: from a Hugging Face model to answers over MLflow."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy

TEXTS = ["The cat sits on the mat.", "Stock prices fell sharply today.", "short", "a " * 60]


def test_log_model_makes_checks_and_serves_variants_of_a_classifier(tracking, tiny_bert):
    from transformers import pipeline

    steps = []
    info = mlflow_tdeploy.log_model(
        str(tiny_bert),
        "classifier",
        task="text-classification",
        shapes={"batch": (1, 4, 8), "sequence": (1, 16, 64)},
        precisions=["fp32"],
        verify_with=TEXTS,
        progress=steps.append,
        registered_model_name="classifier",
    )
    assert steps
    served = mlflow.pyfunc.load_model("models:/classifier/1")
    table = served.predict(TEXTS)
    original = pipeline("text-classification", model=str(tiny_bert), device="cpu")(
        TEXTS, truncation=True, max_length=64
    )
    assert table["label"].tolist() == [answer["label"] for answer in original]
    np.testing.assert_allclose(table["score"], [answer["score"] for answer in original], atol=1e-4)
    assert served.get_raw_model().decision.chosen.variant.startswith(("onnx", "ort"))
    (found,) = mlflow.search_logged_models(
        filter_string="tags.`tdeploy.variant.onnx-fp32` = 'ok' AND metrics.`onnx-fp32.max_score_difference` < 0.001",
        output_format="list",
    )
    assert found.model_id == info.model_id


@pytest.mark.slow
def test_extend_model_adds_int8_to_a_registered_version_of_the_real_model(tracking, minilm_path):
    mlflow_tdeploy.log_model(
        str(minilm_path), "minilm", precisions=["fp32"], budget="worst_cosine >= 0.95", registered_model_name="minilm"
    )
    strict = {"budget": "worst_cosine >= 0.999", "on_budget": "raise"}
    with pytest.raises(MlflowException, match="over the model's budget"):  # worst cosine about 0.992
        mlflow_tdeploy.extend_model("models:/minilm/1", precisions=["int8"], **strict)
    (added,) = mlflow_tdeploy.extend_model("models:/minilm/1", precisions=["int8"])
    assert added.precision.name == "int8"
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(minilm_path), device="cpu").encode(TEXTS)
    got = mlflow.pyfunc.load_model("models:/minilm/1").predict(TEXTS, params={"variant": added.id})
    assert (got * expected).sum(axis=1).min() > 0.95
    exact = mlflow.pyfunc.load_model("models:/minilm/1").predict(TEXTS, params={"variant": "onnx-fp32"})
    assert (exact * expected).sum(axis=1).min() > 0.9999
