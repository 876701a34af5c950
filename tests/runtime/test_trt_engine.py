"""What is done with an engine between its file and its first call, over a FAKE of TensorRT: no evidence about a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from mlflow_tdeploy.core.engine import EngineRecord
from mlflow_tdeploy.core.errors import IntegrityError, SessionError
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.variant import FileRecord, Variant
from mlflow_tdeploy.runtime.backends._cuda import Cuda
from mlflow_tdeploy.runtime.backends._trt_engine import HOST_CODE, PLUGINS, TrtEngine, TrtOptions, open_engine
from mlflow_tdeploy.runtime.backends.tensorrt import TensorRt
from mlflow_tdeploy.runtime.base import Fit
from tests.bundles import WEIGHTS
from tests.runtime.fake_gpu import TRT, FakeCuda, FakeEngine

PROFILE = ((1, 4), (2, 4), (8, 4))
RECORD = EngineRecord("tensorrt", "10.16.1.11")


class Log:
    """Stands for ``ILogger``."""

    ERROR, INTERNAL_ERROR = "error", "internal"

    def __init__(self):
        pass


class Fake:
    """Stands for the module ``tensorrt``; every step of opening is noted."""

    def __init__(self, opens=True, refits=True):
        self.steps, self.opens, self.refits = [], opens, refits
        self.engine = FakeEngine(FakeCuda(), WEIGHTS, (PROFILE,))
        self.engine.get_weight_streaming_automatic_budget = lambda: 1234
        self.ILogger, self.__name__ = Log, "tensorrt"
        for name in ("TensorIOMode", "TensorLocation", "LayerInformationFormat"):
            setattr(self, name, getattr(TRT, name))

    def Runtime(self, log):
        def deserialize(plan):
            self.steps.append("open")
            if not self.opens:
                log.log("error", "magicTag: wrong version")
                return None
            return self.engine

        registry = SimpleNamespace(load_library=lambda path: self.steps.append(f"plugins {path}"))
        self.runtime = SimpleNamespace(
            deserialize_cuda_engine=deserialize, get_plugin_registry=lambda: registry, engine_host_code_allowed=False
        )
        return self.runtime

    def Refitter(self, engine, log):
        assert engine is self.engine
        return SimpleNamespace(refit_cuda_engine=lambda: self.steps.append("refit") or True)

    def OnnxParserRefitter(self, refitter, log):
        def refit(path):
            self.steps.append(f"weights of {path.rsplit('/', 1)[-1]}")
            if not self.refits:
                log.log("error", "a weight is missing")
            return self.refits

        return SimpleNamespace(refit_from_file=refit)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "model.plan").write_bytes(b"ftrt" + bytes(20) + bytes([10, 16, 1, 11]) + bytes(40))
    return tmp_path


def opened(root, trt, **changes):
    options = changes.pop("options", TrtOptions())
    return open_engine(
        trt, Cuda(*[FakeCuda()] * 2), root, "model.plan", dataclasses.replace(RECORD, **changes), options
    )


def test_an_engine_is_opened_with_the_plugins_that_this_host_allows(root, monkeypatch):
    trt = Fake()
    monkeypatch.setenv(PLUGINS, "/opt/a.so:/opt/b.so")
    assert isinstance(opened(root, trt), TrtEngine)
    assert trt.steps == ["plugins /opt/a.so", "plugins /opt/b.so", "open"]


def test_a_stripped_engine_takes_its_weights_from_its_graph(root):
    trt = Fake()
    opened(root, trt, weights="files/onnx-fp16/model.onnx")
    assert trt.steps == ["open", "weights of model.onnx", "refit"]


def test_a_stripped_engine_whose_weights_do_not_fit_is_refused(root):
    with pytest.raises(SessionError, match=r"cannot be taken from 'model.onnx': a weight is missing"):
        opened(root, Fake(refits=False), weights="files/onnx-fp16/model.onnx")


@pytest.mark.parametrize(("wanted", "budget"), [(-1, 1234), (0, 0), (99, 99)])
def test_an_engine_that_streams_its_weights_keeps_as_many_as_it_is_told(root, wanted, budget):
    trt = Fake()
    opened(root, trt, flags=("WEIGHT_STREAMING",), options=TrtOptions(weight_streaming_budget=wanted))
    assert trt.engine.weight_streaming_budget_v2 == budget


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"location": "host"}, "'x' holds shapes and lies on the host"),
        ({"format": "CHW4"}, "'x' has the format CHW4: build it with LINEAR"),
        ({"dtype": "FP8"}, "'x' is of type FP8, which no caller can pass"),
    ],
)
def test_an_engine_whose_tensors_nobody_can_pass_is_refused(root, changes, why):
    trt = Fake()
    vars(trt.engine).update(changes)
    with pytest.raises(SessionError, match=why):
        opened(root, trt)


@pytest.mark.parametrize(
    ("flags", "allowed", "fits"),
    [
        (("VERSION_COMPATIBLE",), "", False),
        (("VERSION_COMPATIBLE",), "1", True),
        (("EXCLUDE_LEAN_RUNTIME", "VERSION_COMPATIBLE"), "", True),
    ],
)
def test_a_plan_that_brings_code_runs_only_where_the_host_says_so(root, monkeypatch, flags, allowed, fits):
    record = dataclasses.replace(RECORD, flags=flags, compute_capability="9.0", gpu="NVIDIA H200")
    file = FileRecord("files/e/model.plan", "0" * 64, 1)
    variant = Variant("e", "trt", Precision("fp16", "fp16"), "cuda", file.path, (file,), engine=record)
    monkeypatch.setattr(TensorRt, "version", lambda self: record.version)
    monkeypatch.setenv(HOST_CODE, allowed)
    found = TensorRt().probe(Fingerprint("linux-x86_64", gpu=Gpu("NVIDIA H200", "9.0")), variant)
    assert (found.fit is not Fit.UNSUPPORTED) is fits
    assert fits or "brings program code" in found.reason
    trt = Fake()
    opened(root, trt, flags=flags)
    assert trt.runtime.engine_host_code_allowed is (allowed == "1")


def test_what_tensorrt_says_of_a_plan_that_it_does_not_open_is_told(root):
    with pytest.raises(SessionError, match="magicTag: wrong version"):
        opened(root, Fake(opens=False))


def test_a_plan_that_is_another_one_than_recorded_is_not_even_opened(root):
    trt = Fake()
    with pytest.raises(SessionError, match=r"says tensorrt 10.16.1.11, its record tensorrt 11.4.0.106"):
        opened(root, trt, version="11.4.0.106")
    (root / "model.plan").write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="is no TensorRT engine"):
        opened(root, trt)
    assert trt.steps == []


def test_an_engine_with_plugins_fits_where_the_host_names_them(monkeypatch):
    record = dataclasses.replace(RECORD, plugins=("libgelu.so",), compute_capability="9.0", gpu="NVIDIA H200")
    file = FileRecord("files/e/model.plan", "0" * 64, 1)
    variant = Variant("e", "trt", Precision("fp16", "fp16"), "cuda", file.path, (file,), engine=record)
    host = Fingerprint("linux-x86_64", gpu=Gpu("NVIDIA H200", "9.0"))
    monkeypatch.setattr(TensorRt, "version", lambda self: record.version)
    monkeypatch.delenv(PLUGINS, raising=False)
    assert "needs the plugins of libgelu.so: set TDEPLOY_TRT_PLUGINS" in TensorRt().probe(host, variant).reason
    monkeypatch.setenv(PLUGINS, "/opt/libgelu.so")
    assert TensorRt().probe(host, variant).fit is Fit.OPTIMAL
