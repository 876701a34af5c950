"""Which inputs of whole numbers a torch module looks up in a table as they are, and how many rows that has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlflow_tdeploy.core.tensors import Array, Arrays
from mlflow_tdeploy.runtime.backends._torch_modules import run_module
from mlflow_tdeploy.source._positions import runs

#: So many further requests tell an input from what only looks like it in the example, such as positions or zeros.
_ROUNDS = 3


def integer_ranges(module: torch.nn.Module, example: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, int]:
    """Return the size of the table for each input of whole numbers that a module looks up as it is.

    An input whose whole table the module does not take (rows that must end in a certain token) is none of them.

    Args:
        module: Takes the example by keywords.
        example: A request.
        outputs: Names of the outputs.
    """
    whole = [name for name, array in example.items() if array.dtype.kind in "iu"]
    tables = [one for one in module.modules() if isinstance(one, torch.nn.Embedding)] if whole else []
    if not tables:
        return {}
    random, found = np.random.default_rng(0), _looked_up(module, tables, dict(example), outputs, whole)
    for _ in range(_ROUNDS if found else 0):
        drawn = {**example, **{name: _drawn(example[name], random) for name in whole}}
        try:
            found &= _looked_up(module, tables, drawn, outputs, whole)
        except Exception:  # noqa: S112 - a user's code does not take every request: then this one tells nothing
            continue
    sizes = {name: min(rows.num_embeddings for one, rows in found if one == name) for name, _ in found}
    return {name: rows for name, rows in sizes.items() if _takes_all(module, example, outputs, name, rows)}


def _looked_up(
    module: torch.nn.Module,
    tables: Sequence[torch.nn.Embedding],
    feeds: Arrays,
    outputs: Sequence[str],
    whole: Sequence[str],
) -> set[tuple[str, torch.nn.Embedding]]:
    """Return the inputs that a table was asked for, each with its table."""
    found: set[tuple[str, torch.nn.Embedding]] = set()

    def asked(table: Any, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        first = next(iter((*inputs, *named.values())), None)
        ids = first.detach().cpu().numpy() if isinstance(first, torch.Tensor) else None
        found.update((name, table) for name in whole if ids is not None and np.array_equal(ids, feeds[name]))

    hooks = [table.register_forward_pre_hook(asked, with_kwargs=True) for table in tables]
    try:
        run_module(module, feeds, outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _drawn(array: Array, random: np.random.Generator) -> Array:
    """Return other values for an input: its own, in another order, or 0 and 1 where it has one value only."""
    values = np.unique(array)
    return random.choice(values if len(values) > 1 else np.array([0, 1]), array.shape).astype(array.dtype)


def _takes_all(
    module: torch.nn.Module, example: Mapping[str, Array], outputs: Sequence[str], name: str, rows: int
) -> bool:
    array = example[name]
    most = min(rows, int(np.iinfo(array.dtype).max) + 1)
    asked = np.random.default_rng(1).integers(0, most, array.shape).astype(array.dtype)
    return runs(lambda feeds: run_module(module, feeds, outputs), {**example, name: asked})
