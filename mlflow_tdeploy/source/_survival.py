"""Does ONNX Runtime survive opening a graph? Of some, it ends the process (1.31: some in half precision on a CPU)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.source._onnx_signature import onnx_library

if TYPE_CHECKING:
    import onnx

#: Attributes of operators that say which type they make.
_TYPES = ("to", "dtype", "output_dtype", "stash_type")
#: Opens a graph as every session does; and how many seconds that may take.
_OPEN, _OPEN_S = (
    "import sys, onnxruntime as ort; "
    "ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'], disabled_optimizers=sys.argv[2:] or None)",
    600.0,
)


def deadly(path: Path, without: Iterable[str] = ()) -> str:
    """Open a graph that computes in half precision somewhere in a child; return how that ends, or an empty text.

    Args:
        path: The graph; with external data beside it, if any.
        without: ONNX Runtime's optimizers that sessions of it do without.
    """
    model = onnx_library().load(path, load_external_data=False)
    inside = [node for function in model.functions for node in function.node]
    if not (_holds_half(model.graph) or _make_half(inside)):
        return ""
    done = probe.run_child(_OPEN, str(path), *without, timeout=_OPEN_S)
    return done.reason if not done.ok and done.reason.startswith(probe.KILLED) else ""


def _holds_half(graph: onnx.GraphProto) -> bool:
    """Tell whether anything in a graph is fp16 or bf16: a weight, an input, an output, what a node makes."""
    half, ends = _half(), (*graph.input, *graph.output, *graph.value_info)
    weights = (*graph.initializer, *(one.values for one in graph.sparse_initializer))
    if any(one.data_type in half for one in weights) or any(one.type.tensor_type.elem_type in half for one in ends):
        return True
    return _make_half(graph.node)


def _make_half(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Tell whether nodes, or graphs within them, make anything that is fp16 or bf16."""
    half = _half()
    for attribute in (one for node in nodes for one in node.attribute):
        if attribute.i in half and attribute.name in _TYPES:
            return True
        if attribute.t.data_type in half or (attribute.HasField("g") and _holds_half(attribute.g)):
            return True
    return False


def _half() -> set[int]:
    types = onnx_library().TensorProto
    return {types.FLOAT16, types.BFLOAT16}
