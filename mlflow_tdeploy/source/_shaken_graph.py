"""An ONNX graph asked once more with other roundings, as :mod:`mlflow_tdeploy.source._shaken` asks a module."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.source._onnx_signature import onnx_library

if TYPE_CHECKING:
    import onnx

#: How far off each number is that is computed: a few times what fp32 rounds by, as sums of many numbers are.
ROUNDING = 2.0**-21
#: What is added before numbers are chosen from: less than any epsilon, and enough to tell zeros apart.
LEAST = 2.0**-120
_CHOOSING = frozenset({"TopK", "ArgMax", "ArgMin"})
#: Where ONNX Runtime looks for weights beside a graph that it gets from memory.
_FOLDER = "session.model_external_initializers_file_folder_path"


class ShakenGraph:
    """A graph in fp32 with every result of its nodes off by as much as rounding might be.

    Args:
        path: The graph, whose weights may lie beside it.
        outputs: Names of its outputs.
    """

    def __init__(self, path: Path, outputs: Sequence[str]) -> None:
        self._path = path
        self._outputs = list(outputs)

    def __call__(self, feeds: Arrays, seed: int) -> Arrays:
        """Answer a request; the roundings are others at each call, whatever the seed."""
        del seed
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    @functools.cached_property
    def _session(self) -> Any:
        import onnxruntime

        model = onnx_library().load(self._path, load_external_data=False)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.add_session_config_entry(_FOLDER, str(self._path.parent))
        shaken = shake(model).SerializeToString()
        return onnxruntime.InferenceSession(shaken, settings, providers=["CPUExecutionProvider"])


def shake(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put a little noise behind each node of a graph whose results are fp32, and before those that choose by order.

    Whole numbers stay: they are exact. What branches compute inside of themselves stays as well.
    """
    library = onnx_library()
    model = library.shape_inference.infer_shapes(model)
    graph = model.graph
    found = (*graph.value_info, *graph.output)
    floats = {one.name for one in found if one.type.tensor_type.elem_type == library.TensorProto.FLOAT}
    inputs = {one.name for one in graph.input if one.type.tensor_type.elem_type == library.TensorProto.FLOAT}
    constants = {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type in _CHOOSING and node.input[0] in floats | inputs:
            told_apart = f"{node.input[0]}_told_apart_{len(nodes)}"
            nodes += _told_apart(node.input[0], told_apart, len(nodes))
            node.input[0] = told_apart
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in floats - constants:
                node.output[place] = f"{name}_computed"
                nodes += _off(node.output[place], name, len(nodes))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _off(value: str, name: str, seed: int) -> Iterable[Any]:
    """Multiply a value by nearly 1, where it is no whole number."""
    make = onnx_library().helper.make_node
    yield make("RandomUniformLike", [value], [f"{name}_by"], low=1 - ROUNDING, high=1 + ROUNDING, seed=float(seed))
    yield make("Mul", [value, f"{name}_by"], [f"{name}_off"])
    yield make("Floor", [value], [f"{name}_floor"])
    yield make("Equal", [value, f"{name}_floor"], [f"{name}_whole"])
    yield make("Where", [f"{name}_whole", value, f"{name}_off"], [name])


def _told_apart(value: str, name: str, seed: int) -> Iterable[Any]:
    """Add next to nothing to a value, and multiply it by nearly 1."""
    make = onnx_library().helper.make_node
    yield make("RandomUniformLike", [value], [f"{name}_by"], low=1 - ROUNDING, high=1 + ROUNDING, seed=float(seed))
    yield make("Mul", [value, f"{name}_by"], [f"{name}_off"])
    yield make("RandomUniformLike", [value], [f"{name}_more"], low=0.0, high=LEAST, seed=float(seed + 1))
    yield make("Add", [f"{name}_off", f"{name}_more"], [name])
