"""The files an ONNX graph consists of."""

from __future__ import annotations

import posixpath
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mlflow_tdeploy.core.errors import (
    ConflictError,
    IntegrityError,
    MissingDependencyError,
    NotFoundError,
    TDeployError,
)
from mlflow_tdeploy.store.disk import storage_errors
from mlflow_tdeploy.store.layout import safe_path

if TYPE_CHECKING:
    import onnx


def external_files(model_path: Path) -> tuple[str, ...]:
    """Return the names of the external data files of a graph, relative to its folder, sorted.

    Tensors are looked for everywhere a graph may hold one: initializers, attributes, subgraphs, functions,
    training graphs.

    Raises:
        NotFoundError: There is no such file.
        IntegrityError: It is no ONNX graph, or it refers to a file outside its own folder.
        MissingDependencyError: The package ``onnx`` is not installed.
    """
    model = _load(Path(model_path))
    locations = {_location(tensor) for tensor in _tensors(model) if tensor.external_data}
    return tuple(sorted(_checked(Path(model_path), location) for location in locations))


def copy_graph(src: Path, dst_dir: Path, name: str = "model.onnx") -> tuple[str, ...]:
    """Copy a graph and its external data into a folder; data files keep their names, as the graph holds these.

    Returns:
        The names written, relative to ``dst_dir``, the graph first.

    Raises:
        NotFoundError: There is no such graph.
        IntegrityError: It is damaged, or an external data file is missing or outside its folder.
        ConflictError: A file of that name is in ``dst_dir`` already.
        StorageError: The disk is full or refuses.
    """
    src, dst_dir = Path(src), Path(dst_dir)
    data = external_files(src)
    pairs = [(src, name)] + [(safe_path(src.parent, file), file) for file in data]
    for source, file in pairs:
        if not source.is_file():
            raise IntegrityError(f"The graph '{src}' needs its external data file '{file}', which is missing.")
        if (dst_dir / file).exists() or [name, *data].count(file) > 1:
            raise ConflictError(f"Cannot copy '{source}' to '{dst_dir / file}': that name is taken.")
    with storage_errors(f"copy the graph '{src}' to '{dst_dir}'"):
        for source, file in pairs:
            target = safe_path(dst_dir, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)  # no link: whoever exports to the old name again would change this one
    return tuple(file for _, file in pairs)


def _onnx() -> ModuleType:
    try:
        import onnx  # of the build extra: serving does without
    except ImportError:
        raise MissingDependencyError(
            "onnx", "Reading the structure of an ONNX graph", "pip install 'mlflow-tdeploy[build]'"
        ) from None
    return onnx


def _load(path: Path) -> onnx.ModelProto:
    library = _onnx()
    if not path.is_file():
        raise NotFoundError(f"There is no ONNX graph at '{path}'.")
    try:
        model: onnx.ModelProto = library.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's own classes differ between its implementations
        raise IntegrityError(f"'{path}' is not an ONNX graph or is damaged ({error}). Export it again.") from error
    if not model.HasField("graph"):
        raise IntegrityError(f"'{path}' is not an ONNX graph: it holds none. Export it again.")
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [model.graph]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
    for graph in graphs:
        yield from _graph_tensors(graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        yield from _attribute_tensors(function.attribute_proto)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(graph)


def _location(tensor: onnx.TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _checked(model_path: Path, location: str) -> str:
    plain = location if ".." in location.split("/") else posixpath.normpath(location)  # './x' is usual and harmless
    try:
        safe_path(model_path.parent, plain)
    except TDeployError as error:
        raise IntegrityError(f"The graph '{model_path}' refers to external data at {location!r}: {error}") from error
    return plain
