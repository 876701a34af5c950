"""What torch's own exporters have to be kept from."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch


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
