from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mlflow_tdeploy.build.extend import build_variant
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.parents import other_answer
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import (
    BudgetError,
    BuildError,
    ConflictError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
)
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.runtime.backends.torch_reference import TorchReference
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.writer import append_variant
from tests.build.building import build
from tests.build.sources import mlp_source
from tests.bundles import WEIGHTS, make_bundle

QUICK = BuildOptions(measure=False)


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A module's bundle with the portable graph only."""
    target = tmp_path_factory.mktemp("extend") / "model"
    build(mlp_source(), target, BuildOptions(measure=False, precisions=("onnx-fp32",)))
    return target


@pytest.fixture
def bundle(logged, tmp_path) -> Bundle:
    shutil.copytree(logged, tmp_path / "model")
    return Bundle.open(tmp_path / "model")


def test_build_variant_makes_a_recipe(bundle, tmp_path):
    (tmp_path / "work").mkdir()
    before = sorted(bundle.root.rglob("*"))
    built = build_variant(bundle, "ort-cpu-int8", tmp_path / "work", BuildOptions(seconds=0.2))
    assert sorted(bundle.root.rglob("*")) == before  # only read
    assert built.variant.parent == "onnx-fp32"
    accuracy, latency = built.evidence
    assert accuracy.settings["reference"] == "onnx-fp32"  # the source is not at hand, and the evidence says so
    assert latency.kind == "latency"
    append_variant(bundle.root, built.variant, built.staged, built.evidence)
    with open_model(tmp_path / "model", policy=Policy(variant="ort-cpu-int8")) as model:
        assert model.infer({"x": np.ones((1, 4), np.float32)})["y"].shape == (1, 3)


def test_build_variant_compares_with_the_source_when_it_is_there(tiny_bundle, tmp_path):
    bundle = Bundle.open(tiny_bundle)
    graph = bundle.path(bundle.variants["ort-cpu-fp32"].entry)
    built = build_variant(bundle, graph, tmp_path, QUICK, variant_id="mine")
    assert built.evidence[0].settings["reference"] == "hf"
    assert built.evidence[0].passed
    assert built.variant.format == "ort"  # it has operators of ONNX Runtime's own
    assert built.staged is not None
    assert (built.staged / built.variant.entry).is_file()


def _broken(bundle: Bundle, path: Path) -> Path:
    model = onnx.load(bundle.path(bundle.variants["onnx-fp32"].entry))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(-2 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, path)
    return path


def test_build_variant_keeps_no_files_when_the_graph_is_over_budget(bundle, tmp_path):
    path = _broken(bundle, tmp_path / "broken.onnx")
    (tmp_path / "a").mkdir()
    built = build_variant(bundle, path, tmp_path / "a", QUICK, variant_id="mine")
    assert built.staged is None
    assert built.variant.dropped
    assert not built.evidence[0].passed
    (tmp_path / "b").mkdir()
    with pytest.raises(BudgetError, match="'mine' is over"):
        build_variant(bundle, path, tmp_path / "b", BuildOptions(on_budget="raise", measure=False), variant_id="mine")


def test_build_variant_holds_the_budget_that_is_given(bundle, tmp_path):
    path = bundle.path(bundle.variants["onnx-fp32"].entry)
    options = BuildOptions(measure=False, budget=Budget.of("max_difference <= -1"))
    (tmp_path / "work").mkdir()
    built = build_variant(bundle, path, tmp_path / "work", options, variant_id="mine")
    assert not built.evidence[0].passed
    assert "max_difference <= -1" in built.evidence[0].settings["budget"]


def test_build_variant_refuses_a_budget_that_is_wider_than_the_models(bundle, tmp_path):
    wider = BuildOptions(measure=False, budget=Budget.of("worst_cosine >= 0.5"))
    path = bundle.path(bundle.variants["onnx-fp32"].entry)
    with pytest.raises(InvalidInputError, match="fixed when it is logged"):
        build_variant(bundle, path, tmp_path, wider, variant_id="mine")


def test_build_variant_ties_evidence_to_the_files_that_were_measured(bundle, tmp_path):
    (tmp_path / "a").mkdir()
    built = build_variant(bundle, "onnx-fp16", tmp_path / "a", BuildOptions(seconds=0.2))
    assert {record.kind: record.files for record in built.evidence} == {
        "accuracy": built.variant.digest,
        "latency": built.variant.digest,
    }
    (tmp_path / "b").mkdir()
    path = _broken(bundle, tmp_path / "broken.onnx")
    failed = build_variant(bundle, path, tmp_path / "b", QUICK, variant_id="mine")
    assert failed.evidence[0].files  # of the files that failed, though they are not kept
    assert failed.evidence[0].about(failed.variant)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("graph", InvalidInputError, "got '.*graph'"), ("no.onnx", NotFoundError, "no file '.*no.onnx'")],
)
def test_build_variant_says_what_is_wrong_with_the_path_of_a_graph(bundle, tmp_path, name, error, message):
    for form in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(error, match=message):
            build_variant(bundle, form, tmp_path, QUICK, variant_id="mine")


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_build_variant_refuses_to_compare_with_anything_else_when_the_original_is_damaged(
    tiny_bundle, tmp_path, damage
):
    """Evidence against another variant would be called evidence against the original."""
    shutil.copytree(tiny_bundle, tmp_path / "model")
    bundle, path = Bundle.open(tmp_path / "model"), tmp_path / "model/tdeploy/source/model.safetensors"
    if damage == "gone":
        shutil.rmtree(path.parent)
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    (tmp_path / "work").mkdir()
    with pytest.raises(IntegrityError, match="source/"):
        build_variant(bundle, bundle.path(bundle.variants["onnx-fp32"].entry), tmp_path / "work", QUICK, variant_id="x")


def test_build_variant_says_what_it_compares_with_where_the_original_cannot_be_opened(
    tiny_bundle, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(TorchReference, "missing", lambda self: "torch is not installed")
    bundle = Bundle.open(tiny_bundle)
    (tmp_path / "work").mkdir()
    graph = bundle.path(bundle.variants["onnx-fp32"].entry)
    built = build_variant(bundle, graph, tmp_path / "work", QUICK, variant_id="mine")
    assert built.evidence[0].settings["reference"] == "onnx-fp32"
    assert "compared with 'onnx-fp32', not with the original" in caplog.text
    assert "torch is not installed" in caplog.text


def test_build_variant_refuses_an_id_that_exists(bundle, tmp_path):
    with pytest.raises(ConflictError, match="'onnx-fp32' already"):
        build_variant(bundle, "onnx-fp32", tmp_path)


def test_build_variant_lists_recipes_when_the_name_is_unknown(bundle, tmp_path):
    with pytest.raises(InvalidInputError, match=r"'int3'.*ort-cpu-int8"):
        build_variant(bundle, "int3", tmp_path)


def test_build_variant_refuses_a_graph_with_other_tensors(bundle, tmp_path):
    from tests.bundles import linear_graph

    linear_graph(tmp_path / "other.onnx")
    model = onnx.load(tmp_path / "other.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    onnx.save(model, tmp_path / "other.onnx")
    (tmp_path / "w").mkdir()
    with pytest.raises(InvalidInputError, match="has no tensor 'x'"):
        build_variant(bundle, tmp_path / "other.onnx", tmp_path / "w", QUICK, variant_id="mine")


def test_build_variant_fetches_the_parent_when_it_is_not_here(bundle, logged, tmp_path):
    variant = bundle.variants["onnx-fp32"]
    shutil.rmtree(bundle.root / "files")
    (tmp_path / "a").mkdir()
    with pytest.raises(IntegrityError, match=r"files/onnx-fp32/model\.onnx"):
        build_variant(bundle, "onnx-fp16", tmp_path / "a", QUICK)
    fetched = []

    def fetch(wanted):
        fetched.append(wanted.id)
        shutil.copytree(logged / "tdeploy" / "files" / wanted.id, bundle.root / "files" / wanted.id)

    (tmp_path / "b").mkdir()
    built = build_variant(bundle, "onnx-fp16", tmp_path / "b", QUICK, fetch=fetch)
    assert built.evidence[0].passed
    assert fetched == [variant.id]


def test_build_variant_holds_nothing_against_a_reference_that_answers_otherwise_than_where_it_was_logged(tmp_path):
    """Whatever the reason (another library, a folder that loads as another model): its verdicts would stay."""
    root = make_bundle(tmp_path / "made", {"onnx-fp32": WEIGHTS})
    bundle = Bundle.open(root)
    request = bundle.golden()[0]
    wrong = dataclasses.replace(request, outputs={"y": -request.outputs["y"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundle, "golden", lambda self, cache=None: (request, wrong))  # the second one is asked, too
        with pytest.raises(BuildError, match="reference 'onnx-fp32' answers a golden request otherwise here"):
            build_variant(bundle, "ort-cpu-fp32", tmp_path / "work")


def test_a_variant_cannot_take_the_originals_id(bundle, tmp_path):
    (tmp_path / "work").mkdir()
    graph = bundle.path(bundle.variants["onnx-fp32"].entry)
    with pytest.raises(InvalidInputError, match="'hf' is that of an original model"):
        build_variant(bundle, graph, tmp_path / "work", QUICK, variant_id="hf")


RANDOM = np.random.default_rng(0)
HIDDEN = RANDOM.standard_normal((4, 768))


@pytest.mark.parametrize(
    ("right", "got", "other"),
    [
        ([[250000.0], [310000.0]], [[250000.1], [309999.9]], None),
        ([[250000.0], [310000.0]], [[1.0], [-7.0]], "is off by 3.1e+05"),
        ([[250000.0], [310000.0]], [[np.nan], [np.nan]], "is off by nan"),
        ([[6000.0, 1.0]], [[-1.0, 1.0]], "is off by 6e+03"),
        ([[1.0, -1e4, 2.0]], [[1.0, -9999.0, 2.0]], None),
        (HIDDEN * np.where(np.arange(768) == 5, 2000, 1), RANDOM.standard_normal((4, 768)), "is off by"),
        (HIDDEN * np.where(np.arange(768) == 5, 2000, 1), HIDDEN * np.where(np.arange(768) == 5, 2000, 1.001), None),
        (HIDDEN, HIDDEN * 1.01, "is off by"),
        (np.arange(8), np.where(np.arange(8) == 3, 0, np.arange(8)), None),
        (np.arange(8), np.zeros(8, np.int64), "88 % other whole numbers"),
        (np.zeros((1, 0)), np.zeros((1, 0)), None),
        (np.zeros((2, 3, 0)), np.zeros((2, 3, 0)), None),
        (np.array(2.5), np.array(3.5), "is off by 1"),
        (1e-8 * HIDDEN, 1.1e-8 * HIDDEN, "is off by"),
    ],
)  # fmt: skip
def test_another_model_is_told_from_rounding(right, got, other):
    request = GoldenRequest({}, {}, {"y": np.asarray(right)}, None)
    answers = SimpleNamespace(infer=lambda feeds: {"y": np.asarray(got)})
    found = other_answer([request], answers)
    assert found is None if other is None else other in found


def test_a_variant_whose_newest_verdict_cannot_be_read_does_not_stand_in(tiny_bundle, tmp_path, monkeypatch):
    shutil.copytree(tiny_bundle, tmp_path / "model")
    monkeypatch.setattr(TorchReference, "missing", lambda self: "torch is not installed")
    bundle = Bundle.open(tmp_path / "model")
    graph = bundle.path(bundle.variants["onnx-fp32"].entry)
    for name in bundle.variants:
        if name != "hf":
            (bundle.root / "evidence" / name / "9999-of-a-newer-version.json").write_text('{"kind": "accuracy"')
    (tmp_path / "work").mkdir()
    with pytest.raises(BuildError, match="No variant of this model can be opened here as the reference"):
        build_variant(Bundle.open(tmp_path / "model"), graph, tmp_path / "work", QUICK, variant_id="mine")
