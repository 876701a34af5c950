"""What a request may say beside its items, and what form answers have."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError, shown

_PARAM_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": (int, np.integer),
    "string": str,
    "double": (int, float, np.floating),
    "boolean": (bool, np.bool_),
}


@dataclass(frozen=True)
class Param:
    """A parameter of ``predict``: becomes a ``ParamSpec`` of the MLflow signature."""

    name: str
    dtype: Literal["integer", "string", "double", "boolean"]
    default: Any
    help: str
    #: Whether it is a list of such values; as text, with commas between or as JSON, it is read as one.
    many: bool = False

    def check(self, value: Any) -> Any:
        """Return ``value`` if it has the declared type; None means the default.

        Raises:
            InvalidInputError: It has another type.
        """
        if value is None:
            return self.default
        if self.many and isinstance(value, Mapping):
            raise InvalidInputError(f"The parameter '{self.name}' must be a list, got {shown(value)}. {self.help}")
        return [self._checked(one) for one in _listed(value)] if self.many else self._checked(value)

    def _checked(self, value: Any) -> Any:
        wrong_bool = isinstance(value, (bool, np.bool_)) and self.dtype != "boolean"
        if wrong_bool or not isinstance(value, _PARAM_TYPES[self.dtype]):
            raise InvalidInputError(
                f"The parameter '{self.name}' must be of type {self.dtype}, got {shown(value)}. {self.help}"
            )
        return value


def _listed(value: Any) -> list[Any]:
    """Return a list parameter, whatever form it comes in; servers of tensors have no lists among their parameters."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        several = [one.strip() for one in value.split(",")]
        return several if len(several) > 1 else [value] if value else []
    return list(value.tolist() if isinstance(value, np.ndarray) else value) if np.iterable(value) else [value]


#: Of tasks of texts.
ERRORS = Param(
    "errors", "string", "raise", "raise: an item that cannot be used fails the request; null: its answer is None."
)


@dataclass(frozen=True)
class Field:
    """A column of an answer."""

    name: str
    dtype: Literal["string", "double", "long", "boolean"]
    #: Whether it is a list of such values.
    many: bool = False


@dataclass(frozen=True)
class AnswerForm:
    """What ``predict`` returns, for the MLflow output schema.

    Attributes:
        kind: ``array`` (one float row per input), ``records`` (one row of ``fields`` per input), ``lists`` (a list of
            such rows per input), ``nested`` (one nested list of floats per input) or ``tensors`` (name → array).
        width: Row length for ``array``; -1 when it varies.
        fields: Columns for ``records`` and ``lists``.
        name: What a server of tensors calls the ``array``.
        dtype: Its dtype.
    """

    kind: Literal["array", "records", "lists", "nested", "tensors"]
    width: int = -1
    fields: tuple[Field, ...] = ()
    name: str = "answer"
    dtype: str = "float32"
