"""Environments other than the development one, made by pip; and what needs gigabytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import StringStringEntryProto, TensorProto, helper

import mlflow_tdeploy
from tests.flavor.text_bundles import make_text_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TEXTS = ["a good film", "bad"]


def call(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=900, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment(folder, *requirements, cwd=ROOT):
    """Make an environment and return its interpreter."""
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements, cwd=cwd)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT)
    return next(folder.glob("*.whl"))


def test_core_and_runtime_work_with_numpy_1_and_without_mlflow(tmp_path):
    """Triton images carry numpy 1.26, and no MLflow."""
    python = environment(
        tmp_path / "venv",
        *("numpy==1.26.4", "tokenizers", "onnxruntime", "ml_dtypes", "pytest", "pytest-timeout", "hypothesis"),
    )
    clean = {**os.environ, "PYTHONPATH": str(ROOT), "TDEPLOY_CACHE_DIR": str(tmp_path / "cache")}
    tests = sorted((ROOT / "tests" / "core").glob("test_*.py"))  # those of the tasks compare with transformers
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    assert "passed" in call(python, "-m", "pytest", *options, *tests, env=clean, cwd=ROOT)
    model = make_text_bundle(tmp_path / "model")
    code = (
        "import json, sys; from mlflow_tdeploy.runtime.model import open_model\n"
        f"answer = open_model({str(model)!r}).predict({TEXTS!r}).tolist()\n"
        "assert 'mlflow' not in sys.modules and 'pandas' not in sys.modules\n"
        "print(json.dumps(answer))"
    )
    answer = json.loads(call(python, "-c", code, env=clean, cwd=tmp_path).splitlines()[-1])
    with mlflow_tdeploy.load_model(str(model)) as here:
        np.testing.assert_allclose(answer, here.predict(TEXTS), rtol=1e-6)


def test_a_model_with_its_wheel_is_served_from_an_environment_made_of_its_requirements(wheel, tmp_path, monkeypatch):
    """``mlflow models serve --env-manager virtualenv`` and ``build-docker`` do the same: install from there, load."""
    monkeypatch.setenv("TDEPLOY_WHEEL", str(wheel))
    model = tmp_path / "model"
    mlflow_tdeploy.save_model(make_text_bundle(tmp_path / "made"), model)
    assert f"wheels/{wheel.name}" in (model / "requirements.txt").read_text()
    constraints = ROOT / "constraints.txt"
    python = environment(tmp_path / "venv", "-c", constraints, "-r", "requirements.txt", cwd=model)
    code = (
        f"import json, mlflow.pyfunc; model = mlflow.pyfunc.load_model({str(model)!r})\n"
        f"print(json.dumps(model.predict({TEXTS!r}).tolist()))"
    )
    clean = {**os.environ, "TDEPLOY_CACHE_DIR": str(tmp_path / "cache")}
    answer = json.loads(call(python, "-c", code, env=clean, cwd=tmp_path).splitlines()[-1])
    with mlflow_tdeploy.load_model(str(model)) as here:
        np.testing.assert_allclose(answer, here.predict(TEXTS), rtol=1e-6)


def project(entry_point, tmp_path, **parameters):
    """Run an entry point of MLproject as a user does, against a SQLite store of its own."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    known = {"MLFLOW_TRACKING_URI": store, "TDEPLOY_CACHE_DIR": str(tmp_path / "cache")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    given = [part for name, value in parameters.items() for part in ("-P", f"{name}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", ROOT, "--env-manager", "local", "-e", entry_point, *given]
    return call(*command, cwd=tmp_path, env={**os.environ, **known, "PATH": path})


def test_mlproject_logs_serves_benches_and_exports(tiny_bert, tmp_path):
    log = {
        "source": tiny_bert,
        "task": "text-classification",
        "name": "tiny model",
        "register": "tiny",
        "alias": "live",
    }
    project("log", tmp_path, **log)
    assert "equal to predict: True" in project("serve-check", tmp_path, model_uri="models:/tiny@live")
    assert "ort-cpu-fp32" in project("bench", tmp_path, model_uri="models:/tiny@live")
    out = tmp_path / "a folder"
    project("export", tmp_path, source=tiny_bert, task="text-classification", out=out)
    with mlflow_tdeploy.load_model(str(out)) as model:
        assert len(model.predict(TEXTS)) == 2


def test_a_graph_of_more_than_2_gib_is_logged_and_served(tmp_path):
    """More than one protobuf message can hold: weights stay beside the graph all the way."""
    width, layers = 4096, 34
    source = tmp_path / "source"
    source.mkdir()
    random = np.random.default_rng(0)
    nodes, weights = [], []
    with (source / "weights.bin").open("wb") as file:
        for layer in range(layers):
            place = {"location": "weights.bin", "offset": file.tell(), "length": 4 * width**2}
            file.write((random.standard_normal((width, width), dtype=np.float32) / 64).tobytes())
            weight = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[width, width])
            weight.data_location = TensorProto.EXTERNAL
            weight.external_data.extend(StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
            weights.append(weight)
            nodes.append(helper.make_node("MatMul", [f"x{layer}" if layer else "x", weight.name], [f"m{layer}"]))
            nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"x{layer + 1}" if layer + 1 < layers else "y"]))
    assert (source / "weights.bin").stat().st_size > 2 * 2**30
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in "xy"]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, source / "model.onnx")
    x = np.ones((1, width), np.float32)
    expected = onnxruntime.InferenceSession(source / "model.onnx").run(None, {"x": x})[0]
    mlflow_tdeploy.save_model(
        str(source / "model.onnx"), tmp_path / "model", task="tensors", shapes={"batch": (1, 2, 2)}, precisions=["fp32"]
    )
    shutil.rmtree(source)
    with mlflow_tdeploy.load_model(str(tmp_path / "model")) as served:
        np.testing.assert_allclose(served.predict({"x": x})["y"], expected, atol=1e-4)
