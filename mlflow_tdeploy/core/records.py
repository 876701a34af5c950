"""Frozen dataclasses to JSON and back, checked against their own type hints.

Every record of a bundle (manifest, variants, evidence) goes through these two functions, so a
broken file is reported the same way everywhere: which file, which key, what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from mlflow_tdeploy.core.errors import InvalidInputError, ManifestError, SchemaVersionError, TDeployError

R = TypeVar("R")


def to_json(record: Any) -> str:
    """Return the record as indented JSON text with sorted keys and a final newline.

    Raises:
        ManifestError: A number is NaN or infinite (JSON has neither), a value is none of JSON's, or a text
            is not valid Unicode.
    """
    try:
        text = json.dumps(to_plain(record), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
        text.encode()  # a lone surrogate, for example out of a file name, cannot be stored
        return text
    except (ValueError, TypeError) as error:
        raise ManifestError(f"Cannot write {type(record).__name__} as JSON: {error}.") from error


def to_plain(value: Any) -> Any:
    """Return dataclasses, tuples and mappings as dicts and lists, ``None`` fields left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_plain(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def from_json(cls: type[R], text: str | bytes, where: str, newest: int | None = None) -> R:
    """Parse JSON text into the dataclass ``cls``.

    Args:
        cls: A dataclass whose fields are str, int, float, bool, tuples, mappings, optionals or dataclasses.
        text: The JSON.
        where: File name for messages.
        newest: Latest ``schema_version`` of the record that this package reads; looked at before any other key.

    Raises:
        SchemaVersionError: A newer version of this package wrote it.
        ManifestError: Not JSON, a missing, unknown or wrongly typed key, or a value the class refuses.
    """
    try:
        plain = json.loads(text, parse_constant=_refuse_constant)
        if newest is not None:
            _refuse_newer(plain, where, newest)
        return from_plain(cls, plain, where)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{where} is not valid JSON ({error}). The file is damaged: restore or log it again."
        ) from error


def _refuse_newer(plain: Any, where: str, newest: int) -> None:
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if isinstance(version, int) and version > newest:
        raise SchemaVersionError(
            f"{where} has schema version {version}; this mlflow-tdeploy reads up to {newest}. "
            f"Upgrade with: pip install -U mlflow-tdeploy",
            version,
        )


def check_version(version: int) -> None:
    """Refuse what is no schema version.

    Raises:
        InvalidInputError: It is below 1.
    """
    if version < 1:
        raise InvalidInputError(f"schema_version must be at least 1, got {version}.")


def from_plain(cls: type[R], plain: Any, where: str) -> R:
    """Like :func:`from_json` for an already parsed value."""
    result = _convert(cls, plain, where)
    return typing.cast(R, result)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _convert_record(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is typing.Literal:
        return _expect(value, value in typing.get_args(hint), where, f"one of {list(typing.get_args(hint))}")
    if origin is tuple:
        _expect(value, isinstance(value, (list, tuple)), where, "a list")  # JSON has the one, a record the other
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin in (dict, Mapping) or hint is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        _expect(value, isinstance(value, dict), where, "an object")
        item = (typing.get_args(hint) or (str, Any))[1]
        return {key: _convert(item, entry, f"{where}.{key}") for key, entry in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is type(None):
        return _expect(value, value is None, where, "null")
    if hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
        return float(_expect(value, ok, where, "a finite number"))
    ok = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    return _expect(value, ok, where, {str: "a string", int: "an integer", bool: "true or false"}.get(hint, str(hint)))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON integers have no bound, floats have
        return False


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    errors = []
    for option in typing.get_args(hint):
        try:
            return _convert(option, value, where)
        except ManifestError as error:
            errors.append(error)
    raise next((e for e in errors if "null" not in str(e)), errors[0])


def _convert_record(cls: type, value: Any, where: str) -> Any:
    _expect(value, isinstance(value, dict), where, f"an object ({cls.__name__})")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ManifestError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}.")
    hints = _hints(cls)
    arguments = {name: _convert(hints[name], entry, f"{where}.{name}") for name, entry in value.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ManifestError(f"{where}: the key {name!r} is missing.")
    try:
        return cls(**arguments)
    except TDeployError as error:
        raise ManifestError(f"{where}: {error}") from error


def _expect(value: Any, ok: bool, where: str, expected: str) -> Any:
    if not ok:
        shown = repr(value)
        raise ManifestError(f"{where}: expected {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}.")
    return value
