"""Graphs that came with Q/DQ from elsewhere, in the form that runtimes compute in eight bits.

Exporters leave weights in fp32 before a QuantizeLinear, transpose them afterwards, and share what rounds one tensor
among all who take it. ONNX Runtime runs none of that in eight bits, and the file is as large as before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mlflow_tdeploy.build.graphs import save_ir

#: Of a layer that is computed several times nodes have its name, and a number after this.
AGAIN = "#"
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def layer_of(node: str) -> str:
    """Return the name of the layer that a node has the name of."""
    return node.partition(AGAIN)[0]


def rounded(path: Path) -> tuple[str, ...]:
    """Return the names of the nodes that take something rounded, in the order of the graph."""
    model = ir.load(path)
    return tuple(node.name for node in model.graph if node.name and any(map(_is_rounded, node.inputs)))


def finish(
    src: Path,
    dst: Path,
    *,
    kept: Collection[str] = (),
    originals: Path | None = None,
    external_data: bool | None = None,
) -> None:
    """Write a graph with integer weights, a pair for each who takes one, and nothing around some nodes.

    Args:
        src: A graph with pairs of QuantizeLinear and DequantizeLinear.
        dst: The file to write.
        kept: Names of layers whose inputs shall not be rounded, see :func:`layer_of`.
        originals: The graph it was made of, whose nodes have the same names: where weights are integers already, theirs
            are taken for what is kept.
        external_data: Force (True) or forbid (False) weights beside the graph.
    """
    model = ir.load(src)
    weights = _weights_of(originals, kept) if originals is not None else {}
    for node in [one for one in model.graph if layer_of(one.name or "") in kept]:
        for index, value in enumerate(node.inputs):
            if (whole := _unrounded(value)) is not None:
                node.replace_input_with(index, whole)
            elif _is_rounded(value) and (array := weights.get((node.name or "", index))) is not None:
                node.replace_input_with(index, _initializer(model.graph, f"{node.name}_weight", array))
    _turn_weights(model.graph)
    _take_pairs_apart(model.graph)
    _round_weights(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    save_ir(model, dst, external_data=external_data)


def _is_rounded(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose":
        return _array(node.inputs[0]) is None and _is_rounded(node.inputs[0]) and _unrounded_weight(node)
    return node is not None and node.op_type == _DEQUANTIZE


def _unrounded_weight(node: ir.Node) -> bool:
    """Tell whether what is transposed is a weight that was rounded."""
    last = node.inputs[0].producer() if node.inputs[0] is not None else None
    first = last.inputs[0].producer() if last is not None and last.inputs[0] is not None else None
    return first is None or _array(first.inputs[0]) is not None


def _weights_of(path: Path, nodes: Collection[str]) -> dict[tuple[str, int], npt.NDArray[Any]]:
    """Return the weights that nodes of a graph take, by node and place."""
    taken = (
        (node.name or "", at, value) for node in ir.load(path).graph if node.name in nodes
        for at, value in enumerate(node.inputs)
    )  # fmt: skip
    return {(name, at): array for name, at, value in taken if (array := _array(value)) is not None}


def _unrounded(value: ir.Value | None) -> ir.Value | None:
    """Return what a rounded value was, through the transposition of a weight; None for one that is not rounded."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "Transpose":
        if (whole := _unrounded(node.inputs[0])) is None or _array(whole) is None:
            return None
        node.replace_input_with(0, whole)
        return value
    quantizer = node.inputs[0].producer() if node.op_type == _DEQUANTIZE and node.inputs[0] is not None else None
    return quantizer.inputs[0] if quantizer is not None and quantizer.op_type == _QUANTIZE else None


def _array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return the numbers of a weight; None for what is none."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, ir.Value]]:
    """Yield what rounds, as it lies in the graph: QuantizeLinear, a DequantizeLinear that takes it, what it rounds."""
    for node in list(graph):
        if node.op_type == _DEQUANTIZE and node.inputs[0] is not None:
            before = node.inputs[0].producer()
            if before is not None and before.op_type == _QUANTIZE and before.inputs[0] is not None:
                yield before, node, before.inputs[0]


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 1


def _turn_weights(graph: ir.Graph) -> None:
    """Transpose matrices before they are rounded, where that is all that becomes of them, or of what they become."""
    known = {last.outputs[0]: (first, last, weight) for first, last, weight in pairs(graph)}
    for node in list(graph):
        if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        if source is not None and (array := _array(source)) is not None and array.ndim == 2:
            node.outputs[0].replace_all_uses_with(_initializer(graph, f"{source.name}_transposed", array.T))
        elif source in known:
            first, last, weight = known[source]
            if (array := _array(weight)) is None or array.ndim != 2:
                continue
            value = _initializer(graph, f"{weight.name}_transposed", array.T)
            for part in (first, last):
                value = _copied(graph, part, value, before=node, axis=1 - _axis(first) % 2)
            node.outputs[0].replace_all_uses_with(value)


def _take_pairs_apart(graph: ir.Graph) -> None:
    """Give everyone who takes a rounded value a pair of their own."""
    for first, last, rounded in pairs(graph):
        if _array(rounded) is not None:
            continue
        for user, index in list(last.outputs[0].uses())[1:]:
            value = rounded
            for part in (first, last):
                value = _copied(graph, part, value, before=user)
            user.replace_input_with(index, value)


def _copied(graph: ir.Graph, node: ir.Node, value: ir.Value, *, before: ir.Node, axis: int | None = None) -> ir.Value:
    attributes = [one for one in node.attributes.values() if axis is None or one.name != "axis"]
    if axis is not None:
        attributes.append(ir.AttrInt64("axis", axis))
    new = ir.Node(
        node.domain, node.op_type, [value, *node.inputs[1:]], attributes, name=f"{node.name}_of_{before.name}"
    )
    new.outputs[0].name = f"{new.name}_output"
    graph.insert_before(before, new)
    return new.outputs[0]


def _round_weights(graph: ir.Graph) -> None:
    """Put integers where weights are rounded when a session opens."""
    for first, last, weight in pairs(graph):
        array, scale = _array(weight), _array(first.inputs[1])
        zero = _array(first.inputs[2]) if len(first.inputs) > 2 else np.zeros((), np.uint8)
        if array is None or scale is None or zero is None:
            continue
        at = _along(_axis(first), array.ndim)
        last.replace_input_with(0, _initializer(graph, f"{weight.name}_quantized", _rounded_to(array, at, scale, zero)))


def _rounded_to(
    array: npt.NDArray[Any], at: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], scale: Any, zero: Any
) -> npt.NDArray[Any]:
    """Do what QuantizeLinear does, to integers or to floats of eight bits: to the nearest, ends for what is beyond."""
    import ml_dtypes  # onnx_ir's own

    steps, whole = array / at(scale), zero.dtype.kind in "iu"
    limits: Any = np.iinfo(zero.dtype) if whole else ml_dtypes.finfo(zero.dtype)
    steps = np.rint(steps) + at(zero.astype(np.float32)) if whole else steps
    return np.clip(steps, float(limits.min), float(limits.max)).astype(zero.dtype)


def _along(axis: int, ndim: int) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """Return what lays numbers of channels along an axis; a single number stays as it is."""

    def laid(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return numbers.reshape([-1 if at == axis % ndim else 1 for at in range(ndim)]) if numbers.ndim else numbers

    return laid


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    taken = graph.initializers
    new = next(tried for n in range(len(taken) + 1) if (tried := name if not n else f"{name}_{n}") not in taken)
    value = ir.Value(
        name=new, const_value=ir.Tensor(np.ascontiguousarray(array), name=new), shape=ir.Shape(array.shape)
    )
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value
