"""Calls that force a choice of their own on an opened model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import InvalidInputError, NoVariantError
from mlflow_tdeploy.runtime.backends.ort_cpu import OrtCpu
from mlflow_tdeploy.runtime.model import open_model
from mlflow_tdeploy.runtime.policy import Policy
from tests.bundles import WEIGHTS, linear_graph, make_bundle

X = np.array([[1, 2, 3, 4]], np.float32)
BOTH = {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS}


def test_predict_serves_the_variant_that_a_call_forces(tmp_path):
    slightly = WEIGHTS * np.float32(1.001)
    with open_model(make_bundle(tmp_path, {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": slightly})) as model:
        plain, forced = model.predict({"x": X})["y"], model.predict({"x": X}, variant="onnx-fp32")["y"]
        np.testing.assert_allclose(plain, X @ slightly, rtol=1e-6)
        np.testing.assert_allclose(forced, X @ WEIGHTS, rtol=1e-6)
        assert model.decision.chosen.variant == "ort-cpu-fp32"
        with pytest.raises(InvalidInputError, match="Unknown variant 'nope'"):
            model.predict({"x": X}, variant="nope")


def test_a_call_that_forces_a_runtime_keeps_the_variant_that_the_model_was_opened_with(tmp_path):
    with open_model(make_bundle(tmp_path, BOTH), policy=Policy(variant="onnx-fp32")) as model:
        model.predict({"x": X}, runtime="ort-cpu")
        assert list(model._pipelines) == [("onnx-fp32", "ort-cpu")]


def test_predict_opens_a_forced_variant_once_when_many_ask_at_once(tmp_path, monkeypatch):
    opened = []
    original = OrtCpu.open

    def slow(self, root, variant, signature, options):
        opened.append(variant.id)
        time.sleep(0.05)
        return original(self, root, variant, signature, options)

    with open_model(make_bundle(tmp_path, BOTH)) as model, ThreadPoolExecutor(8) as pool:
        monkeypatch.setattr(OrtCpu, "open", slow)
        list(pool.map(lambda _: model.predict({"x": X}, variant="onnx-fp32"), range(8)))
        assert opened.count("onnx-fp32") <= 2  # the session itself, and one for lone requests


def test_a_call_that_is_strict_gets_the_first_choice_or_nothing(tmp_path):
    folder = make_bundle(tmp_path / "model", BOTH)
    with open_model(folder) as model:
        np.testing.assert_array_equal(model.predict({"x": X}, {"strict": True})["y"], model.predict({"x": X})["y"])
    weights = folder / "tdeploy" / "files" / "ort-cpu-fp32" / "model.onnx"
    weights.write_bytes(weights.read_bytes() + b"x")
    with open_model(folder) as model:
        assert model.predict({"x": X}, {"strict": False})["y"].shape == (1, 3)
        with pytest.raises(NoVariantError, match="ort-cpu-fp32"):
            model.predict({"x": X}, {"strict": True})
    with open_model(folder, policy=Policy(variant="onnx-fp32")) as model:  # forced: nothing to fall back from
        assert model.predict({"x": X}, {"strict": True})["y"].shape == (1, 3)


def test_a_call_that_forces_a_runtime_falls_back_as_opening_does(tmp_path):
    root = make_bundle(tmp_path, BOTH)
    linear_graph(root / "tdeploy/files/ort-cpu-fp32/model.onnx", -7 * WEIGHTS)
    with open_model(root) as model:
        assert model.decision.chosen.variant == "onnx-fp32"
        np.testing.assert_allclose(model.predict({"x": X}, runtime="ort-cpu")["y"], X @ WEIGHTS, rtol=1e-6)
        with pytest.raises(NoVariantError, match="was changed"):
            model.predict({"x": X}, runtime="ort-cpu", strict=True)
        with pytest.raises(NoVariantError, match="asked for: variant='ort-cpu-fp32'.*was changed"):
            model.predict({"x": X}, variant="ort-cpu-fp32")


def test_what_a_store_raises_for_a_forced_variant_is_an_error_of_this_package(tmp_path):
    root = make_bundle(tmp_path, BOTH)

    def fetch(variant):
        if variant.id == "onnx-fp32":
            raise ConnectionError("the store is down")

    def lose(variant_id):
        (root / f"tdeploy/files/{variant_id}/model.onnx").unlink()

    lose("onnx-fp32")
    with open_model(root, fetch=fetch) as model:
        with pytest.raises(NoVariantError, match="ConnectionError: the store is down"):
            model.predict({"x": X}, variant="onnx-fp32")
        linear_graph(root / "tdeploy/files/onnx-fp32/model.onnx")
        model.predict({"x": X}, variant="onnx-fp32")  # the store is up again


def test_a_call_whose_choice_is_open_does_not_wait_for_another_that_is_being_opened(tmp_path, monkeypatch):
    with open_model(make_bundle(tmp_path, BOTH)) as model, ThreadPoolExecutor(2) as pool:
        model.predict({"x": X}, strict=True)
        inside, go_on, original = threading.Event(), threading.Event(), OrtCpu.open

        def slow(*given):
            inside.set()
            assert go_on.wait(60)
            return original(*given)

        monkeypatch.setattr(OrtCpu, "open", slow)
        opening = pool.submit(model.predict, {"x": X}, variant="onnx-fp32")
        assert inside.wait(60)
        pool.submit(model.predict, {"x": X}, strict=True).result(30)
        go_on.set()
        opening.result(60)
