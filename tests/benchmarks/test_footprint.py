"""The closure of a requirement follows markers and extras."""

from benchmarks import footprint


def test_closure_follows_extras_when_they_are_asked_for():
    bare, _ = footprint.closure(["mlflow-tdeploy"])
    served, _ = footprint.closure(["mlflow-tdeploy[cpu]"])
    assert "onnxruntime" not in bare
    assert "onnxruntime" in served
    assert {"mlflow", "numpy", "tokenizers"} <= set(bare)


def test_closure_of_a_serving_environment_holds_no_torch():
    served, missing = footprint.closure(["mlflow-tdeploy[cpu]"])
    assert not {"torch", "transformers", "sentence-transformers"} & set(served)
    assert missing == []


def test_closure_names_what_is_not_installed():
    assert footprint.closure(["no-such-distribution-of-ours"]) == ({}, ["no-such-distribution-of-ours"])


def test_installed_bytes_counts_the_source_when_a_distribution_is_editable():
    found, _ = footprint.closure(["mlflow-tdeploy"])
    assert 100_000 < footprint.installed_bytes(found["mlflow-tdeploy"]) < 20_000_000
