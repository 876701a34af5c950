"""Attention with relative positions as one operator of ONNX Runtime, beside the operators apart: does it pay?

``python -m benchmarks.attention`` prints and writes JSON. Scores have a bias of each pair of tokens: the same for every
text (MPNet, Swin), or each text's own (DeBERTa-v2, XLNet). ``com.microsoft.MultiHeadAttention`` takes it as
``attention_bias``. Where that is no faster than MatMul, Mul, Add, Softmax and MatMul, a fusion of them has nothing to
give on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.report import Figure, Results, finish, summarize
from mlflow_tdeploy.core.hardware import usable_cores
from mlflow_tdeploy.core.measure import interleave, ratio

RESULTS = Path(__file__).parent / "results" / "attention.json"
#: (rows, tokens, heads, units of each): texts, and the windows of an image.
_SHAPES = ((1, 16, 12, 64), (1, 128, 12, 64), (8, 32, 12, 64), (8, 128, 12, 64), (64, 49, 3, 32), (64, 49, 12, 32))
_PAUSE = 0.005


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rounds; writes no JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args(arguments)
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for threads, own, shape in itertools.product(sorted({1, usable_cores()}), (False, True), _SHAPES):
        samples = measure(shape, threads, own=own, rounds=3 if options.quick else 60)
        bias = "a bias of each text" if own else "one bias"
        name = f"{' x '.join(map(str, shape))}, {bias}, {threads} thread{'s' * (threads > 1)}"
        figures.append(Figure(f"{name}: apart beside one operator", ratio(samples, "apart", "one"), "x"))
        details[name] = summarize(samples)
    results = Results()
    results.add("attention", figures, details)
    return finish(results, options.out, quick=options.quick)


def measure(shape: tuple[int, int, int, int], threads: int, *, own: bool, rounds: int) -> dict[str, list[float]]:
    """Return seconds of both ways, whose answers are the same.

    Args:
        shape: Rows, tokens, heads, and units of each head.
        threads: Of each session.
        own: Whether each row has a bias of its own.
        rounds: Calls of each.
    """
    batch, tokens, heads, width = shape
    random = np.random.default_rng(0)
    feeds = {name: random.normal(size=(batch, tokens, heads * width)).astype(np.float32) for name in "qkv"}
    feeds["relative"] = random.normal(size=(batch if own else 1, heads, tokens, tokens)).astype(np.float32)
    feeds["mask"] = np.zeros((batch, 1, 1, tokens), np.float32)
    sessions = {"apart": _session(_apart(heads, width), threads), "one": _session(_one(heads), threads)}
    answers = [session.run(None, feeds)[0] for session in sessions.values()]
    np.testing.assert_allclose(*answers, atol=1e-4)
    calls = {name: lambda session=session: session.run(None, feeds) for name, session in sessions.items()}
    return interleave(calls, rounds=rounds, warmup=3, pause=_PAUSE, lead=1)


def _session(parts: tuple[list[Any], list[Any]], threads: int) -> Any:
    nodes, weights = parts
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*"qkv", "relative", "mask")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "attention", inputs, [output], weights)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # each as it is written
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _apart(heads: int, width: int) -> tuple[list[Any], list[Any]]:
    nodes: list[onnx.NodeProto] = []
    for name in "qkv":
        turned = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Reshape", [name, "heads"], [f"{name}_heads"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_heads"], [f"{name}_turned"], perm=turned))
    nodes += [
        helper.make_node("MatMul", ["q_turned", "k_turned"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "relative"], ["placed"]),
        helper.make_node("Add", ["placed", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v_turned"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "whole"], ["y"]),
    ]
    weights = {
        "heads": np.array([0, 0, heads, width]), "whole": np.array([0, 0, heads * width]),
        "scale": np.array(width**-0.5, np.float32),
    }  # fmt: skip
    return nodes, [numpy_helper.from_array(array, name) for name, array in weights.items()]


def _one(heads: int) -> tuple[list[Any], list[Any]]:
    fused = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v", "", "", "bias"], ["y"], domain="com.microsoft", num_heads=heads
    )
    return [helper.make_node("Add", ["relative", "mask"], ["bias"]), fused], []


if __name__ == "__main__":
    raise SystemExit(main())
