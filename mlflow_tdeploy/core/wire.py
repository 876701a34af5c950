"""Requests and answers of a task as named tensors, for a server that knows nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_tdeploy.core.columns import TEXT, Column
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.images import as_file
from mlflow_tdeploy.core.tasks import AnswerForm, Task
from mlflow_tdeploy.core.tensors import Array, Arrays, Signature, numpy_dtype

#: The output that holds a whole answer as JSON.
ANSWER = "answer"
#: The dtype of texts and of files' bytes, besides those of :data:`mlflow_tdeploy.core.tensors.DTYPES`.
STRING = "string"
_COLUMNS = {"string": STRING, "double": "float64", "long": "int64", "boolean": "bool"}


@dataclass(frozen=True)
class Part:
    """One tensor of a request or an answer.

    Attributes:
        name: Its name.
        dtype: A tensor's dtype, or :data:`STRING`.
        shape: Without the axis of the items; -1 for what varies.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


def request_parts(task: Task) -> tuple[Part, ...]:
    """Return what a request may hold besides the signature's own inputs: a tensor of strings for each column."""
    return tuple(Part(column.name, STRING) for column in task.columns)


def answer_parts(task: Task) -> tuple[Part, ...]:
    """Return what an answer consists of, besides the signature's own outputs.

    An array is one tensor, records are one for each column, and what has no fixed shape is :data:`ANSWER`, JSON;
    records have that, too, for answers with other parameters than the default ones.
    """
    form = task.answer_form()
    if form.kind == "array":
        return (Part(form.name, form.dtype, (form.width,)),)
    if form.kind == "records":
        if not _has_columns(form):
            return (Part(ANSWER, STRING),)
        columns = tuple(Part(field.name, _COLUMNS[field.dtype]) for field in form.fields)
        return (*columns, Part(ANSWER, STRING))
    return (Part(ANSWER, STRING),) if form.kind in ("nested", "lists") else ()


def asked_of(columns: Sequence[Column], items: Sequence[Any]) -> Arrays:
    """Return items as tensors, one for each column that they have; a list of texts is JSON, an image a file's bytes.

    Raises:
        InvalidInputError: A text is no valid Unicode.
    """
    rows = [item if isinstance(item, tuple) else (item,) for item in items]
    found = {}
    for column, values in zip(columns, zip(*rows, strict=True), strict=False):
        found[column.name] = _sent(column, values)
    return found


def asked_in(columns: Sequence[Column], arrays: Arrays, *, lenient: bool = False) -> list[Any]:
    """Return the items that :func:`asked_of` made tensors of.

    Args:
        columns: What the task reads.
        arrays: The tensors.
        lenient: Whether a row that is no text, or no list of such, is None, and no error.

    Returns:
        A text, or a file's bytes, for each item that has one column, else a tuple of what its columns hold. Nothing was
        looked at within.

    Raises:
        InvalidInputError: A tensor is missing or has more rows than another, a text is no UTF-8, there is more than
            one in a row, or a list is no JSON.
    """
    given = [column for column in columns if column.name in arrays]
    if lacking := [one.name for one in columns if not one.optional and one not in given]:
        raise InvalidInputError(f"The request has {', '.join(arrays)}, and no '{lacking[0]}'.")
    values = [_received(one, arrays[one.name], lenient=lenient) for one in given]
    if len(set(map(len, values))) > 1:
        told = ", ".join(f"{len(some)} of '{one.name}'" for one, some in zip(given, values, strict=True))
        raise InvalidInputError(f"The request's tensors have different numbers of rows: {told}.")
    return values[0] if len(given) == 1 else list(zip(*values, strict=True))


def _sent(column: Column, values: Sequence[Any]) -> Array:
    if column.kind == "image":
        return _rows([as_file(one) for one in values])
    return rows_of([json.dumps(one, ensure_ascii=False) for one in values] if column.many else values)


def _received(column: Column, array: Array, *, lenient: bool) -> list[Any]:
    if column.kind == "text":
        return texts_of(array, column.name, many=column.many, lenient=lenient)
    _check_rows(array, column.name, column.kind)
    return [one if isinstance(one, (bytes, str)) else None for one in array.reshape(-1)]


def _check_rows(array: Array, name: str, kind: str) -> None:
    if array.ndim > 1 and array.size != len(array):
        raise InvalidInputError(f"'{name}' holds one {kind} per row, got shape {array.shape}.")


def texts_of(array: Array, name: str = TEXT.name, *, many: bool = False, lenient: bool = False) -> list[Any]:
    """Return the texts in a tensor of bytes, one for each element.

    Args:
        array: The tensor.
        name: Its name, for messages.
        many: Whether each is a list of texts, in JSON.
        lenient: See :func:`asked_in`.

    Raises:
        InvalidInputError: One is no UTF-8, there is more than one in a row, or a list is no JSON.
    """
    _check_rows(array, name, "text")
    found: list[Any] = []
    for index, value in enumerate(array.reshape(-1)):
        try:
            text = _text_in(index, value, name)
            found.append(_list_in(index, text, name) if many else text)
        except InvalidInputError:
            if not lenient:
                raise
            found.append(None)
    return found


def _text_in(index: int, value: Any, name: str) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        title = name[:1].upper() + name[1:]
        raise InvalidInputError(f"{title} {index} is not UTF-8 ({shown(value)}): {error}.") from error


def _list_in(index: int, text: str, name: str) -> Any:
    why = ""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # the second of a hundred thousand brackets
        found, why = None, f": {error}"
    if not isinstance(found, list):
        raise InvalidInputError(f"'{name}' of row {index} must be a list of texts in JSON, got {shown(text)}{why}.")
    return found


def rows_of(texts: Sequence[str]) -> Array:
    """Return texts as a tensor of bytes, one a row: (items, 1).

    Raises:
        InvalidInputError: One is no valid Unicode.
    """
    try:
        return _rows([text.encode() for text in texts])
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"A text is no valid Unicode and cannot be sent: {error}.") from error


def _rows(values: Sequence[bytes]) -> Array:
    return np.array(values, dtype=object).reshape(-1, 1)


def sent(arrays: Arrays, dtypes: Mapping[str, str], *, batched: bool) -> Arrays:
    """Return a graph's inputs as a server takes them.

    It knows no tensor without an axis besides that of the rows: one of a number a row is sent with an axis that the
    graph does not see.

    Args:
        arrays: Of the signature's dtypes and shapes.
        dtypes: Those that are others in the graph, by name.
        batched: Whether the first axis is that of the rows, which the server joins.
    """
    least = 2 if batched else 1
    whole = {name: array if array.ndim >= least else array[..., None] for name, array in arrays.items()}
    return {name: array.astype(numpy_dtype(dtypes.get(name, array.dtype.name))) for name, array in whole.items()}


def received(arrays: Arrays, signature: Signature) -> Arrays:
    """Return a graph's outputs, as a server gives them, in the signature's dtypes and shapes."""
    found = {}
    for spec in signature.outputs:
        array = arrays[spec.name]
        found[spec.name] = array.reshape(array.shape[: len(spec.shape)]).astype(numpy_dtype(spec.dtype), copy=False)
    return found


def pack(task: Task, answers: Any, names: Sequence[str] = ()) -> Arrays:
    """Return the tensors of a finished answer, one row per item.

    Args:
        task: Whose answer it is.
        answers: What ``predict`` returns.
        names: Those that are wanted; all of them by default.
    """
    form = task.answer_form()
    wanted = set(names) or {part.name for part in answer_parts(task)}
    found: Arrays = {}
    if form.kind == "array":
        found[form.name] = _matrix(form, answers)
    elif form.kind == "records" and _plain_records(form, answers):
        for field in form.fields:
            found[field.name] = _column([answer[field.name] for answer in answers], _COLUMNS[field.dtype])
    if form.kind in ("records", "lists", "nested") and ANSWER in wanted:
        found[ANSWER] = _column([json.dumps(answer, ensure_ascii=False, default=_value) for answer in answers], STRING)
    return {name: array for name, array in found.items() if name in wanted}


def _matrix(form: AnswerForm, answers: Any) -> Array:
    """Return vectors as one tensor; where an item has none, numbers that are none."""
    if isinstance(answers, list) and any(one is None for one in answers):
        width = next((len(one) for one in answers if one is not None), max(form.width, 1))
        answers = [np.full(width, np.nan) if one is None else one for one in answers]
    return np.asarray(answers, numpy_dtype(form.dtype))


def _has_columns(form: AnswerForm) -> bool:
    """Tell whether records can be a tensor for each field: of one value, and none called as all of them are."""
    return not any(field.many or field.name == ANSWER for field in form.fields)


def _plain_records(form: AnswerForm, answers: Any) -> bool:
    """Tell whether every answer has each column once: with other parameters they may be lists of records."""
    if not _has_columns(form):
        return False
    return all(isinstance(one, Mapping) and all(field.name in one for field in form.fields) for one in answers)


def _column(values: Sequence[Any], dtype: str) -> Array:
    """Return values one per row; texts in the form (items, 1) that they are asked in."""
    return rows_of(values) if dtype == STRING else np.asarray(values, numpy_dtype(dtype))


def _value(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
