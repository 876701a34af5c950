"""Builds of modules and graphs: references, progress, extension, crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import mlflow_tdeploy.build.recipes as recipes_package
from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.recipes import RECIPES
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.source.resolve import resolve
from tests.build.building import ALL, FP32, accuracy, build
from tests.build.sources import Mlp, mlp_source
from tests.bundles import WEIGHTS, linear_graph


def test_build_bundle_of_a_module_takes_the_portable_graph_as_reference(tmp_path):
    report, bundle = build(mlp_source(), tmp_path / "model")
    assert set(bundle.variants) == ALL - {"hf"}
    assert bundle.manifest.reference == "onnx-fp32"
    assert accuracy(bundle, "onnx-fp32").metrics["max_difference"] < 1e-5
    assert accuracy(bundle, "onnx-fp32").settings["reference"] == "source"
    with open_model(tmp_path / "model") as model:
        x = np.ones((3, 4), np.float32)
        got = model.infer({"x": x})

    np.testing.assert_allclose(got["y"], Mlp().eval()(torch.from_numpy(x))["y"].detach().numpy(), atol=0.05)
    assert report.seconds > 0


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


def test_build_options_refuse_what_is_unknown():
    for wrong in ({"on_budget": "warn"}, {"exporter": "magic"}, {"opset": "18"}, {"opset": 3}):
        with pytest.raises(InvalidInputError):
            BuildOptions(**wrong)


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


def test_build_bundle_makes_variants_of_a_single_graph(tmp_path):
    linear_graph(tmp_path / "model.onnx")
    _, bundle = build(resolve(tmp_path / "model.onnx"), tmp_path / "model")
    assert set(bundle.variants) == ALL - {"hf"}
    assert bundle.manifest.reference == "onnx-fp32"


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
from tests.build.building import build
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
