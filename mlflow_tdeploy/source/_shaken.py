"""A module asked once more with other roundings: has it an answer, or only what rounding makes of it?"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlflow_tdeploy.source._shaken_graph import LEAST, ROUNDING

#: Operators that choose by order: of two that are as large, either is right.
_CHOOSING = frozenset({"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median", "mode"})


#: Operators after which a module is not asked any more: with a loop until nothing changes it would go on for ever.
_MOST_OPERATORS = 100_000


class Shaken(TorchDispatchMode):
    """Has every operator's result off by about as much as rounding might be.

    Neither the inputs nor the weights are touched: an epsilon of 1e-9 beside zeros is nothing beside the least change
    of an input that may be 1, and keeps its effect where only what is *computed* is off by a part of its own size. What
    that changes are differences of numbers that are as large (a constant signal less its mean, divided by next to
    nothing) and the order of numbers that are as large. Whole numbers stay: they are exact, and may be places.

    Args:
        seed: Of the random numbers.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._operators = 0
        self._random = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and shake what it makes.

        Raises:
            RuntimeError: There were too many.
        """
        self._operators += 1
        if self._operators > _MOST_OPERATORS:
            raise RuntimeError(f"more than {_MOST_OPERATORS} operators: it may go on until nothing changes any more")
        if not hasattr(func, "_schema"):  # such as torch.cond: what it holds is computed as ever
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _CHOOSING and args and _is_float(args[0]):
            args = (self._told_apart(args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(one, torch.Tensor) for one in args):
            return result  # nothing that was computed
        if isinstance(result, (tuple, list)):
            shaken = [self._off(one, returned) for one, returned in zip(result, func._schema.returns, strict=False)]
            return type(result)(shaken) if len(shaken) == len(result) else result  # else a list of views
        return self._off(result, func._schema.returns[0]) if func._schema.returns else result

    def _off(self, value: Any, returned: Any) -> Any:
        """Shake a result; in its place where that is what the operator writes to, and no view of another tensor."""
        if not _is_float(value) or (returned.alias_info is not None and not returned.alias_info.is_write):
            return value
        by = torch.rand(value.shape, generator=self._random) * (2 * ROUNDING) - ROUNDING
        off = torch.where(value == value.round(), value, value * (1 + by.to(value.dtype)))
        return off if returned.alias_info is None else value.copy_(off)

    def _told_apart(self, tensor: torch.Tensor) -> torch.Tensor:
        by = torch.rand(tensor.shape, generator=self._random).to(tensor.dtype)
        return tensor * (1 + by * ROUNDING) + by * LEAST


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0
