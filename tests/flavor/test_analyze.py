"""``analyze_model`` and ``tdeploy analyze``: variants as they serve, side by side."""

from __future__ import annotations

import json
import shutil

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.cli import main
from mlflow_tdeploy.core.measure import Timing
from mlflow_tdeploy.runtime import analysis
from mlflow_tdeploy.runtime.analysis import Speed
from mlflow_tdeploy.runtime.footprint import footprint
from mlflow_tdeploy.runtime.power import Meter
from tests.bundles import WEIGHTS, make_bundle
from tests.core.text_assets import LABELS
from tests.flavor.text_bundles import make_text_bundle

TEXTS = ["good", "bad good", "good good bad", "bad"]
QUICK = {"rounds": 3, "seconds": 0.05}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of its own, and a host without counters: some have them. Memory takes a process for each variant."""
    monkeypatch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(analysis, "footprint", lambda bundle, candidate, request: 100.0)
    monkeypatch.setattr("mlflow_tdeploy.flavor.analyze.meters", lambda gpu: ([], "nothing is counted here"))


@pytest.fixture
def classifier(tmp_path):
    return make_text_bundle(tmp_path / "m", "text-classification")


def test_every_variant_is_measured_alike(classifier, monkeypatch):
    monkeypatch.setattr(analysis, "footprint", footprint)
    best = [one["label"] for one in mlflow_tdeploy.load_model(classifier).predict(TEXTS)]
    labels = [*best[:3], next(name for name in LABELS if name != best[3])]
    found = mlflow_tdeploy.analyze_model(classifier, {"text": TEXTS, "label": labels}, batches=[1, 3], **QUICK)
    assert [one.name for one in found.variants] == ["ort-cpu-int8", "onnx-fp32"]
    for one in found.variants:
        assert one.quality["accuracy"] == 0.75
        assert set(one.quality) == {"accuracy", "precision", "recall", "f1", "loss"}
        assert [(asked.items, asked.timing.count) for asked in one.speed] == [(1, 3), (3, 3)]
        assert 20 < one.memory_mib < 2000
        assert one.energy is None
    assert (found.data.count, found.labels) == (4, 4)
    assert found.unmeasured == "nothing is counted here"


def test_throughput_is_of_items():
    assert Speed(8, Timing.of([0.1, 0.1])).per_second == pytest.approx(80.0)


class Steady(Meter):
    """Two joules for each time it is asked."""

    name = "steady"

    def __init__(self):
        self.asked = 0

    def joules(self):
        self.asked += 1
        return 2.0 * self.asked


def test_energy_by_item_is_power_times_time(classifier, monkeypatch):
    monkeypatch.setattr("mlflow_tdeploy.flavor.analyze.meters", lambda gpu: ([Steady()], ""))
    answered = []
    real = analysis._ask

    def ask(model, candidate, request, params=None):
        answered.append(request)
        return real(model, candidate, request, params)

    monkeypatch.setattr(analysis, "_ask", ask)
    found = mlflow_tdeploy.analyze_model(classifier, TEXTS, variants=["onnx-fp32"], batches=[2], **QUICK)
    (one,) = found.variants
    assert one.energy.by == ("steady",)
    items = sum(map(len, answered[1 + analysis._WARMUP + one.speed[0].timing.count + 1 :]))
    assert one.energy.joules_per_item == pytest.approx(2.0 / items)
    assert "J/item" in found.table()
    assert one.metrics()["power_w"] == one.energy.watts


def test_energy_of_arrays_is_by_item_too(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_tdeploy.flavor.analyze.meters", lambda gpu: ([Steady()], ""))
    root = make_bundle(tmp_path / "m", {"onnx-fp32": WEIGHTS})
    answered = []
    real = analysis._ask
    monkeypatch.setattr(analysis, "_ask", lambda *given: answered.append(1) or real(*given))
    (one,) = mlflow_tdeploy.analyze_model(root, [{"x": np.ones((3, 4), np.float32)}], **QUICK).variants
    counted = len(answered) - (1 + analysis._WARMUP + one.speed[0].timing.count + 1)
    assert one.energy.joules_per_item == pytest.approx(2.0 / (3 * counted))


def test_energy_is_that_of_the_device_that_answers(classifier, monkeypatch):
    class Idle(Steady):
        name, of_gpu = "idle GPU", True

    monkeypatch.setattr("mlflow_tdeploy.flavor.analyze.meters", lambda gpu: ([Idle()], "only root may"))
    found = mlflow_tdeploy.analyze_model(classifier, TEXTS, batches=[1], **QUICK)
    assert [one.energy for one in found.variants] == [None, None]
    assert found.unmeasured == "only root may"


def test_arrays_of_several_sizes_are_timed_apart(tmp_path):
    root = make_bundle(tmp_path / "m", {"onnx-fp32": WEIGHTS})
    requests = [{"x": np.ones((size, 4), np.float32)} for size in (1, 3, 1, 2, 4, 3, 2)]
    (one,) = mlflow_tdeploy.analyze_model(root, requests[:2], **QUICK).variants
    assert [asked.items for asked in one.speed] == [1, 3]
    (one,) = mlflow_tdeploy.analyze_model(root, requests, **QUICK).variants
    assert [asked.items for asked in one.speed] == [1, 2, 3, 4]


def test_a_percentile_is_told_of_enough_requests():
    assert "p95_ms" not in Speed(1, Timing.of([0.1] * 19)).figures()
    assert "p99_ms" not in Speed(1, Timing.of([0.1] * 99)).figures()
    assert {"p95_ms", "p99_ms"} <= Speed(1, Timing.of([0.1] * 100)).figures().keys()
    assert Speed(1, Timing.of([0.1] * 3)).figures()["requests"] == 3


def test_memory_that_cannot_be_measured_loses_nothing_else(classifier, monkeypatch, caplog):
    monkeypatch.setattr(analysis, "footprint", footprint)
    monkeypatch.setattr("mlflow_tdeploy.runtime.footprint._SCRIPT", "raise SystemExit('no memory left')")
    found = mlflow_tdeploy.analyze_model(classifier, TEXTS, batches=[1], **QUICK)
    assert [one.memory_mib for one in found.variants] == [None, None]
    assert "no memory left" in caplog.text
    assert "memory_mib" not in found.variants[0].metrics()


def test_memory_is_of_the_largest_requests(classifier, monkeypatch):
    asked = []
    monkeypatch.setattr(analysis, "footprint", lambda bundle, candidate, request: asked.append(request) or 1.0)
    mlflow_tdeploy.analyze_model(classifier, ["good"] * 5, batches=[3, 1], variants=["onnx-fp32"], **QUICK)
    assert asked == [["good"] * 3]


def test_tensors_are_asked_as_they_are(tmp_path):
    root = make_bundle(tmp_path / "m", {"onnx-fp32": WEIGHTS})
    requests = [{"x": np.full((3, 4), value, np.float32)} for value in range(1, 4)]
    (one,) = mlflow_tdeploy.analyze_model(root, requests, **QUICK).variants
    assert [asked.items for asked in one.speed] == [3]
    assert one.quality == {}
    assert mlflow_tdeploy.analyze_model(root, **QUICK).data.count > 0


def test_a_variant_that_does_not_open_is_left_out_unless_it_is_the_only_one(classifier, caplog):
    (classifier / "tdeploy/files/ort-cpu-int8/model.onnx").write_bytes(b"broken")
    found = mlflow_tdeploy.analyze_model(classifier, TEXTS, batches=[1], **QUICK)
    assert [one.name for one in found.variants] == ["onnx-fp32"]
    assert "ort-cpu-int8 is left out" in caplog.text
    with pytest.raises(MlflowException, match="ort-cpu-int8"):
        mlflow_tdeploy.analyze_model(classifier, TEXTS, variants=["ort-cpu-int8"], batches=[1], **QUICK)


def test_labels_that_no_metric_takes_are_refused(tmp_path):
    root = make_text_bundle(tmp_path / "m", "sentence-embedding")
    with pytest.raises(MlflowException, match="no metric that takes labels"):
        mlflow_tdeploy.analyze_model(root, {"text": TEXTS, "label": [0, 1, 0, 1]}, **QUICK)


def test_json_tells_no_percentile_that_the_table_does_not(classifier):
    (one,) = mlflow_tdeploy.analyze_model(classifier, TEXTS, variants=["onnx-fp32"], batches=[1], **QUICK).variants
    (speed,) = one.as_dict()["speed"]
    assert (speed["items"], speed["requests"]) == (1, 3)
    assert "p50_ms" in speed
    assert not {"p95_ms", "p99_ms"} & speed.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"variants": ["int9"]}, "int9"),
        ({"variants": []}, "variants is empty"),
        ({"batches": [0]}, "at least 1"),
        ({"rounds": 0}, "above 0"),
        ({"record": True}, "outside MLflow"),
        ({"data": {"text": ["good"], "label": ["no such label"]}}, "no label of the model"),
        ({"data": [{"x": np.zeros(3)}]}, "texts"),
    ],
)
def test_what_cannot_be_measured_is_refused(classifier, given, message):
    with pytest.raises(MlflowException, match=message):
        mlflow_tdeploy.analyze_model(classifier, **{"data": TEXTS, **QUICK, **given})


def test_a_record_is_a_run_with_metrics_a_table_json_and_a_picture(tracking, classifier):
    labels = [one["label"] for one in mlflow_tdeploy.load_model(classifier).predict(TEXTS)]
    with mlflow.start_run() as parent:
        info = mlflow_tdeploy.log_model(classifier, name="words", registered_model_name="words")
    data = {"text": TEXTS, "label": labels}
    found = mlflow_tdeploy.analyze_model("models:/words/1", data, batches=[1], record=True, **QUICK)
    run = MlflowClient().get_run(found.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["tdeploy.analysis"] == found.host.kind
    assert run.data.metrics["onnx-fp32.analysis.accuracy"] == 1.0
    assert run.data.params["items"] == "4"
    files = {one.path for one in MlflowClient().list_artifacts(found.run_id)}
    assert files == {"analysis_table.json", "analysis.json", "accuracy_against_speed.png"}
    document = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/analysis.json"))
    assert document == json.loads(json.dumps(found.as_dict()))
    (model,) = mlflow.search_logged_models(
        filter_string="metrics.`ort-cpu-int8.analysis.p50_ms_of_1` > 0", output_format="list"
    )
    assert model.model_id == info.model_id


def test_what_mlflow_does_not_take_costs_no_measurement(tracking, classifier, monkeypatch, caplog):
    mlflow_tdeploy.log_model(classifier, name="words", registered_model_name="words")

    def refused(*given):
        raise MlflowException("no space left")

    monkeypatch.setattr("mlflow_tdeploy.flavor.analyze.log_rows", refused)
    arguments = ["--batch", "1", "--rounds", "1", "--variant", "onnx-fp32", "--record"]
    result = CliRunner().invoke(main, ["analyze", "models:/words/1", *arguments])
    assert result.exit_code == 1
    assert "items/s" in result.output
    assert "not recorded" in result.output
    assert "no space left" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "a.foo"], ".png or .svg"),
        (["--plot", "/none/a.png"], "no folder"),
        (["--json", "/none/a.json"], "no folder"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(classifier, options, message):
    result = CliRunner().invoke(main, ["analyze", str(classifier), *options])
    assert (result.exit_code, message in result.output, " s  open" in result.output) == (2, True, False)


def test_the_command_prints_a_table_and_writes_json_and_a_picture(classifier, tmp_path):
    label = mlflow_tdeploy.load_model(classifier).predict(["good"])[0]["label"]
    (tmp_path / "data.tsv").write_text(f"label\ttext\n{label}\tgood\n")
    arguments = ["--data", tmp_path / "data.tsv", "--batch", 2, "--rounds", 3, "--seconds", 0.05]
    arguments += ["--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    result = CliRunner().invoke(main, ["analyze", str(classifier), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "1 with labels" in result.output
    assert "2: p50 ms" in result.output
    assert json.loads((tmp_path / "a.json").read_text())["variants"][0]["quality"]["accuracy"] == 1.0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(classifier / "tdeploy/evidence")  # nothing is known of how good a variant is then
    arguments = ["--variant", "onnx-fp32", "--batch", "1", "--rounds", "1", "--plot", str(tmp_path / "b.png")]
    result = CliRunner().invoke(main, ["analyze", str(classifier), *arguments])
    assert result.exit_code == 1
    assert "nothing to draw" in result.output
