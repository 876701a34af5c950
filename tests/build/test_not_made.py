"""What becomes of variants that cannot be made or opened."""

from __future__ import annotations

import re
from typing import ClassVar

import onnx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mlflow_tdeploy
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.core.errors import BuildError, NoVariantError, SessionError
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.bundle import Bundle
from tests.build.building import ALL, Perturbed, Unopenable, build
from tests.build.sources import EXAMPLE, Mlp, mlp_source
from tests.bundles import linear_graph


def test_build_bundle_goes_on_when_a_variant_that_nobody_named_cannot_be_made(tmp_path, register):
    class Fails(Perturbed):
        id: ClassVar[str] = "onnx-fails"

        def run(self, context):
            raise BuildError("no such luck")

    register(Fails)
    report, bundle = build(mlp_source(), tmp_path / "a")
    assert "onnx-fails" not in bundle.variants
    assert report.skipped == bundle.not_made == {"onnx-fails": "no such luck"}
    assert "no such luck" in report.table()
    with open_model(tmp_path / "a") as model:  # whoever looks at the model later is told, too
        assert re.search(r"onnx-fails +- +unsupported .*could not be made: no such luck", model.decision.explain())
    with pytest.raises(NoVariantError, match="onnx-fails.*no such luck"):
        open_model(tmp_path / "a", policy=Policy(variant="onnx-fails"))
    with pytest.raises(BuildError, match="no such luck"):
        build(mlp_source(), tmp_path / "b", BuildOptions(measure=False, precisions=("onnx-fails",)))


def test_build_bundle_skips_a_variant_that_cannot_be_opened_and_does_not_call_it_over_budget(tmp_path, register):
    register(Unopenable)
    report, bundle = build(mlp_source(), tmp_path / "a")
    assert set(bundle.variants) == ALL - {"hf"}
    why = report.skipped["onnx-unopenable"]
    assert "cannot be opened" in why
    assert "NoSuchOperator" in why
    assert str(tmp_path) not in why  # it ends up in records
    assert "over budget" not in report.table()
    with pytest.raises(BuildError, match="cannot be opened"):
        build(mlp_source(), tmp_path / "b", BuildOptions(measure=False, precisions=("onnx-unopenable",)))


def test_build_bundle_skips_a_recipe_whose_candidate_no_runtime_opens(tmp_path, register):
    class Opens(Unopenable):
        id: ClassVar[str] = "onnx-opens"

        def run(self, context):
            graph = super().run(context)
            raise SessionError(context.trial(graph) or "it opens")

    register(Opens)
    report, bundle = build(mlp_source(), tmp_path / "model")
    assert set(bundle.variants) == ALL - {"hf"}
    assert "NoSuchOperator" in report.skipped["onnx-opens"]


def test_build_bundle_tells_progress_of_steps_that_fail(tmp_path, register):
    class Fails(Perturbed):
        id: ClassVar[str] = "onnx-fails"

        def run(self, context):
            raise RuntimeError("no such luck")

    class Follows(Perturbed):
        id: ClassVar[str] = "onnx-follows"
        parent: ClassVar[str | None] = "onnx-fails"

    register(Fails)
    register(Follows)
    steps = []
    report, _ = build(mlp_source(), tmp_path / "model", progress=steps.append)
    details = {step.name: step.detail for step in steps}
    assert details["make onnx-fails"].startswith("failed: ")
    assert "no such luck" in details["make onnx-fails"]
    assert "'onnx-fails', which it is made from, is not usable" in details["make onnx-follows"]
    assert set(report.skipped) == {"onnx-fails", "onnx-follows"}
    assert tuple(steps) == report.steps


def test_save_model_warns_of_a_variant_that_could_not_be_made(tmp_path, register, caplog):
    register(Unopenable)
    mlflow_tdeploy.save_model(Mlp().eval(), tmp_path / "model", example=EXAMPLE, precisions=None)
    (warning,) = [record for record in caplog.records if record.name == "mlflow_tdeploy"]
    assert warning.levelname == "WARNING"
    assert "without variant 'onnx-unopenable'" in warning.getMessage()
    assert "NoSuchOperator" in warning.getMessage()


def test_build_bundle_goes_on_without_a_ready_made_graph_that_cannot_be_opened(tmp_path):
    linear_graph(tmp_path / "full.onnx")
    model = onnx.load(tmp_path / "full.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "odd.onnx")
    graphs = {"onnx-fp32": tmp_path / "full.onnx", "odd": tmp_path / "odd.onnx"}
    report, bundle = build(resolve(graphs), tmp_path / "model")
    assert set(bundle.variants) == {"onnx-fp32"}
    assert "cannot be opened" in report.skipped["odd"]


@pytest.mark.parametrize("classes", [pytest.param(3, marks=pytest.mark.slow), 200])
def test_an_original_that_cannot_be_had_back_is_not_kept_and_nothing_is_held_against_it(
    tiny_bert, tmp_path, caplog, classes
):
    """A replaced head is not in the config: whoever loads the folder gets a random one, without an error."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=classes, ignore_mismatched_sizes=True
    )
    width = model.classifier.in_features
    model.classifier = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Tanh(), torch.nn.Linear(8, classes))
    for parameter in model.classifier.parameters():
        torch.nn.init.normal_(parameter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    shapes = {"batch": (1, 2, 4), "sequence": (3, 16, 32)}
    mlflow_tdeploy.save_model(
        model, tmp_path / "out", tokenizer=tokenizer, task="text-classification", precisions=["fp32"], shapes=shapes
    )
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest.reference == "onnx-fp32"
    assert "hf" not in bundle.variants
    assert "another model when it is loaded: 'logits' is off by" in bundle.manifest.skipped["hf"]
    assert not (bundle.root / "source").exists()
    assert "logged without variant 'hf'" in caplog.text
    found = mlflow_tdeploy.verify_model(tmp_path / "out")
    assert found["ort-cpu-fp32"].passed
    with mlflow_tdeploy.load_model(tmp_path / "out") as opened:
        assert len(opened.predict(["a good film"])) == 1
