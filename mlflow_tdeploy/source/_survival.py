"""Does ONNX Runtime survive opening a graph? Of some, it ends the process (1.31: some in half precision on a CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.source._onnx_signature import all_nodes, onnx_library

if TYPE_CHECKING:
    import onnx

#: Opens a graph as every session does; and how many seconds that may take.
_OPEN, _OPEN_S = (
    "import sys, onnxruntime as ort; ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])",
    600.0,
)


def deadly(path: Path) -> str:
    """Open a graph that computes in half precision somewhere in a child; return how that ends, or an empty text.

    Args:
        path: The graph; with external data beside it, if any.
    """
    if not _holds_half(onnx_library().load(path, load_external_data=False).graph):
        return ""
    done = probe.run_child(_OPEN, str(path), timeout=_OPEN_S)
    return done.reason if not done.ok and done.reason.startswith(probe.KILLED) else ""


def _holds_half(graph: onnx.GraphProto) -> bool:
    """Tell whether anything in a graph is fp16 or bf16: a weight, an input, an output, what a node makes."""
    types = onnx_library().TensorProto
    half = {types.FLOAT16, types.BFLOAT16}
    ends = (*graph.input, *graph.output, *graph.value_info)
    if any(one.data_type in half for one in graph.initializer):
        return True
    if any(one.type.tensor_type.elem_type in half for one in ends):
        return True
    attributes = (one for node in all_nodes(graph) for one in node.attribute)
    return any((one.name in ("to", "dtype") and one.i in half) or one.t.data_type in half for one in attributes)
