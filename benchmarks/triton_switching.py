"""Versions updated and rolled back under load: which one answered is read from the answers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.report import Figure

#: Requests to answer while versions are switched.
REQUESTS_GOAL = 10_000


def switching(target: Any, work: Path, longest: float, *, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Update and roll back ten times each under load; which version answered is read from the answers."""
    factors = {1: 1.0, 2: 2.0}
    for version, factor in factors.items():
        target.deploy(*_small(work, version, factor))
    answers: Counter[float] = Counter()
    failures: list[str] = []
    early: list[float] = []
    verified = set(factors.values())
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                got = target.client.infer("small", {"x": np.ones((1, 4), np.float32)})["y"]
                factor = round(float(got[0, 0] / _BASE), 3)
                answers[factor] += 1
                if factor not in verified:
                    early.append(factor)
            except Exception as error:
                failures.append(str(error))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    begin, switches = time.monotonic(), 0
    try:
        for index in range(2 if quick else 10):
            version = index + 3
            what, settings = _small(work, version, float(version))
            seen = _watching(target, lambda factor=float(version): verified.add(factor))
            seen.deploy(what, settings)
            target.rollback("small")
            target.rollback("small", version)
            switches += 3
        while sum(answers.values()) < REQUESTS_GOAL and time.monotonic() - begin < longest and not quick:
            time.sleep(0.2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    total = sum(answers.values())
    figures = [
        Figure("switching under load: requests", total, "", float(REQUESTS_GOAL), "at least", f"{switches} switches"),
        Figure("switching under load: failed", len(failures), "", 0.0),
        Figure("answers from a version before its golden requests passed", len(early), "", 0.0),
    ]
    return figures, {"answers": {str(key): value for key, value in answers.items()}, "failures": failures[:5]}


_BASE = float((np.ones((1, 4), np.float32) @ (np.arange(12, dtype=np.float32).reshape(4, 3) / 10))[0, 0])


def small_graph(factor: float) -> Any:
    """Return a graph of one matrix product, told by its answers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.arange(12, dtype=np.float32).reshape(4, 3) / 10 * np.float32(factor)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _watching(target: Any, passed: Any) -> Any:
    """Return the same target, telling when a version's golden requests have passed."""
    from mlflow_tdeploy.deploy.apply import Deployments

    return Deployments(target.client, target.files, on_step=lambda step: passed() if step == "switch" else None)


def _small(work: Path, version: int, factor: float) -> tuple[Any, Any]:
    """Return a version of a model of one matrix product, told by its answers."""
    from mlflow_tdeploy.deploy.apply import Settings
    from mlflow_tdeploy.store.bundle import Bundle
    from mlflow_tdeploy.triton.bundle_version import BundleVersion, triton_runtime

    folder = work / "small" / str(version)
    if not folder.exists():
        import mlflow_tdeploy

        with peers.quiet():
            mlflow_tdeploy.save_model(small_graph(factor), folder, precisions=["fp32"])
    bundle = Bundle.open(folder)
    variant = bundle.variants["onnx-fp32"]
    return BundleVersion("small", version, {}, bundle, variant, triton_runtime(variant)), Settings(grace=0.5)
