"""A torch module becomes a portable ONNX graph: named inputs, named dynamic dimensions, standard operators.

The signature drives everything: names, order, ranges. The ``torch.export`` based exporter comes first,
TorchScript second, because each handles models that the other one cannot.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from mlflow_tdeploy.build._torch_exporters import decisions, own_loops, without_dumps
from mlflow_tdeploy.build.exact_rules import exact_rules
from mlflow_tdeploy.build.graphs import save_ir
from mlflow_tdeploy.core.errors import ExportError
from mlflow_tdeploy.core.tensors import Signature, TensorSpec, numpy_dtype
from mlflow_tdeploy.source._transformer_layers import exportable

Exporter = Literal["auto", "dynamo", "torchscript"]
#: The newest IR version a portable graph may have: ONNX Runtime 1.18 and TensorRT 10 read it.
MAX_IR_VERSION = 10
#: Weights above this size are stored beside the graph, where a runtime can memory-map them.
EXTERNAL_DATA_BYTES = 64 * 2**20

#: How the exporters name an operator that they do not know.
_UNKNOWN = r"(?:No ONNX function found for <OpOverload\(op='|Exporting the operator ')(\w+(?:\.|::)\w+)'"
_REWRITE = (
    "What torch itself does not export has to be written in another way, or logged as an ONNX graph that was made "
    "elsewhere."
)
_NOISY_LOGGERS = ("torch", "onnxscript", "onnx_ir", "onnx", "transformers")


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        path: The graph; its weights may lie beside it as ``<name>.data``.
        exporter: ``"dynamo"`` or ``"torchscript"``.
        opset: Version of the standard operators.
        ir_version: Version of the ONNX file format.
        seconds: Wall time of the whole export.
        notes: What a reader should know, such as why the first exporter was not used.
        decided: Lines of the module's code that decide by values of the inputs: the graph has the way that the example
            takes, whatever comes.
    """

    path: Path
    exporter: str
    opset: int
    ir_version: int
    seconds: float
    notes: tuple[str, ...] = ()
    decided: tuple[str, ...] = ()


def export_module(
    module: torch.nn.Module,
    example: Mapping[str, np.ndarray],
    signature: Signature,
    path: Path,
    *,
    opset: int = 18,
    exporter: Exporter = "auto",
    external_data: bool | None = None,
) -> ExportResult:
    """Export a module to an ONNX file whose inputs, outputs and dimensions are the signature's.

    The module is called with keyword arguments named as the signature's inputs, in evaluation mode. Example
    arrays are repeated or cut along an axis where a size would be baked into the graph (0 and 1 are).

    Args:
        module: The module; a mapping it returns is read by output names, a tensor or sequence by position.
        example: One realistic array per input; values matter (masks, valid token ids), sizes do not.
        signature: Names, dtypes and ranges.
        path: The file to write. Weights above 64 MiB go to ``<path>.data``.
        opset: Version of the standard operators.
        exporter: ``"auto"`` tries ``"dynamo"``, then ``"torchscript"``. TorchScript reads Hugging Face models
            best when they were loaded with ``attn_implementation="eager"``.
        external_data: Force (True) or forbid (False) weights beside the graph.

    Raises:
        ExportError: No exporter could make the graph, or it does not have the signature's outputs.
    """
    started = time.perf_counter()
    attempts: tuple[str, ...] = ("dynamo", "torchscript") if exporter == "auto" else (exporter,)
    traced = _trace_inputs(example, signature)
    name, model, notes, decided = _first_that_works(attempts, module, traced, signature, opset)
    save_ir(model, path, external_data=external_data, threshold=EXTERNAL_DATA_BYTES)
    said = (*notes, *_fixed_notes(signature), *(f"decides by values at {one}" for one in decided))
    seconds = time.perf_counter() - started
    return ExportResult(path, name, _opset(model), int(model.ir_version), seconds, said, decided)


def _first_that_works(
    attempts: tuple[str, ...],
    module: torch.nn.Module,
    traced: tuple[torch.Tensor, ...],
    signature: Signature,
    opset: int,
) -> tuple[str, ir.Model, list[str], tuple[str, ...]]:
    """Return the first exporter that makes the graph, the graph, why earlier ones did not, and what is decided."""
    failures: list[str] = []
    for name in attempts:
        try:
            with _quiet(), _evaluating(module), exportable(), own_loops(), exact_rules():
                model, decided = _EXPORTERS[name](_Adapter(module, signature), traced, signature, opset)
                _finish(model, signature, opset)
        except Exception as error:
            failures.append(f"{name}: {_reason(error)}")
        else:
            return name, model, [f"not exported by {failure}" for failure in failures], decided
    raise not_exported(module, opset, tuple(failures))


def not_exported(module: torch.nn.Module, opset: int, failures: tuple[str, ...]) -> ExportError:
    """Return the error for a module that no exporter takes, which says once why, and what to do.

    Args:
        module: The module.
        opset: The opset that was wanted.
        failures: What each exporter said, ``dynamo: …``.
    """
    inner = getattr(module, "inner", module)
    unknown = [re.findall(_UNKNOWN, failure) for failure in failures]
    names = dict.fromkeys(name.replace(".", "::") for found in unknown for name in found)
    said = " | ".join(failure.rstrip(".") for failure in failures)
    if names and all(unknown):
        said = f"It knows no ONNX for {', '.join(names)} ({' and '.join(one.partition(':')[0] for one in failures)})"
    advice = _REWRITE if names else _advice(inner, said)
    return ExportError(
        f"{type(inner).__name__} could not be exported to ONNX opset {opset} by torch. {said}. {advice}", failures
    )


def _advice(module: torch.nn.Module, said: str) -> str:
    """Say what to do about a module that torch does not export."""
    if "pack" in said.lower() and any(isinstance(one, torch.nn.RNNBase) for one in module.modules()):
        return (
            "A recurrent layer on packed sequences (pack_padded_sequence) is exported only with an initial state that "
            "is passed: rnn(packed, (h0, c0)) with zeros of the batch's size."
        )
    return f"Check that every range of the signature is allowed by the model (positions, sequence length). {_REWRITE}"


class _Adapter(torch.nn.Module):
    """Takes tensors in the signature's order and returns a tuple in the signature's order."""

    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self.input_names = [spec.name for spec in signature.inputs]
        self.output_names = [spec.name for spec in signature.outputs]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(**dict(zip(self.input_names, tensors, strict=True)))
        if isinstance(result, Mapping):
            missing = [name for name in self.output_names if name not in result]
            if missing:
                raise ExportError(f"The module returns {', '.join(result)}, not the declared output '{missing[0]}'.")
            return tuple(result[name] for name in self.output_names)
        values = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        if len(values) < len(self.output_names):
            raise ExportError(
                f"The module returns {len(values)} outputs, the signature declares {len(self.output_names)}."
            )
        return values[: len(self.output_names)]


def _trace_size(size: str | int, have: int, signature: Signature) -> int:
    """Return the size of an axis while tracing: in range, and never 0 or 1 where it must stay dynamic."""
    if isinstance(size, int):
        return size
    dim = signature.dim(size)
    if dim.min == dim.max:
        return dim.max
    return min(max(have, dim.min, 2), dim.max)


def _trace_inputs(example: Mapping[str, np.ndarray], signature: Signature) -> tuple[torch.Tensor, ...]:
    """Return example tensors of traceable sizes, one size per dimension, in the signature's order."""
    sizes: dict[str, int] = {}
    tensors = []
    for spec in signature.inputs:
        if spec.name not in example:
            raise ExportError(
                f"The example inputs lack '{spec.name}'. They must hold {', '.join(s.name for s in signature.inputs)}."
            )
        array = np.asarray(example[spec.name])
        if array.ndim != len(spec.shape):
            raise ExportError(f"The example of '{spec.name}' has shape {array.shape}, the signature says {spec}.")
        for axis, size in enumerate(spec.shape):
            wanted = _trace_size(size, array.shape[axis], signature)
            wanted = sizes.setdefault(size, wanted) if isinstance(size, str) else wanted
            array = np.take(array, np.arange(wanted) % max(array.shape[axis], 1), axis=axis)
        tensors.append(torch.from_numpy(np.array(array, order="C")))  # ascontiguousarray makes vectors of numbers
    return tuple(tensors)


def _dynamic_axes(spec: TensorSpec, signature: Signature) -> dict[int, str]:
    """Return axis → dimension name of the axes that vary; an undeclared output dimension varies too."""
    axes = {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}
    fixed = {dim.name for dim in signature.dims if dim.min == dim.max}
    return {axis: name for axis, name in axes.items() if name not in fixed}


def _export_dynamo(
    adapter: _Adapter, inputs: tuple[torch.Tensor, ...], signature: Signature, opset: int
) -> tuple[ir.Model, tuple[str, ...]]:
    dims = {
        dim.name: torch.export.Dim(dim.name, min=dim.min, max=dim.max) for dim in signature.dims if dim.min != dim.max
    }
    shapes = tuple(
        {axis: dims[name] for axis, name in _dynamic_axes(spec, signature).items()} for spec in signature.inputs
    )
    program = torch.onnx.export(
        adapter,
        inputs,
        input_names=adapter.input_names,
        output_names=adapter.output_names,
        dynamic_shapes={"tensors": shapes},
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export returned no program.")
    return program.model, ()


def _export_torchscript(
    adapter: _Adapter, inputs: tuple[torch.Tensor, ...], signature: Signature, opset: int
) -> tuple[ir.Model, tuple[str, ...]]:
    specs = (*signature.inputs, *signature.outputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with without_dumps(), decisions(len(inputs)) as decided:
            torch.onnx.export(
                adapter,
                inputs,
                str(file),
                input_names=adapter.input_names,
                output_names=adapter.output_names,
                dynamic_axes={spec.name: _dynamic_axes(spec, signature) for spec in specs},
                opset_version=opset,
                dynamo=False,
                verbose=False,
            )
        model = ir.load(file)
        ir.external_data.load_to_model(model)  # the folder goes away
    return model, tuple(decided)


_EXPORTERS: dict[str, Any] = {"dynamo": _export_dynamo, "torchscript": _export_torchscript}


def _opset(model: ir.Model) -> int:
    return int(model.opset_imports[""])


def _finish(model: ir.Model, signature: Signature, opset: int) -> None:
    """Check names and the opset, and write the signature's shapes on the graph's inputs and outputs."""
    if _opset(model) != opset:
        raise ExportError(f"The exporter wrote opset {_opset(model)}, {opset} was asked for.")
    model.ir_version = min(model.ir_version, MAX_IR_VERSION) if opset <= 22 else model.ir_version
    _keep_unused(model.graph, signature)
    for kind, specs, values in (
        ("input", signature.inputs, list(model.graph.inputs)),
        ("output", signature.outputs, list(model.graph.outputs)),
    ):
        found = [value.name for value in values]
        if found != [spec.name for spec in specs]:
            raise ExportError(f"The graph's {kind}s are {found}, the signature's are {[spec.name for spec in specs]}.")
        for spec, value in zip(specs, values, strict=True):
            _name_shape(kind, spec, value, signature)
    _rename_clashes(model.graph)


def _keep_unused(graph: ir.Graph, signature: Signature) -> None:
    """Give a graph the inputs back that its module takes and does not use: TorchScript leaves them out."""
    here = [value.name for value in graph.inputs]
    if not here or here != [spec.name for spec in signature.inputs if spec.name in here]:
        return
    for place, spec in enumerate(signature.inputs):
        if spec.name not in here:
            dtype = ir.DataType.from_numpy(numpy_dtype(spec.dtype))
            graph.inputs.insert(place, ir.Value(name=spec.name, type=ir.TensorType(dtype)))


def _rename_clashes(graph: ir.Graph) -> None:
    """Give values inside a graph other names than its inputs and outputs have.

    torch's exporter names values after operators, and inputs as it is told: an input 'cat' meets that of a Concat.
    """
    ends = [*graph.inputs, *graph.outputs]
    taken = {value.name for value in ends}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in taken and not any(value is end for end in ends):
                value.name = f"{value.name}_inside"


def _name_shape(kind: str, spec: TensorSpec, value: ir.Value, signature: Signature) -> None:
    dynamic = _dynamic_axes(spec, signature)
    if value.shape is not None and len(value.shape) != len(spec.shape):
        raise ExportError(f"The graph's {kind} '{spec.name}' has {len(value.shape)} axes, the signature says {spec}.")
    sizes: list[str | int] = []
    for axis, size in enumerate(spec.shape):
        fixed = size if isinstance(size, int) else signature.dim(size).max if axis not in dynamic else None
        got = None if value.shape is None else value.shape[axis]
        wrong = isinstance(got, int) and (fixed is None or got != fixed)
        if wrong:
            raise ExportError(
                f"Axis {axis} of the graph's {kind} '{spec.name}' is fixed to {got}, the signature says {size!r}."
            )
        sizes.append(dynamic[axis] if fixed is None else fixed)
    value.shape = ir.Shape(sizes)


def _fixed_notes(signature: Signature) -> tuple[str, ...]:
    return tuple(f"dimension '{dim.name}' is fixed to {dim.max}" for dim in signature.dims if dim.min == dim.max)


def _reason(error: BaseException) -> str:
    """Return the innermost cause of an exporter's failure in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode without gradients, and restore each one's mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings, logs and prints; everything is restored afterwards."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _NOISY_LOGGERS]
    loggers = [logging.getLogger(name) for name in {*names, *_NOISY_LOGGERS}]
    levels = [(logger, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
