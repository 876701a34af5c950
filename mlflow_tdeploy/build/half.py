"""Half precision: an fp32 ONNX file in, an fp16 one out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mlflow_tdeploy.build.graphs import op_counts, quiet, save_ir
from mlflow_tdeploy.build.half_range import node_name
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.core.made_up import is_mask
from mlflow_tdeploy.core.variant import LAYOUT_OPTIMIZERS

#: Operators that stay fp32 in an fp16 graph besides the converter's own list: they sum or square many values.
FP32_OPS = ("CumSum", "Pow", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare")
_FP32_AFTER = ("Add", "Clip", "Div", "Max", "Reciprocal", "Sqrt")  # … and these while they only finish such a sum

#: The smallest normal number of half precision: below it digits are lost, and the converter makes 1e-7 of an epsilon.
_SMALLEST = 2.0**-14
#: What the converter makes of larger constants: a mask's -3e38 must stay finite, with a score added to it, too.
LARGEST = 1e4
#: A constant of more numbers is a weight.
_MOST_NUMBERS = 1 << 16
#: With weights these are what half precision is for.
_PRODUCTS = (
    *("Attention", "Conv", "ConvTranspose", "DeformConv", "Einsum", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm"),
    *("GroupQueryAttention", "MatMul", "MultiHeadAttention"),
)
_ABOUT_SHAPES = ("ConstantOfShape", "EyeLike", "Shape", "Size")
#: What brings anything into range, by what comes in or by what the model has learned, or makes places and truth of it.
_ENDING = (
    *("And", "ArgMax", "ArgMin", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"),
    *("NonZero", "Not", "OneHot", "Or", "Sign", "Xor"),
    *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization"),
    *("MeanVarianceNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    *("EmbedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    *("Cos", "Erf", "HardSigmoid", "LogSoftmax", "Sigmoid", "Sin", "Softmax", "Softsign", "Tanh"),
)
#: What only shifts, scales or moves.
_SHAPING = (
    *("Abs", "Add", "Cast", "Clip", "Div", "Exp", "Expand", "Flatten", "Gather", "Identity", "Log", "Max", "Min"),
    *("Mul", "Neg", "Pow", "Reciprocal", "Relu", "Reshape", "Slice", "Softplus", "Split", "Sqrt", "Squeeze", "Sub"),
    *("Concat", "Transpose", "Unsqueeze", "Where"),
)
#: Optimizers that sessions of graphs in half precision do without: on those of torch's TransformerEncoder ONNX Runtime
#: (1.31) ends the process.
NOT_IN_HALF = LAYOUT_OPTIMIZERS
#: What asks exactly: an angle that is a quarter off is another one.
_EXACT = ("Cos", "Sin")
_FLOATS = {
    *(onnx.TensorProto.UNDEFINED, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16),
    *(onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16),
}
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
        *_nodes_before_weights(model.graph),
        *_nodes_after_weights(model.graph),
        *_nodes_of_places(model.graph),
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
        forget_types(converted)
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
        node.name = node_name(node, index)
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


def _nodes_before_weights(graph: onnx.GraphProto) -> set[str]:
    """Name the nodes that compute with what comes in, until it meets weights or is in range by what is computed.

    Incomes, prices and pixels of 16 bits may be more than half precision holds, whatever the example has; nor does it
    tell whole numbers beyond 2048 apart, or what is looked up, compared or goes out as it came. So it is kept from
    them as it is from the elementwise operators in mixed precision (torch.amp's rule: the widest type wins), which
    costs nothing where weights come first, as in transformers and convolutions. Masks are not followed.
    """
    values = (*graph.input, *graph.value_info, *graph.output)
    whole = {value.name for value in values if value.type.tensor_type.elem_type not in _FLOATS}
    raw = {one.name for one in graph.input if not is_mask(one.name)} - {one.name for one in graph.initializer}
    # what comes of a large number is as large: a mask times 1e9, say
    raw |= {name for name, array in _small_constants(graph).items() if _is_large(array)}
    found: set[str] = set()
    captured = {node.name: set().union(*map(_captured, inner)) for node, inner in _branching(graph)}
    for node in graph.node:
        taken = {one for one in node.input if one} | captured.get(node.name, set())
        if not raw & taken or node.op_type in _ABOUT_SHAPES:
            continue
        made = set() if node.op_type in _ENDING else set(node.output)
        if raw & taken <= whole and node.op_type != "Cast":
            raw |= made & whole  # a number that is no whole one comes of a table: they are places in it
        elif node.op_type not in _PRODUCTS or taken <= raw:
            found.add(node.name)
            raw |= made
    return found


def _nodes_after_weights(graph: onnx.GraphProto) -> set[str]:
    """Name the nodes that bring what a model has computed into the range of its answers (``y * 9 + 1013``, ``exp``)."""
    makers = {name: node for node in graph.node for name in node.output}
    constants = {one.name for one in graph.initializer}
    constants |= {name for name, node in makers.items() if node.op_type == "Constant"}
    waiting = [(makers[value.name], 0) for value in graph.output if value.name in makers]
    found: dict[str, int] = {}  # by how many sums at least
    while waiting:
        node, sums = waiting.pop()
        computed = [one for one in node.input if one and one not in constants]
        sums += len(computed) > 1 and node.op_type in ("Add", "Sub")
        # many in a row are a model's residuals
        if node.op_type in _SHAPING and sums < min(2, found.get(node.name, 2)):
            found[node.name] = sums
            waiting += [(makers[one], sums) for one in computed if one in makers]
    return set(found)


def _nodes_of_places(graph: onnx.GraphProto) -> set[str]:
    """Name the nodes that make angles of places (rotary embeddings), or other whole numbers (buckets of distances).

    Half precision tells places beyond 2048 apart by twos, and their angles long before; torch's models compute them in
    fp32 whatever they are in. What weights or other numbers that come in have a part in is none of these.
    """
    makers = {name: node for node in graph.node for name in node.output}
    heavy = {one.name for one in graph.initializer if math.prod(one.dims) > _MOST_NUMBERS}
    heavy |= {one.name for one in graph.input if one.type.tensor_type.elem_type in _FLOATS}
    heavy |= {name for name, array in _small_constants(graph).items() if (array < -LARGEST).any()}  # of masks
    found: set[str] = set()
    for sink in graph.node:
        if sink.op_type not in _EXACT and not _makes_whole(sink):
            continue
        before, waiting = dict[str, onnx.NodeProto](), [sink]
        while waiting:
            node = waiting.pop()
            if node.name not in before:
                before[node.name] = node
                if node.op_type not in _ABOUT_SHAPES:
                    waiting += [makers[name] for name in node.input if name in makers]
        computing = {name: node for name, node in before.items() if node.op_type not in _ABOUT_SHAPES}
        if not heavy & {name for node in computing.values() for name in node.input}:
            found |= computing.keys()
    return found


def _makes_whole(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and {one.i for one in node.attribute if one.name == "to"}.isdisjoint(_FLOATS)


def _nodes_on_extreme_constants(graph: onnx.GraphProto) -> list[str]:
    """Name the nodes that take numbers half precision has not, and those that take what nodes on tiny ones give.

    Tiny ones are epsilons, of whatever shape; large ones are scales (``x / 32768``) and values. What masks with a large
    negative number (``(1 - mask) * -1e9``) is no such: any will do, and that one in fp32 would be -inf in fp16. All
    nodes have names, see :func:`_finishing_nodes`.
    """
    arrays = _small_constants(graph)
    tiny = {name for name, array in arrays.items() if 0 < np.abs(array).max(initial=0) < _SMALLEST}
    large = {name for name, array in arrays.items() if _is_large(array)}
    first = [node for node in graph.node if tiny & set(node.input)]
    made = {name for node in first for name in node.output}
    after = [node for node in graph.node if made & set(node.input)]
    scaled = [node for node in graph.node if large & set(node.input)]
    return [node.name for node in (*first, *after, *scaled)]


def _is_large(array: np.ndarray) -> bool:
    """Tell whether an array has a number that half precision has not, and that stands for itself."""
    return bool((array > LARGEST).any() and np.isfinite(array).all())


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


def forget_types(model: ir.Model) -> None:
    """Leave out what was known of values on the way: it was true of the graph before."""
    outputs = set(model.graph.outputs)
    for weight in model.graph.initializers.values():
        if weight.const_value is not None:
            weight.type = ir.TensorType(weight.const_value.dtype)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.type = value.shape = None


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
