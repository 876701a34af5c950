"""What an ONNX graph says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from mlflow_tdeploy.build.graphs import op_counts, opset_and_ir
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.hardware import installed_version
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.source import _onnx_signature

#: First ONNX Runtime release that runs an opset and reads an IR version
#: (https://onnxruntime.ai/docs/reference/compatibility.html).
_OPSET_RUNTIME = {18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23"}
_IR_RUNTIME = {9: "1.15", 10: "1.18", 11: "1.23"}
#: First one that has products of 8 bits by blocks on a CPU.
_BLOCKS_OF_8 = "1.22"
#: First one that looks up rows of tables of 4 bits.
_TABLES_OF_4 = "1.20"
_OLDEST = "1.14"
#: What the tables do not know yet: whoever can open it here had this one.
_NEWER = ".".join((installed_version("onnxruntime", "onnxruntime-gpu") or "1.31").split(".")[:2])

_DTYPES = {
    TensorProto.BOOL: "bool", TensorProto.INT8: "int8", TensorProto.UINT8: "uint8", TensorProto.INT16: "int16",
    TensorProto.UINT16: "uint16", TensorProto.INT32: "int32", TensorProto.UINT32: "uint32", TensorProto.INT64: "int64",
    TensorProto.UINT64: "uint64", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64",
}  # fmt: skip


def requirements(path: Path) -> dict[str, str]:
    """Return the versions a graph needs: opset, IR version and the least ONNX Runtime."""
    opset, ir_version = opset_and_ir(path)
    nodes = onnx.load(path, load_external_data=False).graph.node
    by_blocks = (one for node in nodes if node.op_type == "MatMulNBits" for one in node.attribute)
    own = [_BLOCKS_OF_8] if any(one.name == "bits" and one.i == 8 for one in by_blocks) else []
    own += [_TABLES_OF_4] if any(node.op_type == "GatherBlockQuantized" for node in nodes) else []
    needed = (_least(_OPSET_RUNTIME, opset), _least(_IR_RUNTIME, ir_version), *own)
    oldest = max(needed, key=lambda version: tuple(map(int, version.split("."))))
    return {"opset": str(opset), "ir_version": str(ir_version), "onnxruntime": oldest}


def precision_of(path: Path) -> Precision:
    """Return the precision of a graph that somebody else made, as its id was made from."""
    return _onnx_signature.precision_of(onnx.load(path, load_external_data=False))


def is_portable(path: Path) -> bool:
    """Tell whether a graph uses the standard operators only."""
    return not any("." in name for name in op_counts(path))


def differing_dtypes(path: Path, signature: Signature) -> Mapping[str, str]:
    """Return the graph's dtype of every tensor whose dtype is not the signature's.

    Raises:
        InvalidInputError: The graph lacks a tensor of the signature, or one has a type that is not supported.
    """
    graph = onnx.load(path, load_external_data=False).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    differing: dict[str, Any] = {}
    for spec in (*signature.inputs, *signature.outputs):
        if spec.name not in found:
            raise InvalidInputError(
                f"The graph '{path.name}' has no tensor '{spec.name}', which the signature has. It has: "
                f"{', '.join(found)}. All variants of a model take and return tensors of the same names."
            )
        dtype = _DTYPES.get(found[spec.name])
        if dtype is None:
            raise InvalidInputError(f"The tensor '{spec.name}' of '{path.name}' has a type that is not supported.")
        if dtype != spec.dtype:
            differing[spec.name] = dtype
    return differing


def _least(table: Mapping[int, str], version: int) -> str:
    newer = [needed for known, needed in table.items() if known >= version]
    if version < min(table):
        return _OLDEST
    return newer[0] if newer else _NEWER
