from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.stage import make_measure, make_trial
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu
from mlflow_tdeploy.store.bundle import Bundle


@pytest.fixture(scope="module")
def parts(tiny_bundle: Path):
    """The task, data and host of the tiny classifier, and its portable graph."""
    bundle = Bundle.open(tiny_bundle)
    manifest = bundle.manifest
    task = TASKS.get(manifest.task)(manifest.task_config, manifest.signature, bundle.root / "assets")
    data = VerifyData.of(["one", "two words"]).for_task(task)
    path = bundle.path(bundle.variants["onnx-fp32"].entry)
    return (task, data, probe.host()), path


def test_make_measure_opens_each_graph_with_its_own_session_hints(parts, monkeypatch):
    arguments, path = parts
    opened: list[Mapping[str, object]] = []
    really = OrtCpu.open

    def spy(self, root, variant, signature, options):
        opened.append(dict(variant.session))
        return really(self, root, variant, signature, options)

    monkeypatch.setattr(OrtCpu, "open", spy)
    hints = {"disabled_optimizers": ["SkipLayerNormFusion"]}
    graphs = {"all": Graph(path, Precision()), "without": Graph(path, Precision(), hints)}
    samples = make_measure(*arguments)(graphs, 0.05)
    assert opened == [{}, hints]  # or two equal graphs would be timed against each other
    assert {shape: set(by_name) for shape, by_name in samples.items()} == {
        "short": {"all", "without"},
        "opt": {"all", "without"},
    }


def test_make_trial_says_why_a_graph_cannot_be_opened(parts, tmp_path):
    arguments, path = parts
    trial = make_trial(*arguments)
    assert trial(Graph(path, Precision())) is None
    (tmp_path / "model.onnx").write_bytes(path.read_bytes()[:500])
    why = trial(Graph(tmp_path / "model.onnx", Precision()))
    assert why is not None
    assert "cannot open" in why
    assert str(tmp_path) not in why
