"""NVIDIA's Model Optimizer on graphs: what it writes is explicit Q/DQ, or strongly typed half precision.

https://nvidia.github.io/Model-Optimizer/guides/_onnx_quantization.html and …/guides/8_autocast.html. Importing it takes
seconds, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mlflow_tdeploy.build.graphs import quiet, save_ir
from mlflow_tdeploy.build.half import forget_types
from mlflow_tdeploy.build.observe import observe
from mlflow_tdeploy.core.errors import BuildError, MissingDependencyError
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.store.external_data import copy_graph

#: What no activation is as large as.
_REASON = 1e6
_LOGGERS = ("modelopt.onnx", "modelopt", "modelopt.torch", "onnxslim", "polygraphy")


def quantize(
    src: Path, dst: Path, *, mode: str, method: str, batches: Sequence[Arrays], without: Collection[str] = ()
) -> None:
    """Quantize a graph; what is not quantized stays fp32.

    Args:
        src: An fp32 graph whose nodes have names of their own.
        dst: The file to write.
        mode: ``int8``, ``fp8`` or ``int4``.
        method: Of int8 and fp8 ``max`` or ``entropy``; of int4 ``rtn_dq`` or ``awq_clip``.
        batches: What ranges are found on. For ``int4`` of one size, see :func:`of_one_size`.
        without: Names of nodes to leave alone.

    Raises:
        MissingDependencyError: It is not installed.
        BuildError: It fails.
    """
    with library("modelopt.onnx.quantization") as modelopt, tempfile.TemporaryDirectory(dir=src.parent) as folder:
        copied = Path(folder) / copy_graph(src, Path(folder))[0]
        written = Path(folder) / "quantized.onnx"
        takes = [value.name for value in onnx.load(src, load_external_data=False).graph.input]
        fitting = [{name: batch[name] for name in takes} for batch in batches]
        modelopt.quantize(
            str(copied),
            quantize_mode=mode,
            calibration_method=method,
            calibration_data_reader=_Reader(fitting),
            calibration_eps=["cpu"],
            nodes_to_exclude=[f"^{re.escape(name)}$" for name in without] or None,
            high_precision_dtype="fp32",
            use_external_data_format=True,
            output_path=str(written),
            log_level="CRITICAL",
        )
        if not written.exists():
            raise BuildError(f"Model Optimizer has nothing to quantize in {mode}.")
        save_ir(ir.load(written), dst)


def beyond_reason(src: Path, batches: Sequence[Arrays]) -> list[str]:
    """Return the sums of a graph that take numbers no range makes sense of, such as the ends that masks are made of.

    Of eight bits none would be left for anything else, and the library quantizes sums as well.
    """
    sums = [node for node in onnx.load(src, load_external_data=False).graph.node if node.op_type == "Add"]
    sources = dict.fromkeys(name for node in sums for name in node.input)
    floats = _floats(src, sources)
    met = observe(src, [name for name in sources if name in floats], batches, lambda one: float(np.abs(one).max()))
    large = {name for name, sizes in met if max(sizes, default=0.0) > _REASON}
    return [node.name for node in sums if large & set(node.input)]


def _floats(path: Path, names: Iterable[str]) -> set[str]:
    """Return which tensors of a graph hold floats and are computed in it."""
    model, wanted = ir.load(path), set(names)
    with quiet():
        passes.ShapeInferencePass()(model)
    return {
        value.name or ""
        for node in model.graph
        for value in node.outputs
        if value.name in wanted and value.dtype == ir.DataType.FLOAT
    }


def to_half(src: Path, dst: Path, precision: str, batch: Arrays, without: Collection[str] = ()) -> None:
    """Convert a graph to strongly typed half precision: a type for every tensor, and casts where they differ.

    What leaves the range of half precision on the batch stays fp32. Inputs and outputs keep their types.

    Args:
        src: An fp32 graph.
        dst: The file to write.
        precision: ``fp16`` or ``bf16``.
        batch: Graph inputs to look at.
        without: Names of nodes that stay fp32 in any case.

    Raises:
        MissingDependencyError: It is not installed.
    """
    with library("modelopt.onnx.autocast") as modelopt, tempfile.TemporaryDirectory(dir=src.parent) as folder:
        copied = Path(folder) / copy_graph(src, Path(folder))[0]
        data = Path(folder) / "batch.npz"
        takes = [value.name for value in onnx.load(src, load_external_data=False).graph.input]
        np.savez(data, **{name: batch[name] for name in takes})  # type: ignore[arg-type]  # stubs mistake names
        converted = modelopt.convert_to_mixed_precision(
            str(copied), low_precision_type=precision, keep_io_types=True, calibration_data=str(data),
            nodes_to_exclude=[f"{re.escape(name)}$" for name in without],
        )  # fmt: skip
        graph = ir.from_proto(converted)
        forget_types(graph)  # of dimensions it gives one name to different sizes, and runtimes share memory by that
        save_ir(graph, dst)


def of_one_size(batches: Sequence[Arrays]) -> list[Arrays]:
    """Return those batches that have the size which most numbers come in: AWQ joins what it sees of all of them."""
    by_size: dict[tuple[Any, ...], list[Arrays]] = defaultdict(list)
    for batch in batches:
        by_size[tuple(array.shape[1:] for array in batch.values())].append(batch)
    return max(by_size.values(), key=lambda some: sum(array.size for batch in some for array in batch.values()))


class _Reader:
    """Batches, as ONNX Runtime's and Model Optimizer's calibrators read them."""

    def __init__(self, batches: Sequence[Arrays]) -> None:
        self._batches = batches
        self.rewind()

    def get_next(self) -> Arrays | None:
        return next(self._remaining, None)

    def get_first(self) -> Arrays:
        return self._batches[0]

    def rewind(self) -> None:
        self._remaining = iter(self._batches)

    def __iter__(self) -> Iterator[Arrays]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


@contextmanager
def library(part: str) -> Iterator[Any]:
    """Yield a part of the library; what it and those it uses print and log is left out."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            try:
                found = importlib.import_module(part)
            except ImportError as error:
                raise MissingDependencyError(
                    "nvidia-modelopt", "quantizing by Model Optimizer", "pip install 'mlflow-tdeploy[modelopt]'"
                ) from error
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            yield found
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
