"""Ranges of dimensions: what a user wrote over what the model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tensors import Dim

#: Range of the batch where the user gives none.
BATCH = (1, 8, 64)
#: Range of any other dimension of a graph whose size is not fixed.
FREE = (1, 8, 512)

Shapes = Mapping[str, object]


def make_dims(defaults: Iterable[Dim], shapes: Shapes | None) -> tuple[Dim, ...]:
    """Return the dimensions with the ranges of ``shapes`` where it has them.

    Raises:
        InvalidInputError: ``shapes`` names a dimension that the model has not, or a range is none.
    """
    dims = {dim.name: dim for dim in defaults}
    for name, value in check_shapes(shapes).items():
        if name not in dims:
            of_module = (
                f" Of a torch module, name the axes first: shapes={{'x.1': {name!r}, {name!r}: (min, opt, max)}} for "
                f"axis 1 of the input x."
            )
            raise InvalidInputError(
                f"shapes names the dimension {name!r}, which this model has not. "
                f"It has: {', '.join(dims) or 'none: every size is fixed'}.{'' if 'sequence' in dims else of_module}"
            )
        dims[name] = Dim.of(name, value)
    return tuple(dims.values())


def check_shapes(shapes: Shapes | None) -> Shapes:
    """Return ``shapes``, or an empty mapping for None.

    Raises:
        InvalidInputError: It is no mapping.
    """
    if shapes is None:
        return {}
    if not isinstance(shapes, Mapping):
        raise InvalidInputError(
            f"shapes must map dimension names to ranges, such as {{'batch': (1, 8, 64)}}, got {type(shapes).__name__}."
        )
    return shapes


def identifier(name: str) -> str:
    """Return ``name`` as a dimension's name: letters, digits and underscores, no digit first."""
    plain = "".join(char if char.isascii() and char.isalnum() else "_" for char in name)
    return plain if plain.isidentifier() else f"dim_{plain}"
