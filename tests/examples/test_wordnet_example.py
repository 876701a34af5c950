"""The WordNet example as a user runs it: train, log, register, predict; and the sample that it reads."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "wordnet"
WORDNET = Path("/usr/share/wordnet")
TEXTS = ["a large motorboat that has a cabin", "walk without lifting the feet", "a sweet baked dish", "unbolt"]


def load_make_sample():
    spec = importlib.util.spec_from_file_location("make_sample", EXAMPLE / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    lines = (EXAMPLE / "data" / name).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "label\ttext"
    return [tuple(line.split("\t")) for line in lines[1:]]


def test_sample_has_every_class_and_no_text_twice():
    train, test = read("train.tsv"), read("test.tsv")
    labels = {label for label, _ in train}
    assert labels == {label for label, _ in test} == set(load_make_sample().LEXICOGRAPHER_FILES)
    texts = [text.lower() for _, text in train + test]
    assert len(texts) == len(set(texts))
    assert all(texts)
    assert "Princeton University" in (EXAMPLE / "data" / "LICENSE").read_text(encoding="utf-8")


def test_check_texts_are_distinct_of_every_length_and_not_in_the_sample():
    folder = ROOT / "mlflow_tdeploy" / "build" / "data"
    texts = (folder / "glosses.txt").read_text(encoding="utf-8").splitlines()
    words = [len(text.split()) for text in texts]
    assert len(texts) == len(set(texts)) == 384
    assert min(words) == 1
    assert sum(count > 300 for count in words) == 20
    assert sum(count > 512 for count in words) == 8
    assert not set(texts) & {text for _, text in read("train.tsv") + read("test.tsv")}
    assert "Princeton University" in (folder / "LICENSE.wordnet").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("gloss", "text"),
    [
        ('a striking change; "the metamorphosis of the old house"', "a striking change"),
        ("have a firm understanding; be on top of  ", "have a firm understanding; be on top of"),
        ('with "quotes" inside', None),
        ("", None),
    ],
)
def test_definition_is_the_gloss_without_its_usage_examples(gloss, text):
    assert load_make_sample().definition(gloss) == text


@pytest.mark.skipif(not (WORDNET / "data.noun").exists(), reason="Debian's package wordnet-base is not installed")
def test_the_script_makes_the_committed_bytes(tmp_path):
    load_make_sample().main([str(WORDNET), "--out", str(tmp_path / "data"), "--glosses", str(tmp_path / "glosses")])
    made = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    committed = [*(EXAMPLE / "data").iterdir(), *(ROOT / "mlflow_tdeploy" / "build" / "data").iterdir()]
    assert made == {path.name: path.read_bytes() for path in committed if path.name in made}
    assert len(made) == 6


def scores(trained_model):
    """Per text, the score of each label as the transformers pipeline gives them."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(trained_model), top_k=None, device="cpu")
    return [{entry["label"]: entry["score"] for entry in entries} for entries in classify(TEXTS)]


def predictions(folder, **model_config):
    import mlflow

    (model,) = folder.rglob("MLmodel")
    answer = mlflow.pyfunc.load_model(str(model.parent), model_config=model_config).predict(TEXTS)
    return answer.to_dict("records") if hasattr(answer, "to_dict") else answer


@pytest.mark.slow
def test_script_registers_a_model_that_predicts_what_the_pipeline_does(tmp_path):
    """One test, not several over a fixture: parallel workers would train and build once each."""
    import mlflow

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    env = {**os.environ, "MLFLOW_TRACKING_URI": store, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, str(EXAMPLE / "train.py"), "--max-steps", "3", "--test-texts", "240"]
    command += ["--alias", "champion", "--out", "trained"]
    # The working directory is where a SQLite store puts its artifacts.
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "model_uri models:/" in done.stdout
    assert len(re.findall(r"\b(?:noun|verb|adj|adv)\.\w+", done.stdout)) >= 3

    client = mlflow.MlflowClient(tracking_uri=store, registry_uri=store)
    assert int(client.get_model_version_by_alias("gloss-classifier", "champion").version) == 1
    (run,) = client.search_runs(["0"])
    assert run.data.params["max_steps"] == "3"
    assert 0 <= run.data.metrics["accuracy"] <= 1

    expected = scores(tmp_path / "trained")
    answers = predictions(tmp_path, variant="onnx-fp32")
    assert [answer["label"] for answer in answers] == [max(row, key=row.get) for row in expected]
    for answer, row in zip(answers, expected, strict=True):
        assert answer["score"] == pytest.approx(row[answer["label"]], abs=1e-4)

    # After three steps the scores are nearly level, so the variant that is served, maybe quantized, may rightly put
    # the runner-up first: what is promised is a score within the budget.
    for answer, row in zip(predictions(tmp_path), expected, strict=True):
        assert answer["score"] == pytest.approx(row[answer["label"]], abs=0.02)
        assert row[answer["label"]] >= max(row.values()) - 0.04
