from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import SessionError
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES, Fit
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.source.resolve import resolve
from tests.served import task_of

HF = Variant("hf", "hf", Precision(), "any", "source", ())


def hf(source):
    """The variant as a build records it."""
    return dataclasses.replace(HF, session={"task": source.task})


@pytest.fixture
def runtime():
    return RUNTIMES.get("torch")()


@pytest.fixture(scope="module", params=["sentence-embedding", "text-classification", "feature-extraction"])
def source(request, minilm_path, tiny_bert):
    return resolve(minilm_path if request.param == "sentence-embedding" else tiny_bert, task=request.param)


def test_open_gives_the_sources_answers_when_a_bundle_holds_it(runtime, source, tmp_path):
    assert source.write_source(tmp_path / "source")
    feeds = task_of(source, tmp_path / "assets").example_feeds("opt", ragged=True)
    session = runtime.open(tmp_path, hf(source), source.signature, SessionOptions())
    got, want = session.infer(feeds), source.reference(feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, atol=1e-6)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.infer(feeds)


def test_infer_names_the_variant_when_torch_fails(runtime, tiny_bert, tmp_path):
    source = resolve(tiny_bert)
    source.write_source(tmp_path / "source")
    session = runtime.open(tmp_path, hf(source), source.signature, SessionOptions())
    feeds = {spec.name: np.full((1, 4), 10**6, np.int64) for spec in source.signature.inputs}
    with pytest.raises(SessionError, match="torch failed in variant 'hf'"):
        session.infer(feeds)


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickled", "code"])
def test_open_names_the_variant_and_runs_no_code_when_its_files_are_damaged(runtime, tiny_bert, tmp_path, damage):
    source = resolve(tiny_bert)
    source.write_source(tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "code":
        config = json.loads((tmp_path / "source" / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
        (tmp_path / "source" / "config.json").write_text(json.dumps(config))
        (tmp_path / "source" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    else:
        weights.unlink()
        if damage == "pickled":
            (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SessionError, match="torch cannot open variant 'hf'"):
        runtime.open(tmp_path, hf(source), source.signature, SessionOptions())
    assert not (tmp_path / "ran").exists()


def test_open_says_so_when_the_record_names_no_task_of_hugging_face_models(runtime, tiny_bert, tmp_path):
    source = resolve(tiny_bert)
    source.write_source(tmp_path / "source")
    for variant in (HF, dataclasses.replace(HF, session={"task": "tensors"})):
        with pytest.raises(SessionError, match="'source' was saved for the task '.*', which is about no such model"):
            runtime.open(tmp_path, variant, source.signature, SessionOptions())


def test_probe_is_usable_for_the_original_only(runtime):
    host = probe.host()
    assert runtime.probe(host, HF).fit is Fit.USABLE
    graph = Variant("onnx-fp32", "onnx", Precision(), "any", "model.onnx", ())
    assert runtime.probe(host, graph).fit is Fit.UNSUPPORTED


def test_probe_names_what_the_original_needs_and_this_host_lacks(runtime):
    variant = Variant("hf", "hf", Precision(), "any", "source", (), requires={"no-such-distribution": "1.0"})
    compat = runtime.probe(probe.host(), variant)
    assert (compat.fit, compat.otherwise) == (Fit.UNSUPPORTED, Fit.USABLE)
    assert compat.reason.startswith("no-such-distribution is not installed")


def test_missing_names_the_package_when_torch_is_not_installed(runtime, monkeypatch):
    assert runtime.missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert "torch is not installed (pip install" in str(runtime.missing())


def test_self_test_uses_torch(runtime):
    assert runtime.self_test() == f"torch {runtime.version()}: cpu"


def test_runtimes_import_no_torch_when_they_are_listed():
    code = (
        "import sys; from mlflow_tdeploy.runtime.base import RUNTIMES; r = RUNTIMES.get('torch')(); "
        "r.missing(); r.version(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
