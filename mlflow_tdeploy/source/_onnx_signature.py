"""What an ONNX graph says of itself: names, dtypes, dimensions, precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError, NotFoundError, first_line
from mlflow_tdeploy.core.precision import PRECISIONS, Precision
from mlflow_tdeploy.core.tensors import DTYPES, Dim, TensorSpec
from mlflow_tdeploy.source._shapes import BATCH, FREE, identifier
from mlflow_tdeploy.store.external_data import external_files
from mlflow_tdeploy.store.layout import safe_path

if TYPE_CHECKING:
    import onnx

#: Operators behind which a table keeps its rows, and an index its value.
_PASSING = ("Cast", "Identity", "DequantizeLinear", "Unsqueeze", "Squeeze", "Reshape", "Flatten")
#: Operators that look rows up: which input is the table, and which the index.
_LOOKUPS = {"Gather": ((0, 1),), "GatherBlockQuantized": ((0, 1),), "EmbedLayerNormalization": ((2, 0), (4, 1))}
_RENAMED = {"float": "float32", "double": "float64"}
#: Parts of the names of operators that take or make quantized activations; DequantizeLinear alone is of weights.
_INT8_ACTIVATIONS = ("QuantizeLinear", "DynamicQuantize", "Integer", "QLinear", "QAttention", "QGemm")
#: Bytes of weights up to which a graph in memory is written as one file; a file holds 2 GiB at most.
ONE_FILE = 1 << 30
_FLOATS = ("fp64", "fp32", "bf16", "fp16")
#: A type counts as the weights' when it holds this share of them: embedding tables often stay in a higher one.
_SHARE = 0.1


@dataclass(frozen=True)
class GraphFacts:
    """A graph's inputs and outputs as they are written in it.

    Attributes:
        path: Its file.
        inputs: Inputs without those that are weights; axes are named by dimension.
        outputs: Outputs; an output without a shape is left out of ``outputs`` and named in ``shapeless``.
        shapeless: Outputs whose shape is not written in the graph, with their dtype.
        precision: One of :data:`PRECISIONS`.
        standard: Whether it has standard ONNX operators only.
        tables: For inputs that are looked up in tables of the graph, such as token ids: rows of the smallest one.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapeless: tuple[tuple[str, str], ...]
    precision: str
    standard: bool
    tables: Mapping[str, int] = field(default_factory=dict)

    @property
    def variant_id(self) -> str:
        """A variant's id for a graph that was given without one."""
        return f"{'onnx' if self.standard else 'ort'}-{self.precision}"


def read_graph(path: Path) -> GraphFacts:
    """Read a graph's structure without its external weights, and check that these are there.

    Raises:
        NotFoundError: There is no such file, or an external data file is missing.
        IntegrityError: It is no ONNX graph, or it refers to files outside its folder.
        InvalidInputError: It has inputs or outputs that are no tensors of numbers.
    """
    library = onnx_library()
    for file in external_files(path):
        if not safe_path(path.parent, file).is_file():
            raise NotFoundError(
                f"The graph '{path.name}' keeps weights in '{file}', which is not beside it. Copy it there."
            )
    model = library.load(str(path), load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    specs = [_spec(value) for value in model.graph.input if value.name not in weights]
    if without := next((name for name, _, shape in specs if shape is None), None):
        raise InvalidInputError(f"The graph's input '{without}' has no shape. Export it with named dimensions.")
    outputs = [_spec(value) for value in model.graph.output]
    return GraphFacts(
        path,
        tuple(TensorSpec(name, dtype, shape or ()) for name, dtype, shape in specs),
        tuple(TensorSpec(name, dtype, shape) for name, dtype, shape in outputs if shape is not None),
        tuple((name, dtype) for name, dtype, shape in outputs if shape is None),
        precision_of(model).name,
        all(node.domain in ("", "ai.onnx") for node in model.graph.node),
        _tables(model.graph, {name for name, _, _ in specs}),
    )


def _tables(graph: onnx.GraphProto, inputs: Collection[str]) -> dict[str, int]:
    """Return, for inputs that index rows of a weight, how many rows the smallest one has."""
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    origin, found = {name: name for name in inputs}, dict[str, int]()
    for node in graph.node:
        if node.op_type in _PASSING and node.output:
            for known in (rows, origin):
                if node.input[0] in known:
                    known[node.output[0]] = known[node.input[0]]
        for data, indices in _LOOKUPS.get(node.op_type, ()):
            if max(data, indices) >= len(node.input) or _axis(node) != 0:
                continue
            size, name = rows.get(node.input[data]), origin.get(node.input[indices])
            if size is not None and name is not None:
                found[name] = min(size, found.get(name, size))
    return found


def _axis(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name in ("axis", "gather_axis")), 0)


def default_dims(inputs: Iterable[TensorSpec]) -> list[Dim]:
    """Return the dimensions that inputs name, each with a usual range."""
    names = dict.fromkeys(size for spec in inputs for size in spec.shape if isinstance(size, str))
    return [Dim(name, *(BATCH if name.lower().startswith("batch") else FREE)) for name in names]


def onnx_library() -> ModuleType:
    """Import onnx.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import onnx as library
    except ImportError:
        raise MissingDependencyError("onnx", "Logging an ONNX graph", "pip install 'mlflow-tdeploy[build]'") from None
    return library


def write_proto(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph that is in memory; weights that one file cannot hold go beside it.

    Raises:
        InvalidInputError: Its weights are not in memory, or it cannot be written.
    """
    library = onnx_library()
    if any(tensor.data_location == library.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise InvalidInputError(
            "This ModelProto refers to weights in files, and does not know where they are. Pass the graph's path."
        )
    size = sum(len(tensor.raw_data) + 4 * len(tensor.float_data) for tensor in model.graph.initializer)
    try:
        if size < ONE_FILE:
            library.save(model, str(path))
            return
        import onnx_ir  # writes external data without changing the caller's object

        onnx_ir.save(onnx_ir.from_proto(model), path, external_data=f"{path.name}.data")
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"This ModelProto cannot be written: {first_line(error)}") from error


def _spec(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[str | int, ...] | None]:
    kind = value.type.tensor_type
    raw = onnx_library().TensorProto.DataType.Name(kind.elem_type).lower() if value.type.HasField("tensor_type") else ""
    dtype = _RENAMED.get(raw, raw)
    if dtype not in DTYPES:
        raise InvalidInputError(
            f"The graph's '{value.name}' is {raw or 'no tensor'}: inputs and outputs must be tensors of "
            f"{', '.join(DTYPES)}. {_without(raw)}"
        )
    if not kind.HasField("shape"):
        return value.name, dtype, None
    return (
        value.name,
        dtype,
        tuple(axis_name(value.name, i, d.dim_param or d.dim_value) for i, d in enumerate(kind.shape.dim)),
    )


def _without(kind: str) -> str:
    """Say how such a graph is usually made without that."""
    if kind:
        return "A classifier of scikit-learn returns numbers where it was fitted on numbers: encode its labels first."
    return "skl2onnx leaves the maps out with options={'zipmap': False}."


def axis_name(tensor: str, axis: int, size: str | int | None) -> str | int:
    """Return an axis' dimension or fixed size; an unnamed axis 0 is the batch."""
    if isinstance(size, int) and size > 0:  # old exporters write 0 and -1 for "any"
        return size
    if isinstance(size, str) and size:
        return identifier(size)
    return "batch" if axis == 0 else identifier(f"{tensor}_{axis}")


def precision_of(model: onnx.ModelProto) -> Precision:
    """Return the precision of a graph that somebody else made, read from its weights and operators."""
    kinds = _weight_kinds()
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if kind := kinds.get(tensor.data_type):
            sizes[kind] += math.prod(tensor.dims)
    total = sum(sizes.values())
    floats = [kind for kind in PRECISIONS if sizes[kind] and kind in _FLOATS]
    activations = max(floats, key=lambda kind: sizes[kind], default="fp32")
    weights = next((kind for kind in reversed(PRECISIONS) if sizes[kind] > _SHARE * total), "fp32")
    if any(part in node.op_type for node in _nodes(model.graph) for part in _INT8_ACTIVATIONS):
        return Precision("int8" if weights in _FLOATS else weights, "int8")
    return Precision(weights, activations)


def _weight_kinds() -> dict[int, str]:
    types = onnx_library().TensorProto
    return {
        types.DOUBLE: "fp64", types.FLOAT: "fp32", types.BFLOAT16: "bf16", types.FLOAT16: "fp16",
        types.INT8: "int8", types.UINT8: "int8", types.FLOAT8E4M3FN: "fp8", types.FLOAT8E5M2: "fp8",
        types.INT4: "int4", types.UINT4: "int4",
    }  # fmt: skip


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
