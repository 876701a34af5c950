"""What a user says about a recipe that quantizes: its calibrator, and what stays in fp32."""

from __future__ import annotations

import importlib.util

import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy import FakeQuant, Quantize
from mlflow_tdeploy.build.options import precisions_of
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.store.bundle import Bundle
from tests.build.test_int8_mixed import LAYERS, Planted
from tests.build.test_onnx_int8 import requests

NAMES = ("encoder/0/MatMul", "encoder/1/MatMul", "head")
#: By a recipe: a name that it has, and who has to be installed for it.
RECIPES = [
    ("onnx-int8", "percentile", None),
    ("ort-cpu-int8-mixed", None, None),
    ("ort-cpu-int4", None, None),
    ("onnx-int8-torch", "mse", "pytorch_quantization"),
    ("onnx-int8-modelopt", "entropy", "modelopt"),
    ("onnx-int4-modelopt", "rtn_dq", "modelopt"),
]


def saved(folder, *precisions, **more):
    given = requests(20)
    mlflow_tdeploy.save_model(
        Planted(()), folder, example=given[0], shapes={"batch": (1, 8, 16)}, precisions=["fp32", *precisions],
        verify_with=given, budget="worst_cosine >= 0.9", **more,
    )  # fmt: skip
    return Bundle.open(folder)


@pytest.mark.parametrize(("recipe", "calibrator", "package"), RECIPES)
def test_a_calibrator_is_named_and_a_layer_is_kept(tmp_path, recipe, calibrator, package):
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    bundle = saved(tmp_path / "model", recipe)
    names = [one for one, form in bundle.variants[recipe].precision.settings["products"].items() if form != "fp32"]
    assert len(names) == LAYERS
    bundle = saved(tmp_path / "other", Quantize(recipe, calibrator, keep=[names[1], f"{names[3]}|no one"]))
    precision = bundle.variants[recipe].precision
    assert {one for one, form in precision.settings["products"].items() if form == "fp32"} == {names[1], names[3]}
    assert "not_as_asked" not in precision.settings
    assert set(precision.kept) == {names[1], names[3]}
    said = {"calibrator": calibrator} if calibrator else {}
    assert precision.settings["said"] == {**said, "keep": [names[1], f"{names[3]}|no one"]}
    if calibrator:
        assert {one["what"].partition(",")[0] for one in precision.settings["trials"]} == {calibrator}


def test_names_that_are_none_are_refused_with_those_that_are():
    with pytest.raises(InvalidInputError, match=r"'onnx-int8' could quantize is called 'body.\*' .*encoder/0/MatMul, "):
        Quantize("onnx-int8", keep=["head", "body.*"]).kept(NAMES)
    with pytest.raises(InvalidInputError, match="leaves nothing"):
        Quantize("onnx-int8", keep=["head", "encoder.*"]).kept(NAMES)
    assert Quantize("onnx-int8", keep=["head", "head", ".*/1/.*"]).kept(NAMES) == NAMES[1:]
    assert Quantize("onnx-int8", keep=["head"]).kept(NAMES) == ("head",), "whole names only"
    assert Quantize("onnx-int8", keep=(one for one in ["head"])).kept(NAMES) == ("head",), "read once"


def test_a_pattern_without_a_match_leaves_no_model_behind(tmp_path):
    with pytest.raises(MlflowException, match="Nothing that 'onnx-int8' could quantize is called 'nobody'"):
        saved(tmp_path / "model", Quantize("onnx-int8", keep=["nobody"]))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (lambda: Quantize("onnx-int8", "awq_clip"), "its calibrators are max, percentile, mse, entropy"),
        (lambda: Quantize("ort-cpu-int8-mixed", "max"), "it has no calibrators to choose from"),
        (lambda: Quantize("ort-cpu-int8", "max"), "'ort-cpu-int8' takes neither.* onnx-int8"),
        (lambda: Quantize("int9"), "'int9' is no recipe"),
        (lambda: Quantize("onnx-int8", keep="head"), "keep is a list"),
        (lambda: Quantize("onnx-int8", keep=5), "keep is a list"),
        (lambda: Quantize("onnx-int8", keep=["("]), "no regular expression"),
        (lambda: Quantize(None), "recipe is the id of a variant"),
        (lambda: Quantize, "has the class Quantize"),
    ],
)
def test_what_a_recipe_cannot_take_is_refused_before_anything_is_made(said, why):
    with pytest.raises(InvalidInputError, match=why):
        precisions_of(["fp32", said()])


def test_a_recipe_is_told_once():
    with pytest.raises(InvalidInputError, match="names 'onnx-int8' twice"):
        precisions_of([Quantize("onnx-int8"), "onnx-int8"])
    with pytest.raises(InvalidInputError, match="precisions is a list.*Quantize"):
        precisions_of(Quantize("onnx-int8"))
    names, said = precisions_of(["fp32", Quantize("onnx-int8", "max"), FakeQuant()])
    assert names == ("fp32", "onnx-int8", "onnx-int8-torch")
    assert said["onnx-int8"].calibrator == "max"
