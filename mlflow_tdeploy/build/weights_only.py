"""Weights of four or eight bits by blocks, tables included: graphs of a fifth of the size.

Four bits hold a block of 32 numbers by 16 values between the least and the greatest of them (``MatMulNBits``), eight
bits one of 128. Rows of tables are unpacked as they are looked up (``GatherBlockQuantized``). See
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from mlflow_tdeploy.build.graphs import quiet, save_ir
from mlflow_tdeploy.build.quantize import BLOCK, INT8_LEVEL

#: Numbers of a channel, or of a table's row, that share a scale in four bits.
BLOCK_OF_FOUR = 32
#: Numbers of a table that is worth it.
_LARGE = 1 << 16


def tables(path: Path) -> tuple[str, ...]:
    """Return the names of the nodes that look up rows of a large table of weights, in the order of the graph."""
    model = onnx.load(path, load_external_data=False)
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2
        and tensor.data_type == onnx.TensorProto.FLOAT
        and tensor.dims[0] * tensor.dims[1] >= _LARGE
        and tensor.dims[1] % BLOCK_OF_FOUR == 0
    }
    axes = {"axis": 0}
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[0] in large
        and node.name
        and all(attribute.i == axes.get(attribute.name) for attribute in node.attribute)
    )


def quantize_weights(
    src: Path, dst: Path, *, four: Collection[str], eight: Collection[str] = (), external_data: bool | None = None
) -> None:
    """Write a graph with the weights of some nodes in four or eight bits.

    Args:
        src: A prepared fp32 graph, plain or fused.
        dst: The file to write.
        four: Names of products, and of what looks up tables, to have in four bits.
        eight: Names of products to have in eight.
        external_data: Force (True) or forbid (False) weights beside the graph.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

    settings: dict[str, Any] = {"accuracy_level": INT8_LEVEL, "op_types_to_quantize": ("MatMul", "Gather")}
    model = onnx.load(src)
    if eight:
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=8, **settings)
        model = _quantized(model, config, eight)
    if four:
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_OF_FOUR, is_symmetric=False, bits=4, **settings)
        model = _quantized(model, config, four)
    with tempfile.TemporaryDirectory(dir=src.parent) as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file, save_as_external_data=True)
        save_ir(ir.load(file), dst, external_data=external_data)


def _quantized(model: onnx.ModelProto, config: Any, nodes: Collection[str]) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    wanted = set(nodes)
    others = [
        node.name for node in model.graph.node if node.op_type in ("MatMul", "Gather") and node.name not in wanted
    ]
    with quiet(), np.errstate(divide="ignore", invalid="ignore"):  # rows of zeros have no scale, and need none
        quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=others)
        quantizer.process()
    model = quantizer.model.model
    model.ir_version = max(model.ir_version, 10)  # the first one with types of four bits
    return model
