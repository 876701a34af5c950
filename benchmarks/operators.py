"""Where the time of a graph goes, operator by operator, as ONNX Runtime's profiler tells it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.variant import Variant

#: Operators that multiply by weights; attention multiplies twice besides.
PRODUCTS = (
    "MatMul", "FusedMatMul", "Gemm", "Attention", "QAttention", "MatMulInteger", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "MatMulNBits",
)  # fmt: skip


def profile(path: Path, variant: Variant, batches: Sequence[Mapping[str, Any]], rounds: int) -> Counter[str]:
    """Return milliseconds by operator for all batches once, on one thread: the median round of several.

    Args:
        path: The graph.
        variant: Its record, for what the session must not do.
        batches: Inputs; those that the graph does not have are left out.
        rounds: How often.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = 1, True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"],
            disabled_optimizers=list(variant.session.get("disabled_optimizers", ())),
        )  # fmt: skip
        names = {one.name for one in session.get_inputs()}
        for _ in range(rounds + 1):  # the first one allocates
            for feeds in batches:
                session.run(None, {name: array for name, array in feeds.items() if name in names})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _median(events, len(batches), rounds)


def _median(events: Sequence[Mapping[str, Any]], per_round: int, rounds: int) -> Counter[str]:
    """Return the time of each operator in the median round; a run's kernels end before the run does."""
    of_run: list[Counter[str]] = []
    current: Counter[str] = Counter()
    for event in events:
        name = str(event.get("name", ""))
        if name.endswith("_kernel_time"):
            current[event["args"]["op_name"]] += event["dur"] / 1000
        elif name == "model_run":
            of_run.append(current)
            current = Counter()
    of_round = [sum(of_run[at : at + per_round], Counter()) for at in range(0, len(of_run), per_round)][1 : rounds + 1]
    kinds = {kind for one in of_round for kind in one}
    return Counter({kind: float(np.median([one[kind] for one in of_round])) for kind in kinds})
