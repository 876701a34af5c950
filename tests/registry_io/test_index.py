"""Tags and metrics that MLflow's search finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient

from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.registry_io import (
    describe,
    locate,
    tag_logged_model,
)
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, accuracy, make_bundle
from tests.registry_io.models import log


def test_search_logged_models_finds_an_int8_variant_by_its_cosine(tracking, tmp_path):
    evidence = {
        "onnx-fp32": [accuracy("onnx-fp32")],
        "ort-cpu-int8": [dataclasses.replace(accuracy("ort-cpu-int8"), metrics={"worst_cosine": 0.994})],
    }
    variants = {"onnx-fp32": WEIGHTS, "ort-cpu-int8": WEIGHTS}
    good = log(make_bundle(tmp_path / "good", variants, evidence=evidence))
    evidence["ort-cpu-int8"] = [accuracy("ort-cpu-int8", passed=False)]
    bad = log(make_bundle(tmp_path / "bad", variants, evidence=evidence))

    def search(text):
        return {found.model_id for found in mlflow.search_logged_models(filter_string=text, output_format="list")}

    int8 = "tags.`tdeploy.variant.ort-cpu-int8` = 'ok' AND metrics.`ort-cpu-int8.worst_cosine` > {}"
    assert search(int8.format(0.99)) == {good.model_id}
    assert search(int8.format(0.995)) == set()
    assert search("metrics.`ort-cpu-int8.worst_cosine` > 0.5") == {good.model_id, bad.model_id}
    assert search("tags.`tdeploy.variant.ort-cpu-int8` = 'over budget'") == {bad.model_id}
    assert search("tags.`tdeploy.task` = 'tensors'") == {good.model_id, bad.model_id}


def test_describe_lists_variants_precisions_dims_and_evidence(tmp_path):
    evidence = {"onnx-fp32": [], "ort-cpu-int8": [accuracy("ort-cpu-int8", passed=False)], "onnx-fp16": []}
    variants = {"onnx-fp32": WEIGHTS, "ort-cpu-int8": WEIGHTS, "onnx-fp16": WEIGHTS.astype(np.float16)}
    tags, metrics = describe(Bundle.open(make_bundle(tmp_path / "m", variants, evidence=evidence)))
    assert tags["tdeploy.variants"] == "onnx-fp32"
    assert tags["tdeploy.precisions"] == "fp32"
    assert tags["tdeploy.dims"] == "batch=1..8"
    assert tags["tdeploy.budget"] == "worst_cosine >= 0.99"
    assert tags["tdeploy.variant.onnx-fp32"] == "ok"
    assert tags["tdeploy.variant.onnx-fp16"] == "unverified"
    assert tags["tdeploy.variant.ort-cpu-int8"] == "over budget"
    assert metrics == {"ort-cpu-int8.worst_cosine": 0.9}


def test_describe_tells_over_budget_failed_and_not_made_apart(tmp_path):
    bad = dataclasses.replace(accuracy("ort-cpu-int8"), passed=False, violations=("worst_cosine is 0.9",))
    broken = dataclasses.replace(accuracy("onnx-fp16"), passed=False, violations=("no answer",), metrics={})
    evidence = {"onnx-fp32": [accuracy("onnx-fp32")], "ort-cpu-int8": [bad], "onnx-fp16": [broken]}
    root = make_bundle(tmp_path / "m", dict.fromkeys(evidence, WEIGHTS), evidence=evidence)
    manifest = Bundle.open(root).manifest
    changed = dataclasses.replace(manifest, skipped={"ort-cpu-fp32": "no fusion"})
    (root / "tdeploy/manifest.json").write_text(to_json(changed))
    tags, _ = describe(Bundle.open(root))
    states = {key.removeprefix("tdeploy.variant."): tags[key] for key in tags if key.startswith("tdeploy.variant.")}
    assert states == {
        "onnx-fp32": "ok", "ort-cpu-int8": "over budget", "onnx-fp16": "failed", "ort-cpu-fp32": "not made"
    }  # fmt: skip


def test_tag_logged_model_takes_more_metrics_than_one_batch_holds(tracking, model):
    info = log(model)
    tag_logged_model(info.model_id, {"empty": ""}, {f"v.m{n}": float(n) for n in range(1900)})
    found = MlflowClient().get_logged_model(info.model_id)
    assert {metric.key for metric in found.metrics} >= {"v.m0", "v.m1899"}
    assert "empty" not in found.tags


def test_tag_logged_model_keeps_what_a_newer_host_said_of_a_variant_that_cannot_be_read_here(tracking, model):
    info = log(model)
    root = Path(locate(info.model_uri).local)
    newer = {"tdeploy.variant.trt-int4": "ok", "tdeploy.variants": "trt-int4", "tdeploy.precisions": "int4"}
    MlflowClient().set_logged_model_tags(info.model_id, {**newer, "tdeploy.variant.bad": "over budget"})
    (root / "tdeploy" / "variants" / "trt-int4.json").write_text('{"schema_version": 2}')
    tag_logged_model(info.model_id, *describe(Bundle.open(root)))
    tags = mlflow.get_logged_model(info.model_id).tags
    assert tags["tdeploy.variants"] == "onnx-fp32,ort-cpu-fp32,trt-int4"
    assert tags["tdeploy.precisions"] == "fp32,int4"
    assert tags["tdeploy.variant.trt-int4"] == "ok"


def test_describe_gives_the_newest_latency_of_a_variant(tmp_path):
    def latency(milliseconds, created):
        return Evidence("onnx-fp32", "latency", {"p50_ms": milliseconds}, created=created)

    records = [latency(9.0, "2026-01-02"), latency(5.0, "2026-01-03"), latency(7.0, "2026-01-01")]
    root = make_bundle(tmp_path / "m", {"onnx-fp32": WEIGHTS}, evidence={"onnx-fp32": records})
    assert describe(Bundle.open(root))[1]["onnx-fp32.p50_ms"] == 5.0
