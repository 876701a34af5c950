"""Searches in MLflow: a run for each, with a step for each trial, a table and a picture."""

from __future__ import annotations

import dataclasses
import json

import mlflow
from mlflow import MlflowClient

from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.registry_io import describe, searches, tag_logged_model
from mlflow_tdeploy.registry_io.searches import PICTURE, TABLE
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, accuracy, make_bundle
from tests.registry_io.models import log

TRIALS = [
    {"what": "0 in fp32", "seconds": 2.0, "passed": False, "answering_seconds": 1.0, "worst_cosine": 0.98},
    {"what": "0 in fp32", "seconds": 1.0, "distance": 0.2},
    {"what": "1 in fp32", "seconds": 2.0, "passed": False, "answering_seconds": 1.2, "worst_cosine": 0.99},
    {"what": "1 in fp32", "seconds": 2.5, "passed": True, "answering_seconds": 1.5, "worst_cosine": 0.997},
]


def searched(folder, budget="worst_cosine >= 0.995"):
    evidence = [dataclasses.replace(accuracy("onnx-int8"), settings={"budget": budget})]
    root = make_bundle(folder, {"onnx-fp32": WEIGHTS, "onnx-int8": WEIGHTS}, evidence={"onnx-int8": evidence})
    variant = Bundle.open(root).variants["onnx-int8"]
    settings = {"searched": "1 in fp32", "trials": TRIALS}
    precision = dataclasses.replace(variant.precision, settings=settings)
    (root / "tdeploy/variants/onnx-int8.json").write_text(to_json(dataclasses.replace(variant, precision=precision)))
    return root


def logged(folder):
    root = searched(folder)
    info = log(root)
    bundle = Bundle.open(root)
    for _ in range(2):  # as an extension of the model does later on
        tag_logged_model(info.model_id, *describe(bundle), searches(bundle))
    tags = mlflow.get_logged_model(info.model_id).tags
    return info, MlflowClient().get_run(tags["tdeploy.search.onnx-int8"])


def test_a_search_becomes_one_run_with_a_step_for_each_trial(tracking, tmp_path):
    info, run = logged(tmp_path / "m")
    client = MlflowClient()
    steps = {name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
             for name in ("distance", "worst_cosine", "passed", "seconds")}  # fmt: skip
    assert steps == {
        "distance": [(1, 0.2)],
        "worst_cosine": [(0, 0.98), (2, 0.99), (3, 0.997)],
        "passed": [(0, 0.0), (2, 0.0), (3, 1.0)],
        "seconds": [(0, 2.0), (1, 1.0), (2, 2.0), (3, 2.5)],
    }
    assert run.data.params == {
        "variant": "onnx-int8", "budget": "worst_cosine >= 0.995", "found": "1 in fp32", "trials": "4"
    }  # fmt: skip
    assert run.info.status == "FINISHED"
    assert run.data.tags["tdeploy.model_id"] == info.model_id
    experiment = run.info.experiment_id
    found = client.search_runs([experiment], "tags.`tdeploy.variant` = 'onnx-int8'")
    assert [one.info.run_id for one in found] == [run.info.run_id]


def test_its_table_and_picture_are_artifacts(tracking, tmp_path):
    _, run = logged(tmp_path / "m")
    assert {one.path for one in MlflowClient().list_artifacts(run.info.run_id)} == {TABLE, PICTURE}
    table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{TABLE}"))
    assert [row[table["columns"].index("what")] for row in table["data"]] == [one["what"] for one in TRIALS]
    assert mlflow.artifacts.load_image(f"{run.info.artifact_uri}/{PICTURE}").width > 400


def test_a_picture_shows_the_trials_that_were_asked_everything(tmp_path):
    (search,) = searches(Bundle.open(searched(tmp_path / "m")))
    points = [(one.x, one.y, one.good, one.chosen) for one in search.points()]
    assert points == [(1.0, 0.98, False, False), (1.2, 0.99, False, False), (1.5, 0.997, True, True)], (
        "another one spares as many, and is over the budget"
    )


def test_a_budget_that_cannot_be_read_is_the_models_own(tmp_path):
    (search,) = searches(Bundle.open(searched(tmp_path / "m", budget="sharpness >= 3")))
    assert [str(one) for one in search.budget] == ["worst_cosine >= 0.99"]


def test_the_run_lies_below_the_one_that_logged_the_model(tracking, tmp_path):
    with mlflow.start_run() as parent:
        _, run = logged(tmp_path / "m")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_a_search_that_found_nothing_is_a_run_too_and_hides_no_later_one(tracking, tmp_path):
    root = searched(tmp_path / "m")
    info = log(root)
    bundle = Bundle.open(root)
    (found,) = searches(bundle)
    failed = [{**one, "passed": False, "violations": "too far off"} for one in TRIALS]
    nothing = dataclasses.replace(found, outcome="", trials=tuple(failed))
    for _ in range(2):
        tag_logged_model(info.model_id, *describe(bundle), again=[nothing])
    tag_logged_model(info.model_id, *describe(bundle), searches(bundle))
    tags = mlflow.get_logged_model(info.model_id).tags
    run, after = (MlflowClient().get_run(tags[f"tdeploy.search.{name}"]) for name in ("nothing.onnx-int8", "onnx-int8"))
    assert run.data.params["found"] == "nothing within the budget"
    assert after.data.params["found"] == "1 in fp32"
    table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{TABLE}"))
    assert "violations" in table["columns"]
    runs = MlflowClient().search_runs([run.info.experiment_id], "tags.`tdeploy.variant` = 'onnx-int8'")
    assert len(runs) == 3, "each time that it was looked for in vain"


def test_evidence_of_a_model_that_no_run_has_logged_is_in_one_run(tracking, tmp_path):
    root = searched(tmp_path / "m")
    info, bundle = log(root), Bundle.open(root)
    for _ in range(3):
        tag_logged_model(info.model_id, *describe(bundle))
    runs = [one for one in mlflow.search_runs(output_format="list") if one.info.run_name.endswith("evidence")]
    assert [one.data.tags["tdeploy.model_id"] for one in runs] == [info.model_id]
    MlflowClient().delete_run(runs[0].info.run_id)
    tag_logged_model(info.model_id, *describe(bundle))
    tags = mlflow.get_logged_model(info.model_id).tags
    assert tags["tdeploy.evidence_run"] != runs[0].info.run_id


def test_a_model_without_searches_gets_no_run(tracking, tmp_path):
    bundle = Bundle.open(root := make_bundle(tmp_path / "m", {"onnx-fp32": WEIGHTS}))
    info = log(root)
    tag_logged_model(info.model_id, *describe(bundle), searches(bundle))
    assert not [one for one in mlflow.search_runs(output_format="list") if "tdeploy.variant" in one.data.tags]
