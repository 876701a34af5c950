from __future__ import annotations

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, accuracy, make_bundle

BOTH = {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}
UNVERIFIED = {"onnx-fp32": [], "ort-cpu-fp32": []}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("store", ["tracking", "remote"])
def test_a_variant_without_evidence_serves_once_a_host_has_verified_it(request, store, tmp_path):
    request.getfixturevalue(store)
    made = make_bundle(tmp_path / "made", BOTH, evidence=UNVERIFIED)
    info = mlflow_tdeploy.log_model(made, "linear", registered_model_name="later")
    with mlflow_tdeploy.load_model("models:/later/1") as model:
        assert model.decision.chosen.variant == "onnx-fp32"
    found = mlflow_tdeploy.verify_model("models:/later/1")
    assert list(found) == ["ort-cpu-fp32"]
    assert found["ort-cpu-fp32"].passed
    assert found["ort-cpu-fp32"].settings["reference"] == "onnx-fp32"
    with mlflow_tdeploy.load_model("models:/later/1") as model:
        assert model.decision.chosen.variant == "ort-cpu-fp32"
    assert MlflowClient().get_logged_model(info.model_id).tags["tdeploy.variant.ort-cpu-fp32"] == "ok"


def test_a_variant_that_fails_serves_nowhere_any_more(tmp_path):
    root = make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS * np.float32(-1)})
    with mlflow_tdeploy.load_model(root) as model:  # the golden request saves it
        assert model.decision.chosen.variant == "onnx-fp32"
    result = CliRunner().invoke(main, ["verify", str(root)])
    assert result.exit_code == 1
    assert "Over the model's budget here: ort-cpu-fp32" in result.output
    assert "check ort-cpu-fp32" in result.output
    with mlflow_tdeploy.load_model(root) as model:
        reasons = {candidate.variant: candidate.reason for candidate in model.decision.candidates}
    assert reasons["ort-cpu-fp32"].startswith("over budget: worst_cosine")


def test_the_data_that_was_given_is_what_was_used(tmp_path):
    root = make_bundle(tmp_path, BOTH)
    requests = [{"x": np.full((1, 4), value, np.float32)} for value in range(1, 6)]
    (record,) = mlflow_tdeploy.verify_model(root, ["ort-cpu-fp32"], verify_with=requests).values()
    assert record.data.count == 5


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["no-such"], "has no variant 'no-such'. It has: gone, onnx-fp32, warped"),
        (["onnx-fp32"], "what the other variants are compared with"),
        (["gone"], "were not kept: there is nothing to check"),
        (["warped"], "No runtime on this host opens variant 'warped'"),
        (None, "Nothing to check here. No runtime on this host opens variant 'warped'"),
    ],
)
def test_what_cannot_be_verified_is_said_and_nothing_is_added(tmp_path, variants, message):
    root = make_bundle(
        tmp_path,
        {"onnx-fp32": WEIGHTS, "gone": WEIGHTS, "warped": WEIGHTS},
        evidence={"onnx-fp32": [], "gone": [accuracy("gone", passed=False)], "warped": []},
        changes={"gone": {"files": ()}, "warped": {"format": "warp"}},
    )
    before = sorted((root / "tdeploy/evidence").rglob("*"))
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.verify_model(root, variants)
    assert sorted((root / "tdeploy/evidence").rglob("*")) == before


def test_verified_and_failed_are_both_on_record(tmp_path):
    root = make_bundle(tmp_path, BOTH)
    mlflow_tdeploy.verify_model(root)
    mlflow_tdeploy.verify_model(root)
    assert len([r for r in Bundle.open(root).evidence("ort-cpu-fp32") if r.kind == "accuracy"]) == 3


def test_verify_is_an_attribute_of_mlflow_tdeploy_too():
    assert mlflow.tdeploy.verify_model is mlflow_tdeploy.verify_model


def test_a_verdict_counts_as_the_newest_also_where_another_hosts_clock_is_ahead(tmp_path):
    ahead = {name: [accuracy(name, created="2999-01-01T00:00:00.000000+00:00")] for name in BOTH}
    root = make_bundle(tmp_path, {**BOTH, "ort-cpu-fp32": WEIGHTS * np.float32(-1)}, evidence=ahead)
    record = mlflow_tdeploy.verify_model(root)["ort-cpu-fp32"]
    assert not record.passed
    assert record.created == "2999-01-01T00:00:00.000001+00:00"
    reasons = {c.variant: c.reason for c in decide_bundle(Bundle.open(root), probe.host()).candidates}
    assert reasons["ort-cpu-fp32"].startswith("over budget")
