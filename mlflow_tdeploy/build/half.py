"""Half precision: an fp32 ONNX file in, an fp16 one out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mlflow_tdeploy.build.graphs import op_counts, quiet, save_ir
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.made_up import is_mask

#: Operators that stay fp32 in an fp16 graph besides the converter's own list: they sum or square many values.
FP32_OPS = ("CumSum", "Pow", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare")
_FP32_AFTER = ("Add", "Clip", "Max", "Reciprocal", "Sqrt")  # … and these while they only finish such a sum

#: The smallest normal number of half precision: below it digits are lost, and the converter makes 1e-7 of an epsilon.
_SMALLEST = 2.0**-14
#: What the converter makes of larger constants: a mask's -3e38 must stay finite, with a score added to it, too.
LARGEST = 1e4
#: A constant of more numbers is a weight.
_MOST_NUMBERS = 1 << 16
_SHIFTING = ("Add", "Div", "Mul", "Sub")
_MOVING = (
    *("Cast", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split"),
    *("Squeeze", "Transpose", "Unsqueeze"),
)
#: What goes on with a sum, a root, an extreme.
_FINISHING = (*_SHIFTING, "Abs", "Clip", "Max", "Min", "Pow", "Reciprocal", "Sqrt")
#: What brings into range by itself, by what comes in or by what the model has learned.
_NORMALIZING = (
    *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization"),
    *("MeanVarianceNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
)
_DECIDING = ("Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Round")
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
_RECURRENT = {"GRU", "LSTM", "RNN"}
_FLOAT, _FLOAT16 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.FLOAT16)


def to_fp16(src: Path, dst: Path, *, keep_nodes: Collection[str] = ()) -> None:
    """Convert a graph to fp16; its inputs and outputs stay as they are, and so do operators that overflow.

    Args:
        src: An fp32 graph.
        dst: The file to write.
        keep_nodes: Names of nodes to leave in fp32.

    Raises:
        BuildError: The graph has recurrent layers.
    """
    from onnxruntime.transformers import float16

    if recurrent := sorted(_RECURRENT & set(op_counts(src))):
        raise BuildError(
            f"The graph has {' and '.join(recurrent)}, which ONNX Runtime does not compute in half precision: it ends "
            f"the process that opens such a graph."
        )
    with tempfile.TemporaryDirectory(dir=src.parent) as folder:
        shaped = Path(folder) / "model.onnx"
        onnx.shape_inference.infer_shapes_path(str(src), str(shaped))
        model = onnx.load(shaped, load_external_data=False)
    onnx.load_external_data_for_model(model, str(src.parent))
    _name_constants(model.graph)
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *FP32_OPS, "IsInf"]  # of which opset 10 knows no half precision
    kept = {
        *keep_nodes,
        *_finishing_nodes(model),
        *_nodes_on_extreme_constants(model.graph),
        *_nodes_that_bring_into_range(model.graph),
        *(node.name for node, _ in _branching(model.graph)),
    }
    kept |= {node.name for node in model.graph.node if node.op_type in blocked}
    with quiet():
        half = float16.convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=blocked,
            node_block_list=sorted(kept),
            max_finite_val=LARGEST,  # a mask's -3e38 must not become -inf once a score is added
        )
        _drop_repeated_casts(half.graph)
        _cast_captured(half.graph)
        converted = ir.serde.deserialize_model(half)
        _join_fp32_neighbours(converted, kept)
        converted.graph.sort()  # the converter leaves casts at the end, and what takes them before
        save_ir(converted, dst)


def _name_constants(graph: onnx.GraphProto) -> None:
    """Let outputs that are weights (anchors) come from a node: the converter would declare them twice."""
    outputs = {value.name for value in graph.output}
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= outputs | {weight.name for weight in graph.initializer} | {value.name for value in graph.input}
    for weight in graph.initializer:
        if weight.name in outputs:
            name = weight.name
            weight.name = next(
                new for new in (f"{name}_constant_{index}" for index in range(len(taken) + 1)) if new not in taken
            )
            for node in graph.node:
                node.input[:] = [weight.name if one == name else one for one in node.input]
            graph.node.append(onnx.helper.make_node("Identity", [weight.name], [name], name=f"{name}_output"))


def _drop_repeated_casts(graph: onnx.GraphProto) -> None:
    """Remove casts that are there twice: the converter writes one per fp32 node, named after the value it casts."""
    seen: set[str] = set()
    kept = []
    for node in graph.node:
        if node.op_type != "Cast" or node.output[0] not in seen:
            kept.append(node)
        seen.update(node.output)
    del graph.node[:]
    graph.node.extend(kept)


def _finishing_nodes(model: onnx.ModelProto) -> list[str]:
    """Name the nodes that carry a large sum to its root or clip; nodes without a name get one."""
    large: set[str] = set()
    names = []
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type in FP32_OPS:
            large.update(node.output)
        elif node.op_type in _FP32_AFTER and large & set(node.input):
            names.append(node.name)
            if node.op_type in ("Add", "Max"):
                large.update(node.output)
    return names


def _small_constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Return a graph's constants of floats by name, without its weights."""
    constants = {one.name: one for one in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    }
    return {
        name: onnx.numpy_helper.to_array(tensor)
        for name, tensor in constants.items()
        if tensor.data_type == _FLOAT and math.prod(tensor.dims) <= _MOST_NUMBERS
    }


def _nodes_that_bring_into_range(graph: onnx.GraphProto) -> set[str]:
    """Name the nodes that shift and scale what comes in (``(x - mean) / std``), and what only moves it before them.

    Incomes and pixels of 16 bits may be more than half precision holds, whatever the example has. Masks are not. Nor
    does it tell whole numbers beyond 2048 apart: what becomes one, is compared or goes out as it came stays as it is.
    """
    incoming = _Incoming(graph)
    for node in graph.node:
        incoming.take(node)
    return incoming.found


class _Incoming:
    """Follows what comes into a graph, and what is computed of it, until it is in range.

    Args:
        graph: The graph; its nodes are taken in their order.

    Attributes:
        found: Names of the nodes that have to compute with it as it is.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        weights = {one.name for one in graph.initializer}
        self._raw = {one.name for one in graph.input if not is_mask(one.name)} - weights
        self._statistics: set[str] = set()  # sums, roots, extremes of it, by which it is shifted or scaled
        constants = _small_constants(graph).items()
        masking = {name for name, array in constants if array.size == 1 and (array < -LARGEST).any()}
        self._shifts = {name for name, _ in constants} - masking
        self._constants = {name for name, _ in constants} | weights
        self._outputs = {value.name for value in graph.output}
        self._makers: dict[str, Any] = {}
        self.found: set[str] = set()

    def take(self, node: onnx.NodeProto) -> None:
        """Look at the next node."""
        taken = {one for one in node.input if one}
        raw, combined = self._raw & taken, node.op_type in _SHIFTING
        shifted = combined and len(raw) == len(self._shifts & taken) == 1
        scaled = combined and bool(raw) and bool(self._statistics & taken)
        moved = node.op_type in _MOVING and node.input[0] in raw
        moved |= node.op_type == "Concat" and bool(raw) and taken <= self._raw | self._constants
        if shifted or moved or (scaled and node.op_type in ("Add", "Sub")):
            self._follow(node, self._raw)
        elif not scaled and self._makes_a_statistic(node, taken):
            self._follow(node, self._statistics)
        normal = node.op_type in _NORMALIZING and node.input[0] in raw
        goes_out = moved and bool(self._outputs & set(node.output))
        if shifted or scaled or normal or goes_out or (raw and _decides(node)):
            _add_with_makers(node, self._makers, self.found)

    def _follow(self, node: onnx.NodeProto, kind: set[str]) -> None:
        kind.update(node.output)
        self._makers |= dict.fromkeys(node.output, node)

    def _makes_a_statistic(self, node: onnx.NodeProto, taken: set[str]) -> bool:
        """Tell whether a node sums, squares or chooses of what comes in, or goes on with what did."""
        if node.op_type.startswith("Reduce"):
            return node.input[0] in self._raw | self._statistics
        if node.op_type in ("Mul", "Pow") and self._raw & taken:  # squares
            return taken <= self._raw | self._constants
        if node.op_type in _MOVING:
            return node.input[0] in self._statistics
        return (
            node.op_type in _FINISHING
            and bool(self._statistics & taken)
            and taken <= self._statistics | self._constants
        )


def _decides(node: onnx.NodeProto) -> bool:
    """Tell whether a node makes another thing of a number that is a little off, such as a place in a table."""
    kinds = (one.i for one in node.attribute if one.name == "to")
    return node.op_type in _DECIDING or (node.op_type == "Cast" and not set(kinds) & _FLOATS)


def _add_with_makers(node: onnx.NodeProto, makers: Mapping[str, Any], found: set[str]) -> None:
    """Note a node, and those that have moved or shifted what it takes."""
    waiting = [node]
    while waiting:
        if (one := waiting.pop()).name not in found:
            found.add(one.name)
            waiting += [makers[name] for name in one.input if name in makers]


def _nodes_on_extreme_constants(graph: onnx.GraphProto) -> list[str]:
    """Name the nodes that take numbers half precision has not, and those that take what nodes on tiny ones give.

    Tiny ones are epsilons, of whatever shape; large ones are scales (``x / 32768``) and values. What masks with a large
    negative number (``(1 - mask) * -1e9``) is no such: any will do, and that one in fp32 would be -inf in fp16. All
    nodes have names, see :func:`_finishing_nodes`.
    """
    arrays = _small_constants(graph)
    tiny = {name for name, array in arrays.items() if 0 < np.abs(array).max(initial=0) < _SMALLEST}
    large = {name for name, array in arrays.items() if (array > LARGEST).any() and np.isfinite(array).all()}
    first = [node for node in graph.node if tiny & set(node.input)]
    made = {name for node in first for name in node.output}
    after = [node for node in graph.node if made & set(node.input)]
    scaled = [node for node in graph.node if large & set(node.input)]
    return [node.name for node in (*first, *after, *scaled)]


def _join_fp32_neighbours(model: ir.Model, kept: Collection[str]) -> None:
    """Remove the trip through fp16 that the converter puts between two nodes that both stay fp32.

    The same before a node that takes an input of the graph: what it scales (``x / 65535``) may be more than fp16 holds.

    Args:
        model: The converted graph.
        kept: Names of the nodes that stay fp32.
    """
    for back in list(model.graph):
        there = back.inputs[0].producer() if back.op_type == "Cast" and back.inputs[0] is not None else None
        if there is None or there.op_type != "Cast" or (_cast_to(back), _cast_to(there)) != (_FLOAT, _FLOAT16):
            continue
        source = there.inputs[0]
        producer = source.producer() if source is not None else None
        if source is not None and (source.is_graph_input() if producer is None else producer.name in kept):
            # what is no fp32 (whole numbers, places), or not known to be, needs that cast; a graph's output its name
            if back.outputs[0].is_graph_output() or source.dtype != ir.DataType.FLOAT:
                back.replace_input_with(0, source)
            else:
                back.outputs[0].replace_all_uses_with(source)
    passes.RemoveUnusedNodesPass()(model)


def _cast_to(node: ir.Node) -> int:
    return int(node.attributes["to"].as_int())


def _branching(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, list[onnx.GraphProto]]]:
    """Yield the nodes that hold graphs of their own (If, Loop, Scan), with these."""
    for node in graph.node:
        inner = [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else []) + list(a.graphs)]
        if inner:
            yield node, inner


def _cast_captured(graph: onnx.GraphProto) -> None:
    """Give branches, which stay fp32, an fp32 copy of every value around them that became fp16."""
    half = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == _FLOAT16}
    half |= {tensor.name for tensor in graph.initializer if tensor.data_type == _FLOAT16}
    for node, inner in list(_branching(graph)):
        for name in sorted(half & set().union(*map(_captured, inner))):
            copy = f"{name}_as_fp32"
            if all(copy not in other.output for other in graph.node):
                cast = onnx.helper.make_node("Cast", [name], [copy], name=copy, to=_FLOAT)
                graph.node.insert(list(graph.node).index(node), cast)
            for branch in inner:
                _rename(branch, name, copy)


def _captured(graph: onnx.GraphProto) -> set[str]:
    """Name what a branch takes from around it."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    found = {value.name for value in graph.output}
    for node in graph.node:
        own |= set(node.output)
        found |= set(node.input)
    for _, inner in _branching(graph):
        found |= set().union(*map(_captured, inner))
    return found - own


def _rename(graph: onnx.GraphProto, name: str, to: str) -> None:
    """Take ``to`` from around a branch wherever it took ``name``."""
    if name not in _captured(graph):
        return
    for node in graph.node:
        for index, taken in enumerate(node.input):
            if taken == name:
                node.input[index] = to
    for value in graph.output:
        if value.name == name:
            value.name = to
    for _, inner in _branching(graph):
        for branch in inner:
            _rename(branch, name, to)
