"""The page of what architectures do which tasks: every one that was promised, and what is refused is told."""

from __future__ import annotations

import json

import mlflow_tdeploy
from benchmarks import architectures
from mlflow_tdeploy.core.tasks import TASKS

#: Tasks whose models are those of another one.
ALIKE = {"zero-shot-classification", "text-ranking"}


def test_every_task_is_tried():
    tried = {task for _, tasks in architectures.ARCHITECTURES.values() for task in tasks}
    assert tried == {*TASKS.names()} - ALIKE


def test_the_page_says_what_was_refused_and_why():
    good = {
        "verified": True, "worst_cosine": 0.9999, "blocks": 2, "fused": 1, "could_be_fused": 2, "int8": False,
        "int8_cosine": 0.5, "skipped": {"onnx-fp16": "no such thing"},
    }  # fmt: skip
    page = architectures.table(
        {"A": {"tensors": good}, "B": {"fill-mask": {"why": "it has no head"}}},
        {"A": {"hf": 12.0, "ort-cpu-fp32": 3.0}, "B": {"why": "no model"}},
    )
    assert "| A | `tensors` | yes | 0.999900 | 1 (2) of 2 | over budget (0.5000) |" in page
    assert "| B | `fill-mask` | refused | - | - | - |" in page
    assert "- A, `tensors`: onnx-fp16: no such thing" in page
    assert "- B, `fill-mask`: it has no head" in page
    assert "| A | 12.00 | - | 4.00 x | - |" in page
    assert "- B, speeds: no model" in page


def test_variants_are_timed_beside_the_module(tiny_bert, tmp_path):
    mlflow_tdeploy.save_model(str(tiny_bert), tmp_path / "model", precisions=["fp32"])
    assert set(architectures._timed(tmp_path / "model")) == {"hf", "onnx-fp32", "ort-cpu-fp32"}


def test_the_page_in_the_repository_is_that_of_the_results():
    results = json.loads(architectures.RESULTS.read_text("utf-8"))
    found, times = (results[part]["details"] for part in ("architectures", "speeds"))
    assert [*found] == [*times] == [*architectures.ARCHITECTURES]
    assert architectures.PAGE.read_text("utf-8") == architectures.table(found, times)
