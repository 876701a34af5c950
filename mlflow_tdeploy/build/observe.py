"""What tensors of a graph hold while it answers."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlflow_tdeploy.core.errors import BuildError, first_line
from mlflow_tdeploy.core.tensors import Arrays

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
#: Tensors that are fetched at once, of each batch: all of a large model's would take its memory many times.
_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class Seen:
    """A tensor in one batch, its last axis taken as channels and all others as rows.

    Attributes:
        low: Least number of each channel ``[channels]``.
        high: Greatest one ``[channels]``.
        rows: Some of its rows ``[rows, channels]``, spread evenly.
    """

    low: Floats
    high: Floats
    rows: Floats

    @property
    def is_finite(self) -> bool:
        """Whether all of it is: else it has no range."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())


def observe(
    path: Path, names: Sequence[str], batches: Sequence[Arrays], see: Callable[[Floats], T]
) -> Iterator[tuple[str, list[T]]]:
    """Yield what is seen of tensors of a graph, one entry for each batch.

    Args:
        path: The graph; temporary files are written beside it.
        names: Float tensors of it, each once.
        batches: Graph inputs; those that this graph does not have are left out.
        see: What to keep of a tensor in one batch: all of them would take the memory of many models.

    Raises:
        BuildError: The graph fails.
    """
    session = opened(path, with_outputs(path, names))
    takes = {value.name for value in session.get_inputs()}
    remaining = iter(names)
    while group := list(itertools.islice(remaining, _AT_ONCE)):
        seen: dict[str, list[T]] = {name: [] for name in group}
        for feeds in batches:
            try:
                got = session.run(group, {name: array for name, array in feeds.items() if name in takes})
            except Exception as error:  # as ONNX Runtime says
                raise BuildError(f"The graph fails on data it is calibrated with: {first_line(error)}") from error
            for name, array in zip(group, got, strict=True):
                if array.size:
                    seen[name].append(see(array))
        yield from seen.items()


def opened(path: Path, changed: bytes, *, as_it_is: bool = False) -> Any:
    """Return a session of a graph that was changed to be looked at, beside whose file its weights lie.

    Args:
        path: The graph; a temporary file is written beside it.
        changed: What became of it.
        as_it_is: Whether nothing is optimized.

    Raises:
        BuildError: It cannot be opened.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    if as_it_is:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        file.write(changed)
        file.flush()
        try:
            return ort.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as ONNX Runtime says
            raise BuildError(f"The graph cannot be opened to look at what it computes: {first_line(error)}") from error


def with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """Return a graph that gives out some of its tensors, too."""
    import onnx  # what only names calibrators needs none

    model = onnx.load(path, load_external_data=False)
    have = {value.name for value in model.graph.output}
    for name in names:
        if name not in have:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return bytes(model.SerializeToString())


def by_channel(array: Floats, most: int) -> Seen:
    """Return what a tensor holds by channel, and at most so many of its rows."""
    flat = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    return Seen(flat.min(axis=0), flat.max(axis=0), flat[:: -(-len(flat) // most)].copy())
