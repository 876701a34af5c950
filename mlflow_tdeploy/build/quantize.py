"""From an fp32 graph to int8, file to file: matrix products by channels, by blocks, or not at all.

*By channels*: a scale for each output channel of a weight, and one for all activations of a run, found while running
(ONNX Runtime's dynamic quantization). The fastest, and the least exact: one large number takes from all others what
tells them apart. *By blocks*: a scale for each block of a weight's channel, and one for each block of a row of
activations (``com.microsoft.MatMulNBits`` with ``accuracy_level`` 4,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from mlflow_tdeploy.build.graphs import op_counts, quiet, save_ir
from mlflow_tdeploy.core.errors import BuildError

#: Matrix products are worth int8. Embedding tables are not: rows are only copied, and their rounding would be all loss.
INT8_OPS = ("Attention", "Gemm", "MatMul")
#: Numbers of a weight's channel that share a scale, where a product is quantized by blocks. ONNX Runtime has 16 to 256;
#: fewer are more exact and slower.
BLOCK = 128
#: ``accuracy_level`` of products that compute in int8.
INT8_LEVEL = 4


def quantize_dynamic_int8(
    src: Path,
    dst: Path,
    *,
    per_channel: bool = True,
    exclude_nodes: Collection[str] = (),
    op_types: Collection[str] = INT8_OPS,
    external_data: bool | None = None,
) -> None:
    """Quantize the weights of matrix products to signed int8; activations are quantized while running.

    Args:
        src: An fp32 graph, plain or fused.
        dst: The file to write.
        per_channel: One scale per output channel instead of one per weight.
        exclude_nodes: Names of nodes to leave in fp32.
        op_types: Operators to quantize.
        external_data: Force (True) or forbid (False) weights beside the graph.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not set(op_counts(src)) & set(op_types):
        raise BuildError(f"There is nothing to quantize: the graph has none of {', '.join(sorted(op_types))}.")
    with _without_weight_shapes(src) as bare, tempfile.TemporaryDirectory(dir=src.parent) as folder, quiet():
        file = Path(folder) / "model.onnx"
        quantize_dynamic(
            bare,
            file,
            op_types_to_quantize=list(op_types),
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(exclude_nodes),
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        save_ir(ir.load(file), dst, external_data=external_data)


@contextlib.contextmanager
def _without_weight_shapes(src: Path) -> Iterator[Path]:
    """Yield a temporary graph beside ``src``, on the same weights, that does not repeat their shapes.

    The quantizer transposes the weights of a Gemm and keeps the shapes written elsewhere in the graph: a conflict.
    """
    model = onnx.load(src, load_external_data=False)
    _drop_weight_shapes(model)
    with tempfile.NamedTemporaryFile(dir=src.parent, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        yield Path(file.name)


def _drop_weight_shapes(model: onnx.ModelProto) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)


def products(path: Path) -> tuple[str, ...]:
    """Return the names of the matrix products whose weights can be quantized, in the order of the graph.

    Raises:
        BuildError: Two of them have one name, or one has none: see :func:`prepare`.
    """
    return names_of(path, _products(onnx.load(path, load_external_data=False)))


def names_of(path: Path, nodes: Iterable[onnx.NodeProto]) -> tuple[str, ...]:
    """Return the names of nodes of a graph.

    Raises:
        BuildError: Two of them have one name, or one has none: see :func:`prepare`.
    """
    names = tuple(node.name for node in nodes)
    if "" in names or len(set(names)) < len(names):
        raise BuildError(f"Nodes of '{path.name}' have no names of their own.")
    return names


def prepare(src: Path, dst: Path) -> None:
    """Write a graph whose products and look-ups have names of their own; what was a ``Gemm`` is a ``MatMul``.

    The quantizer does the second by itself, and what it was told of a ``Gemm`` is lost.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = onnx.load(src)
    _drop_weight_shapes(model)
    with tempfile.TemporaryDirectory(dir=src.parent) as folder, quiet():
        changed = ONNXModel(model)
        changed.replace_gemm_with_matmul()
        _name(changed.model)
        changed.save_model_to_file(str(Path(folder) / "model.onnx"), use_external_data_format=True)
        save_ir(ir.load(Path(folder) / "model.onnx"), dst)


def _name(model: onnx.ModelProto) -> None:
    taken = Counter(node.name for node in model.graph.node)
    tables = [node for node in model.graph.node if node.op_type == "Gather"]
    for index, node in enumerate([*_products(model), *tables]):
        if not node.name or taken[node.name] > 1:
            base = f"{node.op_type}_{index}"
            node.name = next(name for n in range(len(taken) + 1) if (name := base + "_" * n) not in taken)
            taken[node.name] += 1


def _products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    weights = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
    return [
        node for node in model.graph.node if node.op_type in ("Attention", "MatMul") and weights & {*node.input[1:2]}
    ]


def quantize_mixed(
    src: Path, dst: Path, *, blocks: Collection[str] = (), kept: Collection[str] = (), external_data: bool | None = None
) -> None:
    """Quantize matrix products by channels, but for some by blocks, and some not at all.

    Args:
        src: An fp32 graph, plain or fused, that was prepared.
        dst: The file to write.
        blocks: Names of products to quantize by blocks.
        kept: Names of products that stay in fp32.
        external_data: Force (True) or forbid (False) weights beside the graph.
    """
    rest = set(products(src)) - {*blocks, *kept}
    with tempfile.TemporaryDirectory(dir=src.parent) as folder:
        by_blocks = Path(folder) / "blocks.onnx"
        if blocks:
            _quantize_blocks(src, by_blocks, blocks)
        if rest:
            quantize_dynamic_int8(
                by_blocks if blocks else src, dst, exclude_nodes={*blocks, *kept}, external_data=external_data
            )
        else:
            save_ir(ir.load(by_blocks if blocks else src), dst, external_data=external_data)


def weighted_products(path: Path) -> Iterator[tuple[str, str, npt.NDArray[np.float32]]]:
    """Yield the matrix products of a prepared graph whose weights are a matrix.

    Yields:
        Name, name of its input, and weights ``[input channels, output channels]``.
    """
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    for node in _products(model):
        if node.input[1] in tensors:
            yield node.name, node.input[0], numpy_helper.to_array(tensors[node.input[1]])


def can_be_blocks(path: Path) -> frozenset[str]:
    """Return the names of those matrix products that can be quantized by blocks."""
    model = onnx.load(path, load_external_data=False)
    flat = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return frozenset(node.name for node in _products(model) if node.op_type == "MatMul" and node.input[1] in flat)


def _quantize_blocks(src: Path, dst: Path, nodes: Collection[str]) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = onnx.load(src)
    others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in set(nodes)]
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_LEVEL, bits=8)
    with quiet():
        quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=others)
        quantizer.process()
        quantizer.model.save_model_to_file(str(dst), use_external_data_format=True)
