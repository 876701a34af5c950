"""The page of what recipes hold on: no recipe is forgotten, and what fails is shown."""

from __future__ import annotations

from benchmarks import support
from mlflow_tdeploy.build.recipes import RECIPES

#: For GPUs: the first is onnx-fp16 with fusions, the second cannot be asked here.
ELSEWHERE = {"ort-cuda-fp16", "onnx-bf16-modelopt"}


def test_every_recipe_is_tried():
    assert {*support.RECIPES} == {*RECIPES.names()} - ELSEWHERE


def test_the_page_says_what_failed_and_why():
    made = {"state": "made", "worst_cosine": 0.99, "kept": 2}
    failed = {"state": "failed", "why": "no such thing"}
    page = support.table({"BERT": {"onnx-int8": made}, "ViT": {"onnx-int8": failed}})
    assert "| `onnx-int8` | 0.9900 (2) | FAILED |" in page
    assert "- ViT, `onnx-int8`: no such thing" in page


def test_the_page_in_the_repository_is_that_of_the_results():
    assert support.PAGE.read_text(encoding="utf-8") == support.table(support._joined({}))
