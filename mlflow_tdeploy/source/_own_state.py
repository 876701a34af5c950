"""Weights and buffers that a forward writes to, put back as they were: who logs a model finds it unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlflow_tdeploy.runtime.backends._torch_modules import copy_sharing

M = TypeVar("M", bound=torch.nn.Module)


class StateKept(TorchDispatchMode):
    """Notices in its block what of a module's state is written to, and puts it back at the end.

    Only what is written is copied, right before that: an ``Embedding(max_norm=…)``, a counter, weights that are kept
    positive. A buffer that is given another tensor (``self.seen = self.seen + 1``) is not noticed: whoever shares the
    old one does not see it. To be used without gradients, and not in inference mode: autograd counts no changes there.

    Args:
        module: The module.

    Attributes:
        written: Names of the weights and buffers that were written to, after the block.
        unnoticed: Those of them that were written to through ``.data``: neither autograd nor ``torch.export`` knows of
            it (torch 2.13 ends the process).
    """

    supports_higher_order_operators = True

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._state = [(name, one, one.data, _version(one)) for name, one in _named_state(module)]
        self._places: dict[int, list[int]] = {}
        for place, (_, _, data, _) in enumerate(self._state):
            if (where := _storage(data)) > 0:
                self._places.setdefault(where, []).append(place)
        self._before: dict[int, torch.Tensor] = {}
        self.written: tuple[str, ...] = ()
        self.unnoticed: tuple[str, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep what an operator is about to write to."""
        for value in _written_by(func, args, kwargs or {}):
            for place in self._places.get(_storage(value), ()):
                if place not in self._before:
                    self._before[place] = self._state[place][2].clone()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *what: Any) -> None:
        """Put back what was written to."""
        super().__exit__(*what)
        written, unnoticed = [], []
        for place, (name, tensor, data, version) in enumerate(self._state):
            replaced = tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape
            if not replaced and place not in self._before:
                continue
            written.append(name)
            if replaced or _version(tensor) == version:
                unnoticed.append(name)
            if replaced:
                tensor.data = data
            if place in self._before:
                data.copy_(self._before[place])
        self.written, self.unnoticed = tuple(written), tuple(unnoticed)


def with_own(module: M, names: tuple[str, ...]) -> M:
    """Return a copy of a module that has weights and buffers of these names for itself, and shares the others."""
    return copy_sharing(module, (tensor for name, tensor in _named_state(module) if name not in names))


def _named_state(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _written_by(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for place, one in enumerate(func._schema.arguments if hasattr(func, "_schema") else ()):
        if one.alias_info is not None and one.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(one.name)
            yield from (each for each in (value if isinstance(value, (list, tuple)) else [value]) if _is_tensor(each))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _storage(tensor: torch.Tensor) -> int:
    """Return where a tensor's numbers begin to lie, whatever part of them it has; 0 where it has none."""
    return tensor.untyped_storage().data_ptr() if _is_tensor(tensor) else 0


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
