"""What becomes of variants over budget."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.build.engine_options import EngineOptions
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.pipeline import build_bundle
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget, Limit
from mlflow_tdeploy.core.errors import BudgetError, InvalidInputError
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.writer import BundleDraft
from tests.build.building import NotANumber, Outlier, Perturbed, accuracy, build
from tests.build.sources import mlp_source
from tests.served import pipeline_of


def test_build_bundle_drops_the_files_of_a_variant_over_budget(tmp_path, register):
    register(Perturbed)
    _, bundle = build(mlp_source(), tmp_path / "model", BuildOptions(measure=False, precisions=("fp32", "broken")))
    variant = bundle.variants["onnx-broken"]
    assert variant.dropped
    assert not (bundle.root / "files" / "onnx-broken").exists()
    evidence = accuracy(bundle, "onnx-broken")
    assert evidence.passed is False
    assert "worst_cosine" in evidence.violations[0]
    with open_model(tmp_path / "model") as model:
        refused = next(c for c in model.decision.candidates if c.variant == "onnx-broken")
    assert "over budget" in refused.reason


def test_build_bundle_fails_and_leaves_nothing_when_over_budget_shall_raise(tmp_path, register):
    register(Perturbed)
    options = BuildOptions(measure=False, precisions=("broken",), on_budget="raise")
    with pytest.raises(BudgetError, match=r"'onnx-broken' is over.*worst_cosine is .*budget worst_cosine >= 0.99"):
        build(mlp_source(), tmp_path / "model", options)
    assert list(tmp_path.iterdir()) == []


def test_build_bundle_records_a_graph_that_gives_nan_as_failed(tmp_path, register):
    register(NotANumber)
    _, bundle = build(mlp_source(), tmp_path / "model", BuildOptions(measure=False, precisions=("onnx-nan",)))
    evidence = accuracy(bundle, "onnx-nan")
    assert evidence.passed is False
    assert evidence.metrics["non_finite"] > 0
    assert bundle.variants["onnx-nan"].dropped


def test_build_bundle_fails_when_the_portable_graph_is_over_budget_and_nothing_else_serves(tmp_path):
    options = BuildOptions(measure=False, budget=Budget((Limit("worst_cosine", ">=", 2.0),)))  # no graph keeps it
    with pytest.raises(BudgetError, match=r"'onnx-fp32'.*worst_cosine is"):
        build(mlp_source(), tmp_path / "model", options)


@pytest.mark.parametrize("budget", ["accuracy >= 0.9", "f1_drop <= 0.1"])
def test_build_bundle_refuses_a_budget_before_any_step_when_nothing_measures_it(tmp_path, budget):
    steps = []
    options = BuildOptions(measure=False, budget=Budget.of(budget))
    draft = BundleDraft(tmp_path / "model" / "tdeploy")
    with pytest.raises(InvalidInputError, match="which task 'tensors' does not measure"):
        build_bundle(mlp_source(), draft, options, steps.append)
    assert steps == []


def test_build_bundle_serves_the_source_when_the_portable_graph_is_over_budget(tmp_path, tiny_bert):
    source = resolve(tiny_bert, shapes={"batch": (1, 2, 4), "sequence": (1, 8, 16)})
    options = BuildOptions(
        measure=False, budget=Budget.of("max_difference <= 1e-12"), data=VerifyData.of(["one", "two words"])
    )
    report, bundle = build(source, tmp_path / "model", options)
    assert bundle.variants["onnx-fp32"].dropped
    assert set(report.skipped) == {"onnx-fp16", "ort-cpu-fp32", "ort-cpu-int8"}
    with open_model(tmp_path / "model") as model:
        assert model.decision.chosen.variant == "hf"


def test_build_bundle_refuses_int8_by_the_default_budget_when_activations_have_outliers(tmp_path):
    options = BuildOptions(measure=False, precisions=("fp32", "int8"))
    _, bundle = build(mlp_source(Outlier().eval()), tmp_path / "model", options)
    int8 = accuracy(bundle, "ort-cpu-int8")
    assert int8.passed is False
    assert int8.metrics["worst_cosine"] < 0.99
    assert bundle.variants["ort-cpu-int8"].dropped
    assert accuracy(bundle, "ort-cpu-fp32").passed
    with open_model(tmp_path / "model") as model:
        assert model.decision.chosen.variant == "ort-cpu-fp32"


def test_a_variant_that_was_named_is_left_out_with_its_parent_that_is_over_budget(tmp_path, tiny_bert):
    source = resolve(tiny_bert, shapes={"batch": (1, 2, 4), "sequence": (1, 8, 16)})
    options = BuildOptions(
        measure=False, budget=Budget.of("max_difference <= 1e-12"), data=VerifyData.of(["one", "two words"]),
        precisions=("fp32",),
    )  # fmt: skip
    report, bundle = build(source, tmp_path / "model", options)
    assert bundle.variants["onnx-fp32"].dropped
    assert report.skipped == {"ort-cpu-fp32": "'onnx-fp32', which it is made from, is over budget"}


def test_an_engine_is_left_out_with_its_parent_that_is_over_budget(tmp_path, tiny_bert):
    pytest.importorskip("tensorrt_rtx")
    source = resolve(tiny_bert, shapes={"batch": (1, 2, 4), "sequence": (1, 8, 16)})
    engine = EngineOptions(module="tensorrt_rtx", precision="fp32", id="trt-small")
    budget = Budget.of("max_difference <= 1e-12")
    options = BuildOptions(measure=False, budget=budget, data=VerifyData.of(["one"]), precisions=(), engines=(engine,))
    report, _ = build(source, tmp_path / "model", options)
    assert report.skipped == {"trt-small": "'onnx-fp32', which it is made from, is over budget"}


def test_a_budget_that_the_original_itself_misses_is_refused_and_blames_no_variant(tmp_path, tiny_bert):
    source = resolve(tiny_bert, shapes={"batch": (1, 2, 4), "sequence": (1, 8, 16)})
    texts = ["one", "two words"]
    right = [source.task_config["labels"].index(answer["label"]) for answer in pipeline_of(source, tmp_path)(texts)]
    data = VerifyData.of({"text": texts, "label": [right[0], 1 - min(right[1], 1)]})
    options = BuildOptions(measure=False, budget=Budget.of("accuracy >= 0.9"), data=data)
    with pytest.raises(InvalidInputError, match=r"wants accuracy >= 0.9, and the original itself reaches 0.5"):
        build(source, tmp_path / "model", options)
