"""What half precision cannot hold, looked for where a graph computes real inputs in fp32.

A CPU computes graphs in half precision in fp32, so that nothing of this shows when a variant is checked there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mlflow_tdeploy.build.observe import opened, with_outputs
from mlflow_tdeploy.core.errors import BuildError, first_line
from mlflow_tdeploy.core.tensors import Arrays

#: The largest number of half precision and the smallest with all of its digits.
MOST, LEAST = float(np.finfo(np.float16).max), float(np.finfo(np.float16).smallest_normal)
#: What comes later may be so many times as large as what was looked at.
MARGIN = 4.0
#: A negative constant beyond this masks; half of it and beyond, so does what was computed with it.
_MASKS = -1e4
_CONSTANTS = ("Constant", "ConstantOfShape")
#: What gives a mask on: operators that select, add, scale or move numbers.
_CARRIES = frozenset(
    ("Add", "Sub", "Mul", "Where", "Min", "Max", "Clip", "Cast", "Identity", "Neg", "Reshape", "Expand", "Squeeze",
     "Unsqueeze", "Transpose", "Slice", "Concat", "Gather", "GatherND", "ScatterND", "Tile", "Trilu", "Flatten")
)  # fmt: skip


@dataclass(frozen=True)
class Beyond:
    """What has to stay in fp32.

    Attributes:
        tensors: Largest magnitude of each tensor that half precision does not hold: too large, or all below the
            smallest number with all of its digits.
        nodes: Names of the nodes that make such a tensor, or take it.
    """

    tensors: Mapping[str, float] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()


def node_name(node: onnx.NodeProto, index: int) -> str:
    """Return the name of a node in a graph; one without gets one by its place."""
    return node.name or f"{node.op_type}_{index}"


def beyond_half(path: Path, batches: Sequence[Arrays]) -> Beyond:
    """Find what half precision does not hold: every output of every node, and all weights.

    Args:
        path: A graph in fp32; temporary files are written beside it.
        batches: Graph inputs; those that this graph does not have are left out.

    Raises:
        BuildError: The graph fails.
    """
    model = onnx.load(path, load_external_data=False)
    computed = _computed(path, model, batches)
    bad = {name: largest for name, largest in computed.items() if largest * MARGIN > MOST or 0 < largest < LEAST}
    bad |= _weights(path)
    nodes = tuple(
        node_name(node, index)
        for index, node in enumerate(model.graph.node)
        if bad.keys() & {*node.input, *node.output}
    )
    return Beyond(bad, nodes)


def _weights(path: Path) -> dict[str, float]:
    """Return the largest magnitude of each weight beyond half precision, which is what it is: without a margin.

    Single numbers are the business of rules, see ``build.half``.
    """
    model = onnx.load(path)
    weights = (one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT and math.prod(one.dims) > 1)
    found = {one.name: _largest(numpy_helper.to_array(one)) for one in weights}
    return {name: largest for name, largest in found.items() if largest > MOST or 0 < largest < LEAST}


def _largest(array: npt.NDArray[np.float32]) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


def _computed(path: Path, model: onnx.ModelProto, batches: Iterable[Arrays]) -> dict[str, float]:
    """Return the largest magnitude of each float that is computed, without numbers that only mask."""
    names = _floats(path, model)
    if not names:
        return {}
    session = opened(path, _with_extremes(model, names).SerializeToString(), as_it_is=True)
    masks = _masks(model.graph)
    takes = {value.name for value in session.get_inputs()}
    outputs = [output for index in range(len(names)) for output in _outputs(index)]
    largest = dict.fromkeys(names, 0.0)
    for feeds in batches:
        try:
            got = session.run(outputs, {name: one for name, one in feeds.items() if name in takes})
        except Exception as error:  # as ONNX Runtime says
            raise BuildError(f"The graph fails on data that its range is looked for on: {first_line(error)}") from error
        for name, low, high in zip(names, got[::2], got[1::2], strict=True):
            masked = masks.get(name, -math.inf)
            seen = [abs(float(one)) for one in (low, high) if np.isfinite(one) and one > masked]
            largest[name] = max([largest[name], *seen])
    return largest


def _floats(path: Path, model: onnx.ModelProto) -> list[str]:
    """Return the names of the floats that a graph computes: ONNX Runtime knows the types of its own operators, too."""
    names = dict.fromkeys(name for node in model.graph.node for name in node.output if name)
    session = opened(path, with_outputs(path, list(names)), as_it_is=True)
    return [one.name for one in session.get_outputs() if one.type == "tensor(float)"]


def _masks(graph: onnx.GraphProto) -> dict[str, float]:
    """Return the number from which on downwards numbers only mask, for each tensor that a mask gets into.

    A mask begins as a large negative constant and goes through what selects, adds or moves numbers.
    """
    found = {one.name: _mask_of(one) for one in graph.initializer}
    for node in graph.node:
        made = [_mask_of(one.t) for one in node.attribute if one.name == "value" and node.op_type in _CONSTANTS]
        taken = [found.get(name, -math.inf) for name in node.input] if node.op_type in _CARRIES else []
        found |= dict.fromkeys(node.output, max([*made, *taken], default=-math.inf))
    return {name: least for name, least in found.items() if least > -math.inf}


def _mask_of(constant: TensorProto) -> float:
    """Return from where on numbers mask that come of a constant; -inf for one that is no mask."""
    if constant.data_type != TensorProto.FLOAT or constant.data_location == TensorProto.EXTERNAL:
        return -math.inf
    if math.prod(constant.dims) != 1:
        return -math.inf
    value = float(numpy_helper.to_array(constant).reshape(-1)[0])
    return value / 2 if value < _MASKS else -math.inf


def _with_extremes(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a graph whose outputs are the least and the greatest number of each tensor."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    del graph.output[:]
    for index, name in enumerate(names):
        for kind, output in zip(("ReduceMin", "ReduceMax"), _outputs(index), strict=True):
            graph.node.append(helper.make_node(kind, [name], [output], keepdims=0))
            graph.output.append(helper.make_empty_tensor_value_info(output))
    return changed


def _outputs(index: int) -> tuple[str, str]:
    return f"tdeploy_least_{index}", f"tdeploy_greatest_{index}"
