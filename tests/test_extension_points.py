"""A task and a runtime are one file each: a toy one of both serves without a change anywhere else."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

import mlflow_tdeploy.core.tasks as tasks_package
import mlflow_tdeploy.runtime.backends as backends_package
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.store.bundle import Bundle
from tests.bundles import WEIGHTS, make_bundle

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


def test_adding_a_runtime_is_adding_one_file(tmp_path, add_file):
    root = make_bundle(tmp_path / "m")
    add_file(backends_package, RUNTIMES, "numpy_product", RUNTIME, "numpy")
    x = np.ones((2, 4), np.float32)
    with open_model(root) as model:
        assert model.decision.chosen.runtime == "numpy"
        np.testing.assert_allclose(model.predict({"x": x})["y"], x @ WEIGHTS, rtol=1e-6)
        assert "ort-cpu" in model.decision.explain()
