"""What torch's own exporters have to be kept from."""

from __future__ import annotations

import contextlib
import importlib
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

#: What makes a number of Python of a tensor: a trace keeps what it was.
_ENDS = (
    *("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__", "__len__"),
    *("equal", "allclose", "is_nonzero"),
)
#: The same as functions.
_FUNCTIONS = ("equal", "allclose", "is_nonzero")
#: Nodes of a trace whose results hold sizes only; those that end so, too.
_SIZES = frozenset({"aten::size", "aten::dim", "aten::numel", "aten::len", "prim::shape", "onnx::Shape"})
_SIZED = ("_like", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty")
#: Nodes whose results are as many as values say.
_COUNTED = ("nonzero", "argwhere", "unique", "bincount", "repeat_interleave", "aten::arange")
#: Of those that choose, what is chosen from decides nothing.
_CHOOSING = frozenset({"aten::masked_select", "aten::index"})
_MASKS = ("Bool", "Byte")
#: What repeats something has more inputs than how often, and how many that makes.
_FEWEST_REPEATING = 2
#: Whose files are no caller's: where Python's operators of a tensor are, and this one.
_WITHIN = (str(Path(torch.__file__).parent / "_tensor.py"), __file__)
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


@contextlib.contextmanager
def without_dumps() -> Iterator[None]:
    """Keep TorchScript's exporter from writing its whole graph to the process's output where it fails.

    Torch 2.13 switches that on whatever ``verbose`` says: it asks whether a function is true, not what it returns.
    """
    utils: Any = importlib.import_module("torch.onnx._internal.torchscript_exporter.utils")
    before = getattr(utils, "setup_onnx_logging", None)
    if before is None:
        yield
        return
    utils.setup_onnx_logging = lambda verbose: contextlib.nullcontext()
    try:
        yield
    finally:
        utils.setup_onnx_logging = before


@contextlib.contextmanager
def own_loops() -> Iterator[None]:
    """Have a recurrent layer exported as a loop in every export of a process, not only in the first one.

    Torch 2.13 puts the kernel that loops into a table of the operator and leaves what the operator has looked up there
    before: after one export that is the kernel that unrolls, and the length of the sequence becomes a constant.
    """
    operators: list[Any] = [torch.ops.aten.gru.input, torch.ops.aten.lstm.input]
    _forget_kernels(operators)
    try:
        yield
    finally:
        _forget_kernels(operators)


def _forget_kernels(operators: list[Any]) -> None:
    for operator in operators:
        looked_up = getattr(operator, "_dispatch_cache", None)
        if looked_up is not None:
            looked_up.clear()


@contextlib.contextmanager
def decisions(inputs: int) -> Iterator[dict[str, None]]:
    """Notice where a forward makes numbers of Python of what its inputs hold: a trace has one way of each ``if``.

    Sizes are told from values by what a tensor was computed from in the trace.

    Args:
        inputs: How many inputs the traced function has; what comes after them are weights.

    Yields:
        The places, ``file.py:12: if x.max() > 1:``, each once.
    """
    found: dict[str, None] = {}
    patched: list[tuple[Any, str]] = [(torch.Tensor, name) for name in _ENDS]
    patched += [(torch, name) for name in _FUNCTIONS]
    own, walk = [(where, name, vars(where).get(name)) for where, name in patched], _Walk(inputs)
    for where, name in patched:
        setattr(where, name, _noticing(getattr(where, name), name == "__len__", walk, found))
    try:
        yield found
    finally:
        for where, name, before in own:
            if before is None:
                delattr(where, name)
            else:
                setattr(where, name, before)


def _noticing(original: Callable[..., Any], counts: bool, walk: _Walk, found: dict[str, None]) -> Callable[..., Any]:
    def asked(*arguments: Any, **more: Any) -> Any:
        if torch.jit.is_tracing():
            tensors = (one for one in (*arguments, *more.values()) if isinstance(one, torch.Tensor))
            if any(walk.is_of_values(one, counts=counts) for one in tensors) and (place := _caller()):
                found[place] = None
        return original(*arguments, **more)

    return asked


class _Walk:
    """From tensors of a trace back to what they were computed from; what led nowhere is not gone again.

    Args:
        inputs: How many inputs the traced function has.
    """

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs
        self._trace: Any = None
        self._nowhere: set[tuple[int, bool]] = set()

    def is_of_values(self, tensor: torch.Tensor, *, counts: bool) -> bool:
        """Tell whether a traced tensor is computed from the inputs' values, and not only from their sizes.

        Args:
            tensor: The tensor.
            counts: Whether only its size is asked for, which is of values where these were counted.
        """
        get: Any = getattr(torch._C, "_get_value_trace", None)
        try:  # with each value goes whether what it holds matters, or only how large it is
            ways = [(get(tensor), not counts)] if get else []
        except RuntimeError:  # it is no part of the trace
            return False
        if (trace := torch._C._get_tracing_state()) is not self._trace:
            self._trace, self._nowhere = trace, set()
        seen: set[tuple[int, bool]] = set()
        while ways:
            value, held = ways.pop()
            if (key := (value.unique(), held)) in seen or key in self._nowhere:
                continue
            seen.add(key)
            if value.node().kind() != "prim::Param":
                ways.extend(_inputs(value.node(), held))
            elif held and value.offset() < self._inputs:
                return True
        self._nowhere |= seen
        return False


def _inputs(node: Any, held: bool) -> list[tuple[Any, bool]]:
    """Return what a node of a trace was given, each with whether its values matter where the result's do, or not."""
    kind, given = node.kind(), list(node.inputs())
    if kind in _SIZES or kind.endswith(_SIZED):
        return [(one, False) for one in given]
    if kind in _CHOOSING:
        masks = [one for listed in given[1:] for one in (listed.node().inputs() if kind == "aten::index" else [listed])]
        return [(given[0], held), *((one, held or _is_mask(one)) for one in masks)]
    if kind == "aten::repeat_interleave" and len(given) > _FEWEST_REPEATING:
        return [(given[0], held), *((one, True) for one in given[1:])]
    counted = any(one in kind for one in _COUNTED) or (kind == "aten::where" and len(given) == 1)
    return [(one, held or counted) for one in given]


def _is_mask(value: Any) -> bool:
    """Tell whether a tensor of a trace chooses as many as it has that are not 0; a place chooses one."""
    return value.type().kind() == "TensorType" and value.type().scalarType() in _MASKS


def _caller() -> str:
    """Return the line of the model's code that is running; empty where it is torch's own."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _WITHIN:
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_TORCH):
        return ""
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(path).name}:{line}: {linecache.getline(path, line).strip()[:100]}"
