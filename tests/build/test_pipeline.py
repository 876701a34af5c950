from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import mlflow_tdeploy
import mlflow_tdeploy.build.recipes as recipes_package
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.pipeline import build_bundle
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import BudgetError, BuildError, InvalidInputError, SessionError
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.runtime.base import RUNTIMES, SessionOptions
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.select import Policy
from mlflow_tdeploy.source.resolve import resolve
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.writer import BundleDraft, staged_directory
from tests.build.sources import EXAMPLE, Mlp, mlp_source
from tests.bundles import WEIGHTS, linear_graph

ALL = {"hf", "onnx-fp32", "onnx-fp16", "ort-cpu-fp32", "ort-cpu-int8"}
QUICK = BuildOptions(measure=False)
FP32 = BuildOptions(measure=False, precisions=("onnx-fp32",))


def build(source, target: Path, options=QUICK, progress=None):
    with staged_directory(target) as folder:
        report = build_bundle(source, BundleDraft(folder / "tdeploy"), options, progress)
    return report, Bundle.open(target)


def accuracy(bundle: Bundle, variant_id: str):
    return latest_accuracy(bundle.evidence(variant_id))


class Perturbed(Recipe):
    """The portable graph with other weights: what a broken step would give."""

    id: ClassVar[str] = "onnx-broken"
    precision: ClassVar[str] = "broken"
    parent: ClassVar[str | None] = "onnx-fp32"
    format: ClassVar = "onnx"
    device: ClassVar[str] = "any"
    factor: ClassVar[float] = -1.0

    def run(self, context):
        model = onnx.load(context.base().path)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                weights = np.roll(numpy_helper.to_array(tensor), 1, axis=0) * self.factor
                tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
        context.output().parent.mkdir(parents=True)
        onnx.save(model, context.output())
        return Graph(context.output(), Precision(recipe=self.id))


class NotANumber(Perturbed):
    id: ClassVar[str] = "onnx-nan"
    factor: ClassVar[float] = float("nan")


@pytest.fixture
def register():
    added = []

    def add(recipe):
        RECIPES.names()  # load the real ones first
        RECIPES.register(recipe.id)(recipe)
        added.append(recipe.id)

    yield add
    for name in added:
        RECIPES.unregister(name)


# one whole build of a text model


def test_build_bundle_makes_every_variant_with_evidence(tiny_build):
    target, report = tiny_build
    bundle = Bundle.open(target)
    assert set(bundle.variants) == {variant.id for variant in report.variants} == ALL
    for variant_id in ALL - {"hf"}:
        evidence = accuracy(bundle, variant_id)
        assert evidence.shapes[0] == "batch=1,sequence=3"  # no text has fewer tokens
        assert "batch=8,sequence=64" in evidence.shapes
        assert evidence.data.count == 210
        assert evidence.passed is not bundle.variants[variant_id].dropped
    assert bundle.manifest.reference == "hf"


def test_build_bundle_compares_the_task_metric_when_labels_are_given(tiny_build):
    bundle = Bundle.open(tiny_build[0])
    metrics = accuracy(bundle, "onnx-fp32").metrics
    assert 0 < metrics["accuracy"] < 1
    assert metrics["accuracy_drop"] == pytest.approx(metrics["reference_accuracy"] - metrics["accuracy"])


def test_build_bundle_writes_whole_files_and_nothing_of_the_way(tiny_build):
    target, _ = tiny_build
    bundle = Bundle.open(target)
    for variant in bundle.variants.values():
        bundle.verify(variant)
    bundle.verify_assets()
    assert not [path for path in target.rglob("*") if path.name.startswith(".tdeploy")]
    assert {path.name for path in (bundle.root / "files").iterdir()} == {
        variant.id for variant in bundle.variants.values() if not variant.dropped and variant.id != "hf"
    }


def test_build_bundle_makes_a_portable_graph_that_old_runtimes_read(tiny_build):
    variant = Bundle.open(tiny_build[0]).variants["onnx-fp32"]
    assert int(variant.requires["opset"]) <= 18
    assert int(variant.requires["ir_version"]) <= 10
    assert variant.format == "onnx"


def test_build_bundle_answers_as_transformers_does(tiny_build, tiny_bert):
    from transformers import pipeline

    texts = ["a dog", "an extremely long journey through the mountains"]
    expected = pipeline("text-classification", str(tiny_bert))(texts)
    bundle = Bundle.open(tiny_build[0])
    for variant_id in ("onnx-fp32", "ort-cpu-fp32", "hf"):
        with open_model(tiny_build[0], policy=Policy(variant=variant_id)) as model:
            for got, wanted in zip(model.predict(texts), expected, strict=True):
                assert got["label"] == wanted["label"]
                assert got["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert bundle.golden()[0].answer[0]["score"] > 0


def test_build_bundle_fuses_without_changing_answers(tiny_build):
    bundle = Bundle.open(tiny_build[0])
    assert accuracy(bundle, "ort-cpu-fp32").metrics["max_difference"] < 1e-4
    operators = {node.op_type for node in onnx.load(bundle.path(bundle.variants["ort-cpu-fp32"].entry)).graph.node}
    assert operators & {"Attention", "MultiHeadAttention"}
    assert bundle.variants["ort-cpu-fp32"].built_for.kind == accuracy(bundle, "ort-cpu-fp32").host.kind


def test_build_bundle_measures_latency_of_every_kept_variant_at_the_opt_shape(tiny_build):
    bundle = Bundle.open(tiny_build[0])
    for variant in bundle.variants.values():
        records = [record for record in bundle.evidence(variant.id) if record.kind == "latency"]
        assert len(records) == (0 if variant.dropped else 1)
        for record in records:
            assert record.metrics["p50_ms"] > 0
            assert record.metrics["short_p50_ms"] > 0
            assert "p50_ms: batch=4,sequence=16" in record.shapes
            assert record.host.kind
            assert record.settings["runtime"] == ("torch" if variant.id == "hf" else "ort-cpu")


def test_build_bundle_keeps_golden_requests_of_the_source(tiny_build):
    bundle = Bundle.open(tiny_build[0])
    requests = bundle.golden()
    manifest = bundle.manifest
    assert 3 <= len(requests) <= 8
    assert max(len(request.inputs) for request in requests) > 1
    session = RUNTIMES.get("torch")().open(bundle.root, bundle.variants["hf"], manifest.signature, SessionOptions())
    for request in requests:
        np.testing.assert_allclose(session.infer(request.feeds)["logits"], request.outputs["logits"], atol=1e-5)
    task = TASKS.get(manifest.task)(manifest.task_config, manifest.signature, bundle.root / "assets")
    feeds = task.encode(task.items(requests[-1].inputs)).collate(range(len(requests[-1].inputs)))
    np.testing.assert_array_equal(feeds["input_ids"], requests[-1].feeds["input_ids"])


def test_build_report_names_steps_variants_and_seconds(tiny_build):
    table = tiny_build[1].table()
    for text in ("make onnx-fp32", "check ort-cpu-int8", "latency", "the reference", "within budget", "in all"):
        assert text in table


# small modules: budgets, failures, choices


def test_build_bundle_of_a_module_takes_the_portable_graph_as_reference(tmp_path):
    report, bundle = build(mlp_source(), tmp_path / "model")
    assert set(bundle.variants) == ALL - {"hf"}
    assert bundle.manifest.reference == "onnx-fp32"
    assert accuracy(bundle, "onnx-fp32").metrics["max_difference"] < 1e-5
    assert accuracy(bundle, "onnx-fp32").settings["reference"] == "source"
    with open_model(tmp_path / "model") as model:
        x = np.ones((3, 4), np.float32)
        got = model.infer({"x": x})
    import torch

    np.testing.assert_allclose(got["y"], Mlp().eval()(torch.from_numpy(x))["y"].detach().numpy(), atol=0.05)
    assert report.seconds > 0


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
    options = BuildOptions(measure=False, budget=Budget.of("worst_cosine >= 2"))  # no graph keeps it
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


def test_build_bundle_goes_on_when_a_variant_that_nobody_named_cannot_be_made(tmp_path, register):
    class Fails(Perturbed):
        id: ClassVar[str] = "onnx-fails"

        def run(self, context):
            raise BuildError("no such luck")

    register(Fails)
    report, bundle = build(mlp_source(), tmp_path / "a")
    assert "onnx-fails" not in bundle.variants
    assert report.skipped == {"onnx-fails": "no such luck"}
    assert "no such luck" in report.table()
    with pytest.raises(BuildError, match="no such luck"):
        build(mlp_source(), tmp_path / "b", BuildOptions(measure=False, precisions=("onnx-fails",)))


class Unopenable(Perturbed):
    """The portable graph with an operator that no runtime has."""

    id: ClassVar[str] = "onnx-unopenable"

    def run(self, context):
        graph = super().run(context)
        model = onnx.load(graph.path)
        model.graph.node[0].op_type = "NoSuchOperator"
        onnx.save(model, graph.path)
        return graph


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


def test_build_bundle_of_gpt2_leaves_out_the_fusion_that_its_graph_cannot_be_opened_with(tmp_path, minilm_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=30522, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    source = resolve(
        GPT2Model(config).eval(),
        tokenizer=AutoTokenizer.from_pretrained(minilm_path),
        shapes={"batch": (1, 2, 2), "sequence": (1, 8, 16)},
    )
    options = BuildOptions(seconds=0.3, precisions=("ort-cpu-fp32",), data=VerifyData.of(["one", "two words"]))
    _, bundle = build(source, tmp_path / "model", options)
    source.close()
    settings = bundle.variants["ort-cpu-fp32"].precision.settings
    assert "attention" in settings["cannot_be_opened_with"]
    assert "attention" in settings["left_out"]
    assert accuracy(bundle, "ort-cpu-fp32").passed


def test_build_bundle_gives_equal_data_equal_digests(tmp_path):
    requests = [{"x": np.ones((2, 4), np.float32)}]
    digests = {
        accuracy(
            build(
                mlp_source(),
                tmp_path / name,
                BuildOptions(measure=False, precisions=("onnx-fp32",), data=VerifyData.of(requests, name=name)),
            )[1],
            "onnx-fp32",
        ).data.sha256
        for name in ("a", "b")
    }
    assert len(digests) == 1


def test_build_bundle_tells_progress_of_every_step(tmp_path):
    steps = []
    report, _ = build(mlp_source(), tmp_path / "model", FP32, steps.append)
    assert tuple(steps) == report.steps
    assert all(step.seconds >= 0 for step in steps)


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


def test_build_options_refuse_what_is_unknown():
    for wrong in ({"on_budget": "warn"}, {"exporter": "magic"}, {"opset": "18"}, {"opset": 3}):
        with pytest.raises(InvalidInputError):
            BuildOptions(**wrong)


class Outlier(torch.nn.Module):
    """One input channel is thousands of times larger than the others, which carry the answer: int8 rounds them off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 64)
        self.last = torch.nn.Linear(64, 3, bias=False)
        with torch.no_grad():
            self.first.bias[0] += 2e4
            self.last.weight[:, 0] = 0

    def forward(self, x):
        return {"y": self.last(self.first(x))}


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


# ready-made graphs


def test_build_bundle_takes_ready_made_variants_as_they_are(tmp_path):
    linear_graph(tmp_path / "in" / "full.onnx")
    linear_graph(tmp_path / "in" / "half.onnx", WEIGHTS.astype(np.float16))
    graphs = {"onnx-fp32": tmp_path / "in" / "full.onnx", "my-half": tmp_path / "in" / "half.onnx"}
    _, bundle = build(resolve(graphs), tmp_path / "model")
    assert set(bundle.variants) == {"onnx-fp32", "my-half"}
    half = bundle.variants["my-half"]
    assert (half.precision.name, dict(half.dtypes)) == ("fp16", {"x": "float16", "y": "float16"})
    assert bundle.path(half.entry).read_bytes() == graphs["my-half"].read_bytes()
    assert not os.path.samefile(bundle.path(half.entry), graphs["my-half"])  # a later change of theirs is not ours
    assert accuracy(bundle, "my-half").passed


def test_build_bundle_goes_on_without_a_ready_made_graph_that_cannot_be_opened(tmp_path):
    linear_graph(tmp_path / "full.onnx")
    model = onnx.load(tmp_path / "full.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "odd.onnx")
    graphs = {"onnx-fp32": tmp_path / "full.onnx", "odd": tmp_path / "odd.onnx"}
    report, bundle = build(resolve(graphs), tmp_path / "model")
    assert set(bundle.variants) == {"onnx-fp32"}
    assert "cannot be opened" in report.skipped["odd"]


def test_build_bundle_makes_variants_of_a_single_graph(tmp_path):
    linear_graph(tmp_path / "model.onnx")
    _, bundle = build(resolve(tmp_path / "model.onnx"), tmp_path / "model")
    assert set(bundle.variants) == ALL - {"hf"}
    assert bundle.manifest.reference == "onnx-fp32"


# extension, crash


def test_adding_a_recipe_is_adding_one_file(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "onnx_copy.py").write_text(
        "import shutil\n"
        "from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe\n"
        "from mlflow_tdeploy.core.precision import Precision\n"
        "@RECIPES.register('onnx-copy')\n"
        "class OnnxCopy(Recipe):\n"
        "    id, precision, parent, format, device = 'onnx-copy', 'copy', 'onnx-fp32', 'onnx', 'any'\n"
        "    def run(self, context):\n"
        "        shutil.copytree(context.base().path.parent, context.output().parent)\n"
        "        return Graph(context.output(), Precision(recipe=self.id))\n"
    )
    monkeypatch.setattr(recipes_package, "__path__", [*recipes_package.__path__, str(folder)])
    RECIPES.names()
    monkeypatch.setattr(RECIPES, "_discover", recipes_package.__name__)
    try:
        _, bundle = build(mlp_source(), tmp_path / "model", BuildOptions(measure=False, precisions=("copy",)))
    finally:
        RECIPES.unregister("onnx-copy")
        sys.modules.pop(f"{recipes_package.__name__}.onnx_copy", None)
    assert set(bundle.variants) == {"onnx-fp32", "onnx-copy"}
    assert bundle.variants["onnx-copy"].parent == "onnx-fp32"


_CRASH = """
import sys
from pathlib import Path
from tests.build.sources import mlp_source
from tests.build.test_pipeline import build
build(mlp_source(), Path(sys.argv[1]), progress=lambda step: print(step.name, flush=True))
"""


def test_build_bundle_leaves_nothing_at_the_target_when_it_is_killed(tmp_path):
    target = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-c", _CRASH, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("check onnx-fp32"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait(30)
    assert not target.exists()
    assert all(path.name.startswith(".tdeploy-") for path in tmp_path.iterdir())


# the real model


@pytest.mark.slow
def test_build_bundle_of_minilm_refuses_int8_by_the_default_budget(minilm_bundle):
    bundle = Bundle.open(minilm_bundle)
    assert set(bundle.variants) == ALL
    for variant_id in ("onnx-fp32", "onnx-fp16", "ort-cpu-fp32"):
        assert accuracy(bundle, variant_id).passed
    int8 = accuracy(bundle, "ort-cpu-int8")
    assert 0.97 < int8.metrics["worst_cosine"] < 0.99
    assert bundle.variants["ort-cpu-int8"].dropped
    assert int8.data.count >= 200
    assert "batch=64,sequence=256" in int8.shapes


@pytest.mark.slow
def test_build_bundle_of_minilm_leaves_out_the_layer_norm_fusion_that_slows_the_cpu(minilm_bundle):
    variant = Bundle.open(minilm_bundle).variants["ort-cpu-fp32"]
    assert "SkipLayerNormFusion" in variant.session["disabled_optimizers"]
    assert variant.precision.settings["fused"]["attention"] == 6
