"""Opening that may end the process, tried in a child that does end in every way."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import NoVariantError
from mlflow_tdeploy.runtime import probe, trial
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu
from mlflow_tdeploy.runtime.backends.tensorrt import TensorRt, TensorRtRtx
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.policy import Policy
from tests.bundles import WEIGHTS, make_bundle

X = np.array([[1, 2, 3, 4]], np.float32)
BOTH = {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}
#: Dies for the best variant only.
DIES = """
import json, os, signal, sys, time
if json.loads(sys.argv[1])["variant"] == "ort-cpu-fp32":
    {how}
from mlflow_tdeploy.runtime.trial import attempt
attempt(sys.argv[1])
"""


@pytest.fixture
def risky(monkeypatch):
    """ONNX Runtime as if it could end the process; the children that were started."""
    children, run = [], probe.run_child
    monkeypatch.setattr(OrtCpu, "risky", True)
    monkeypatch.setattr(probe, "run_child", lambda *given, **how: (children.append(given), run(*given, **how))[1])
    return children


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "killed by SIGBUS"),
        ("os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("os.abort()", "killed by SIGABRT"),
        ("raise SystemExit('cuInit failed: no usable driver')", "cuInit failed: no usable driver"),
        ("raise RuntimeError('out of memory')", "RuntimeError: out of memory"),
        ("time.sleep(600)", "no answer"),
    ],
)
def test_the_next_candidate_serves_whichever_way_the_child_ends(tmp_path, monkeypatch, risky, caplog, how, why):
    monkeypatch.setattr(trial, "SCRIPT", DIES.format(how=how))
    monkeypatch.setattr(trial, "TIMEOUT", 8.0 if "sleep" in how else 120.0)
    root = make_bundle(tmp_path, BOTH)
    with caplog.at_level(logging.WARNING, "mlflow_tdeploy"), open_model(root) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        assert f"tried in a process of its own first: {why}" in model.decision.failures[0]
        np.testing.assert_allclose(model.predict({"x": X})["y"], X @ WEIGHTS, rtol=1e-6)
    assert "ort-cpu-fp32 cannot serve" in caplog.text


def test_strict_refuses_instead(tmp_path, monkeypatch, risky):
    monkeypatch.setattr(trial, "SCRIPT", DIES.format(how="os.abort()"))
    with pytest.raises(NoVariantError, match="killed by SIGABRT"):
        open_model(make_bundle(tmp_path, BOTH), policy=Policy(strict=True))


def test_what_went_well_is_not_tried_again_until_something_changes(tmp_path, risky):
    root = make_bundle(tmp_path, BOTH)
    for _ in range(2):
        with open_model(root) as model:
            assert model.decision.chosen.variant == "ort-cpu-fp32"
    assert len(risky) == 1
    with open_model(root, options=SessionOptions(own={"arena": False})):
        pass
    assert len(risky) == 2  # a driver may take some options and not others


def test_what_ended_a_child_is_tried_again(tmp_path, monkeypatch, risky):
    """The driver may have been mended in the meantime."""
    real = trial.SCRIPT
    root = make_bundle(tmp_path, BOTH)
    monkeypatch.setattr(trial, "SCRIPT", DIES.format(how="os.abort()"))
    open_model(root).close()
    monkeypatch.setattr(trial, "SCRIPT", real)
    with open_model(root) as model:
        assert model.decision.chosen.variant == "ort-cpu-fp32"


def test_the_child_sees_what_the_parent_would(tmp_path, risky):
    """A wrong answer to a golden request is found there, too."""
    root = make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": -WEIGHTS})
    with open_model(root) as model:
        assert "its answer to a golden request is wrong" in model.decision.failures[0]


def test_only_what_is_risky_is_tried_and_engines_are(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "run_child", lambda *_, **__: pytest.fail("nothing is risky here"))
    open_model(make_bundle(tmp_path, BOTH)).close()
    assert TensorRt.risky
    assert TensorRtRtx.risky
