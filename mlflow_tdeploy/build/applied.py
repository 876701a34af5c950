"""What became of each product of a graph, read back from the graph itself: what was asked for is not what is there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

_log = logging.getLogger("mlflow_tdeploy")

#: Ends that quantizers give the names of what they make.
_ENDS = ("_quant", "_Q4", "_Q8")
FP32, FP16, CHANNELS, STATIC, STATIC_FP8 = "fp32", "fp16", "int8", "int8, static", "fp8, static"
_BLOCKS = "int{bits}, blocks of {block}"
#: Forms of weights as they lie in a graph, and what they are called.
_FLOATS: dict[int, str] = {TensorProto.FLOAT: FP32, TensorProto.FLOAT16: FP16, TensorProto.BFLOAT16: "bf16"}
_FEW_BITS: dict[int, str] = {
    TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.INT4: "int4", TensorProto.UINT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
}  # fmt: skip
#: What lies between weights and who takes them.
_BETWEEN = ("Transpose", "Reshape", "Cast")


def blocks(bits: int, block: int) -> str:
    """Return the form of a product by blocks."""
    return _BLOCKS.format(bits=bits, block=block)


def applied(path: Path) -> dict[str, str]:
    """Return the form of every product with weights, by the name that it had before: ``fp32``, ``int8`` and so on."""
    model = onnx.load(path, load_external_data=False)
    graph = _Taken(
        {tensor.name: tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) >= 2},
        {name: node for node in model.graph.node for name in node.output},
    )
    found: dict[str, str] = {}
    for node in model.graph.node:
        if (form := _form(node, graph)) is not None:
            end = next((end for end in _ENDS if node.name.endswith(end)), "")
            found[node.name.removesuffix(end)] = form
    return found


@dataclass(frozen=True)
class _Taken:
    """What nodes of a graph take.

    Attributes:
        weights: Types of weights, by name.
        made_by: Who makes what is none.
    """

    weights: Mapping[str, int]
    made_by: Mapping[str, onnx.NodeProto]

    def behind(self, name: str) -> tuple[onnx.NodeProto | None, str]:
        """Return who makes a tensor, and its name, past what only turns or casts it."""
        while (node := self.made_by.get(name)) is not None and node.op_type in _BETWEEN:
            name = node.input[0]
        return node, name


def _form(node: onnx.NodeProto, graph: _Taken) -> str | None:
    settings = _numbers(node)
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return blocks(settings.get("bits", 4), settings["block_size"])
    if node.op_type in ("MatMulInteger", "QAttention", "DynamicQuantizeMatMul", "ConvInteger"):
        return CHANNELS if node.input[1] in graph.weights else None
    if node.op_type not in ("MatMul", "Gemm", "Conv", "Attention") or len(node.input) < 2:
        return None
    held, name = graph.behind(node.input[1])
    if held is None:
        cast = graph.made_by.get(node.input[1])
        kind = _numbers(cast).get("to") if cast is not None and cast.op_type == "Cast" else graph.weights.get(name)
        return _FLOATS.get(kind or 0) if name in graph.weights else None
    if held.op_type != "DequantizeLinear" or (few := _FEW_BITS.get(graph.weights.get(held.input[0], 0))) is None:
        return None
    if (block := _numbers(held).get("block_size", 0)) > 0:
        return blocks(int(few.removeprefix("int")), block)
    other, _ = graph.behind(node.input[0])
    return f"{few}, static" if other is not None and other.op_type == "DequantizeLinear" else f"{few} weights"


def _numbers(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def read_back(path: Path, asked: Mapping[str, str]) -> dict[str, Any]:
    """Return what a record says of a graph's products: what became of each, and which are not what was asked for.

    A quantizer leaves out what it does not know, such as packed attention with a bias, and says nothing.

    Args:
        path: The graph.
        asked: Name of a product → its form.
    """
    return compared(asked, applied(path))


def compared(asked: Mapping[str, str], found: Mapping[str, str]) -> dict[str, Any]:
    """Return what a record says of products, or layers, whose forms were read back; see :func:`read_back`."""
    products = {name: found.get(name, "not there") for name in asked}
    differing = {name: form for name, form in asked.items() if products[name] != form}
    if differing:
        name, form = next(iter(differing.items()))
        _log.warning(
            "%d products are not what was asked for: '%s' was to be %s, and is %s in the graph.",
            len(differing), name, form, products[name],
        )  # fmt: skip
    return {"products": products, **({"not_as_asked": differing} if differing else {})}
