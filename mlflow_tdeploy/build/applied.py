"""What became of each product of a graph, read back from the graph itself: what was asked for is not what is there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

_log = logging.getLogger("mlflow_tdeploy")

#: Ends that quantizers give the names of what they make.
_ENDS = ("_quant", "_Q4", "_Q8")
FP32, CHANNELS, STATIC = "fp32", "int8", "int8, static"
_BLOCKS = "int{bits}, blocks of {block}"


def blocks(bits: int, block: int) -> str:
    """Return the form of a product by blocks."""
    return _BLOCKS.format(bits=bits, block=block)


def applied(path: Path) -> dict[str, str]:
    """Return the form of every product with weights, by the name that it had before: ``fp32``, ``int8`` and so on."""
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) >= 2}
    made_by = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if (form := _form(node, weights, made_by)) is not None:
            end = next((end for end in _ENDS if node.name.endswith(end)), "")
            found[node.name.removesuffix(end)] = form
    return found


def _form(node: onnx.NodeProto, weights: set[str], made_by: Mapping[str, onnx.NodeProto]) -> str | None:
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return blocks(settings.get("bits", 4), settings["block_size"])
    if node.op_type in ("MatMulInteger", "QAttention", "DynamicQuantizeMatMul", "ConvInteger"):
        return CHANNELS if node.input[1] in weights else None
    if node.op_type not in ("MatMul", "Gemm", "Conv", "Attention") or len(node.input) < 2:
        return None
    if node.input[1] in weights:
        return FP32
    pair = [made_by[name].op_type for name in node.input[:2] if name in made_by]
    held = made_by.get(node.input[1])
    return STATIC if pair == ["DequantizeLinear"] * 2 and held is not None and held.input[0] in weights else None


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
