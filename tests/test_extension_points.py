"""A task, a runtime and a recipe are one file each: a toy one of each works without a change anywhere else."""

from __future__ import annotations

import dataclasses
import sys

import mlflow
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mlflow_tdeploy
import mlflow_tdeploy.build.recipes as recipes_package
import mlflow_tdeploy.core.tasks as tasks_package
import mlflow_tdeploy.runtime.backends as backends_package
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, linear_graph, make_bundle

TASK = '''
from mlflow_tdeploy.core.tasks import TASKS, Param
from mlflow_tdeploy.core.tasks.tensors import Tensors

@TASKS.register("row-sums")
class RowSums(Tensors):
    """The sum of every output row."""
    name = "row-sums"
    params = (Param("times", "integer", 1, "Factor."),)
    def finish(self, answers, params):
        return answers[0]["y"].sum(axis=1) * params["times"]
'''
TEXT_TASK = '''
import numpy as np
from mlflow_tdeploy.core.budget import VECTOR_BUDGET
from mlflow_tdeploy.core.compare import Comparison, Rows
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Head
from mlflow_tdeploy.core.tasks._text import TextTask

class Logits(Comparison):
    def __init__(self):
        self.rows = Rows()
    def add(self, reference, got, inputs):
        self.rows.add(reference["logits"], got["logits"])
    def metrics(self):
        return self.rows.metrics()

@TASKS.register("margin")
class Margin(TextTask):
    """How far the best class is before the next one."""
    name, default_budget = "margin", VECTOR_BUDGET
    head = Head("logits", architecture="ForSequenceClassification", auto_class="AutoModelForSequenceClassification")
    def decode(self, outputs, feeds, count, params):
        ordered = np.sort(outputs["logits"][:count], axis=1)
        return list(ordered[:, -1] - ordered[:, -2])
    def finish(self, answers, params):
        return np.array(answers)
    def answer_form(self):
        return AnswerForm("nested")
    def comparison(self):
        return Logits()
'''
RECIPE = '''
from mlflow_tdeploy.build.recipes import RECIPES, Graph, Recipe
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.store.external_data import copy_graph

@RECIPES.register("onnx-copy")
class Copy(Recipe):
    """The portable graph once more."""
    id, precision, parent, format, device, default = "onnx-copy", "copied", "onnx-fp32", "onnx", "any", False
    def run(self, context):
        copy_graph(context.base().path, context.output().parent)
        return Graph(context.output(), Precision(recipe=self.id))
'''
RUNTIME = '''
import numpy as np
from mlflow_tdeploy.runtime.base import RUNTIMES, Compat, Fit, Runtime, Session

class Product(Session):
    def __init__(self, weights):
        self.weights = weights
    def infer(self, feeds):
        return {"y": feeds["x"] @ self.weights}
    def close(self):
        pass

@RUNTIMES.register("numpy")
class Numpy(Runtime):
    """Multiplies with numpy."""
    name, formats, tier, preference, install = "numpy", frozenset({"onnx"}), 0, 1, "pip install numpy"
    modules, distributions = {"numpy": "numpy"}, ("numpy",)
    def probe(self, host, variant):
        return Compat(Fit.OPTIMAL, "a single product")
    def open(self, root, variant, signature, options):
        import onnx
        from onnx import numpy_helper
        graph = onnx.load(root / variant.entry).graph
        return Product(numpy_helper.to_array(graph.initializer[0]))
    def self_test(self):
        return "numpy"
'''


@pytest.fixture
def add_file(tmp_path, monkeypatch):
    """Put a module into a package for the length of a test, found the way shipped ones are."""
    added = []

    def add(package, registry, name, code, entry):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(code)
        registry.names()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.setattr(registry, "_discover", package.__name__)
        added.append((registry, entry, f"{package.__name__}.{name}"))

    yield add
    for registry, entry, module in added:
        registry.unregister(entry)
        sys.modules.pop(module, None)


def test_adding_a_task_is_adding_one_file(tmp_path, add_file):
    root = make_bundle(tmp_path / "m")
    manifest = dataclasses.replace(Bundle.open(root).manifest, task="row-sums")
    (root / "tdeploy/manifest.json").write_text(to_json(manifest))
    add_file(tasks_package, TASKS, "row_sums", TASK, "row-sums")
    x = np.ones((2, 4), np.float32)
    with open_model(root) as model:
        np.testing.assert_allclose(model.predict({"x": x}, times=2), 2 * (x @ WEIGHTS).sum(axis=1), rtol=1e-6)


def test_adding_a_task_of_hugging_face_models_is_adding_one_file(tmp_path, add_file, tiny_bert):
    """It is logged, verified and served, and the original is read back, as a task that is shipped."""
    add_file(tasks_package, TASKS, "margin", TEXT_TASK, "margin")
    texts, shapes = ["a good film", "a bad one"], {"batch": (1, 2, 4), "sequence": (3, 16, 32)}
    mlflow_tdeploy.save_model(str(tiny_bert), tmp_path / "m", task="margin", precisions=["fp32"], shapes=shapes)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    with torch.inference_mode():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.sort(dim=1).values
    expected = (logits[:, -1] - logits[:, -2]).numpy()
    for variant in ("onnx-fp32", "hf"):
        with open_model(tmp_path / "m", policy=Policy(variant=variant)) as opened:
            np.testing.assert_allclose(opened.predict(texts), expected, atol=1e-5)
    np.testing.assert_allclose(mlflow.pyfunc.load_model(str(tmp_path / "m")).predict(texts), expected, atol=1e-5)


def test_adding_a_recipe_is_adding_one_file(tmp_path, add_file):
    add_file(recipes_package, RECIPES, "onnx_copy", RECIPE, "onnx-copy")
    linear_graph(tmp_path / "linear.onnx", WEIGHTS)
    shapes = {"batch": (1, 2, 8)}
    mlflow_tdeploy.save_model(str(tmp_path / "linear.onnx"), tmp_path / "m", shapes=shapes, precisions=["onnx-copy"])
    bundle = Bundle.open(tmp_path / "m")
    assert bundle.variants["onnx-copy"].precision.recipe == "onnx-copy"
    assert latest_accuracy(bundle.evidence("onnx-copy")).passed
    with open_model(tmp_path / "m", policy=Policy(variant="onnx-copy")) as opened:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(opened.predict({"x": x})["y"], x @ WEIGHTS, rtol=1e-6)


def test_adding_a_runtime_is_adding_one_file(tmp_path, add_file):
    root = make_bundle(tmp_path / "m")
    add_file(backends_package, RUNTIMES, "numpy_product", RUNTIME, "numpy")
    x = np.ones((2, 4), np.float32)
    with open_model(root) as model:
        assert model.decision.chosen.runtime == "numpy"
        np.testing.assert_allclose(model.predict({"x": x})["y"], x @ WEIGHTS, rtol=1e-6)
        assert "ort-cpu" in model.decision.explain()
