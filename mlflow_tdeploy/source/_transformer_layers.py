"""Torch's own Transformer layers, made to compute in one way whatever they are given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules import transformer as layers


@contextlib.contextmanager
def one_path() -> Iterator[None]:
    """Have the layers compute as they are exported.

    Their fast path for inference leaves out padded positions, whose answers are others then (nested tensors, see
    https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html).
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Have the layers take the mask that they are given, of any length, as what it is.

    Else they look at its values for whether it is the causal one: an exporter cannot follow that, or makes a constant
    of the length it has seen.
    """
    before = getattr(layers, "_detect_is_causal_mask", None)  # torch's own, from 2.1 on

    def as_it_was_said(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    if before is not None:
        layers._detect_is_causal_mask = as_it_was_said
    try:
        with one_path():
            yield
    finally:
        if before is not None:
            layers._detect_is_causal_mask = before
