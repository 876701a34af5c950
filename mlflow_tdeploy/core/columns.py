"""Requests of texts or images, in whatever container they come: a task's columns, and one item for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.images import is_image, pixels_in, read_image
from mlflow_tdeploy.core.tensors import Array


@dataclass(frozen=True)
class Column:
    """One text, or image, of each item.

    Attributes:
        name: Its key in records, its column in tables, its tensor on a server.
        others: Other keys under which it is recognized.
        optional: Whether a request may do without; only the last ones are.
        many: Whether it is a list of texts.
        kind: What it is of. Images are what :func:`mlflow_tdeploy.core.images.read_image` returns.
    """

    name: str
    others: tuple[str, ...] = ()
    optional: bool = False
    many: bool = False
    kind: Literal["text", "image"] = "text"

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys under which it is recognized."""
        return (self.name, *self.others)


#: A text alone.
TEXT = Column("text", ("texts", "inputs", "sentence", "sentences", "sentence1", "premise"))
#: A second one beside it.
TEXT_PAIR = Column("text_pair", ("sentence2", "hypothesis"), optional=True)
#: An image.
IMAGE = Column("image", ("images", "inputs", "img"), kind="image")
#: A text or an image, or what several columns of a task hold.
Item = str | bytes | Array | tuple[Any, ...]


def read_items(inputs: Any, columns: Sequence[Column], who: str = "it") -> list[Any]:
    """Return the items of a request: a string, a list, an array, a Series, a table or a mapping.

    Args:
        inputs: What a user passes.
        columns: What the task reads.
        who: The task, for messages.

    Returns:
        A text or an image for each item that has one column, else a tuple of what its columns hold: these, or lists of
        texts.

    Raises:
        InvalidInputError: There are none, or one cannot be used; names its position.
    """
    rows = raw_rows(inputs, columns, who)
    if len(columns) == 1 and columns[0] == TEXT and all(isinstance(row, str) for row in rows):
        return rows
    found = [checked_row(index, row, columns) for index, row in enumerate(rows)]
    check_alike(found, columns)
    return found


def raw_rows(inputs: Any, columns: Sequence[Column], who: str = "it", *, lenient: bool = False) -> list[Any]:
    """Return the items of a request before anybody has looked whether they can be used, see :func:`checked_row`.

    Args:
        inputs: What a user passes.
        columns: What the task reads.
        who: The task, for messages.
        lenient: Whether what is no item at all is None, and no error.

    Raises:
        InvalidInputError: There are none, or they cannot be found.
    """
    rows = _Reader(tuple(columns), who, lenient).rows(inputs)
    if not rows:
        wanted = "text" if columns[0].name == TEXT.name else " and ".join(one.name for one in _needed(columns))
        raise InvalidInputError(f"The request is empty: {who} needs at least one {wanted}.")
    return rows


def text_columns(names: Iterable[Any], tasks: Iterable[Sequence[Column]]) -> dict[str, str]:
    """Return which of a table's columns are texts for some task: by the name that the task knows it by.

    Args:
        names: The table's columns.
        tasks: What each task reads.
    """
    keys = {key: column.name for columns in tasks for column in columns for key in reversed(column.keys)}
    found: dict[str, str] = {}
    for name in (str(name) for name in names):
        if name in keys and (name == keys[name] or keys[name] not in found):
            found[keys[name]] = name
    return found


def records_of(table: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Return a table's rows as items of a task that is not known yet: texts, or records of several columns.

    Args:
        table: What its columns hold, all of one length, by the name that tasks know them by.
    """
    if set(table) == {TEXT.name}:
        return list(table[TEXT.name])
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def is_unicode(text: str) -> bool:
    """Tell whether a text has no lone surrogate: with one, it is str for Python and not text for others."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def texts_in(item: Item) -> list[str]:
    """Return the texts of an item, as a task's ``items`` returns it, one after the other; none of an image."""
    if not isinstance(item, tuple):
        return [item] if isinstance(item, str) else []
    parts = [part for part in item if isinstance(part, (str, tuple))]
    return [text for part in parts for text in ([part] if isinstance(part, str) else part)]


def width_of(item: Item) -> int:
    """Return how many columns an item has."""
    return len(item) if isinstance(item, tuple) else 1


def _needed(columns: Sequence[Column]) -> list[Column]:
    return [one for one in columns if not one.optional]


@dataclass(frozen=True)
class _Reader:
    """Reads containers of every kind.

    Attributes:
        columns: What the task reads.
        who: The task, for messages.
        lenient: See :func:`raw_rows`.
    """

    columns: tuple[Column, ...]
    who: str
    lenient: bool = False

    @property
    def _alone(self) -> bool:
        """Whether a text is an item."""
        return len(_needed(self.columns)) == 1 and not self.columns[0].many

    def rows(self, inputs: Any) -> list[Any]:
        """Return the values of a request; whether they can be used is checked later."""
        if isinstance(inputs, str) or (self._alone and _is_one(inputs, self.columns[0])):
            return [inputs]
        if hasattr(inputs, "columns") and hasattr(inputs, "to_numpy"):  # a DataFrame: core has no pandas
            keys = self._keys(list(inputs.columns))
            if len(keys) == len(inputs.columns) == 1 and self._alone:  # no Series on the way
                cells = inputs.to_numpy(dtype=object) if self._reads_images else inputs.to_numpy()
                return self._wrapped(self._values(cells, self.columns[0]))
            return self._of_columns({key: list(inputs[key]) for key in keys}, table=True)
        if isinstance(inputs, Mapping):
            return self._of_columns({key: inputs[key] for key in self._keys(list(inputs))})
        return self._values(inputs)

    def _of_columns(self, given: Mapping[Any, Any], *, table: bool = False) -> list[Any]:
        """Return the rows of some columns, in order; besides in a table, one value is every row's."""
        if len(given) == 1 and self._alone:
            return self._wrapped(self._values(_plain(next(iter(given.values())), self.columns[0]), self.columns[0]))
        values, lone = [], []
        for column, value in zip(self.columns, given.values(), strict=False):
            only = not table and _is_one(value, column)
            lone.append(only)
            plain = _plain(value, column)
            values.append([plain] if only else self._values(plain, column))
        counts = {len(one) for one, only in zip(values, lone, strict=True) if not only}
        if len(counts) > 1:
            told = ", ".join(f"{len(one)} of {key}" for key, one in zip(given, values, strict=True))
            raise InvalidInputError(f"The request's columns are of different lengths: {told}.")
        count = next(iter(counts), 1)
        return list(zip(*(one * count if only else one for one, only in zip(values, lone, strict=True)), strict=True))

    def _wrapped(self, values: list[Any]) -> list[Any]:
        """Return the values of the only column that is there as rows: a tuple among them is no row."""
        return values if len(self.columns) == 1 else [(value,) for value in values]

    def _values(self, inputs: Any, column: Column | None = None) -> list[Any]:
        """Return the values of a column or of a sequence.

        Args:
            inputs: The column or sequence.
            column: Which column it is: its values are no records and no pairs. None for a sequence of items.
        """
        if isinstance(inputs, str) or (column is not None and column.kind == "image" and is_image(inputs)):
            return [inputs]
        if isinstance(inputs, (bytes, bytearray)):
            raise InvalidInputError(_not_a_text("Text", 0, inputs))
        if isinstance(inputs, np.ndarray):
            return self._of_array(inputs, column)
        values = inputs.tolist() if hasattr(inputs, "tolist") else inputs  # a Series
        if not isinstance(values, (list, tuple)):
            what, one = ("images", "an image") if self._reads_images else ("texts", "a string")
            raise InvalidInputError(
                f"Cannot read {what} from {type(inputs).__name__}: pass {one}, a list of such or a table."
            )
        if self._reads_images and (array := pixels_in(values)) is not None:
            return self._of_array(array, column) if array.ndim == 4 else [array]
        return list(values) if column is not None else [self._of_element(value) for value in values]

    @property
    def _reads_images(self) -> bool:
        return self.columns[0].kind == "image"

    def _of_array(self, array: Array, column: Column | None) -> list[Any]:
        if self._reads_images and array.dtype.kind in "biuf":
            if array.ndim != 4:
                raise InvalidInputError(
                    f"Cannot read images from an array of shape {array.shape}: pass (height, width, channels), or "
                    f"(images, height, width, channels)."
                )
            return list(array)
        single = column is not None
        width = array.shape[1] if array.ndim == 2 else 1
        if array.ndim <= 1 or array.size == array.shape[0]:
            values = list(array.reshape(-1).tolist())
            return values if single else [self._of_element(value) for value in values]
        if single or array.ndim > 2 or not self._fits(width):
            raise InvalidInputError(
                f"Cannot read {self.columns[0].kind}s from an array of shape {array.shape}: pass one a row, in one "
                f"dimension or one column.{self._pairs()}"
            )
        return [tuple(row) for row in array.tolist()]

    def _of_element(self, value: Any) -> Any:
        try:
            return self._of_any_element(value)
        except InvalidInputError:
            if not self.lenient:
                raise
            return None

    def _of_any_element(self, value: Any) -> Any:
        """Return what an element of a sequence holds: a text, a record of columns, or their values in order."""
        if isinstance(value, Mapping) and not (self._reads_images and is_image(value)):
            keys = self._keys(list(value))
            return tuple(_plain(value[key], column) for key, column in zip(keys, self.columns, strict=False))
        if len(self.columns) == 1:
            return (value,) if isinstance(value, tuple) else value
        value = _plain(value, self.columns[0])
        if isinstance(value, (list, tuple)) and self._fits(len(value)):
            return tuple(_plain(one, column) for one, column in zip(value, self.columns, strict=False))
        if isinstance(value, (list, tuple)):
            order = ", ".join(one.name for one in self.columns)
            raise InvalidInputError(f"Cannot read {shown(value)} as an item, which has, in order: {order}.")
        return value

    def _fits(self, width: int) -> bool:
        return len(_needed(self.columns)) <= width <= len(self.columns)

    def _keys(self, keys: list[Any]) -> list[Any]:
        """Return the keys of the columns, in the columns' order; none where there are no keys at all."""
        if not keys:
            return []
        named = [key for key in keys if isinstance(key, str)]  # comparing others, such as pandas.NA, gives no bool
        own = {key for column in self.columns for key in column.keys}
        if pair := [key for key in named if key in TEXT_PAIR.keys and key not in own]:
            raise InvalidInputError(
                f"The request has the column '{pair[0]}', and {self.who} reads no pairs of texts. Leave it out, "
                f"or join the two as the model was trained to read them."
            )
        if len(keys) == 1 and self._alone and not any(keys[0] in column.keys for column in self.columns[1:] if named):
            return keys
        if not named and len(keys) == len(self.columns) and not self._alone:  # a table without names
            return keys
        found = [[key for key in named if key in column.keys] for column in self.columns]
        while found and not found[-1] and self.columns[len(found) - 1].optional:
            found.pop()
        if any(len(one) != 1 for one in found):
            raise InvalidInputError(self._untold(keys))
        return [one[0] for one in found]

    def _untold(self, keys: list[Any]) -> str:
        if self._alone:
            name, kind = self.columns[0].name, self.columns[0].kind
            return (
                f"Cannot tell which column holds the {kind}s: got {shown(keys, 200)}. Pass one column, or name it "
                f"'{name}'."
            )
        needed = " and ".join(f"'{one.name}'" for one in _needed(self.columns))
        return f"Cannot tell which columns hold what {self.who} reads: got {shown(keys, 200)}. It needs {needed}."

    def _pairs(self) -> str:
        if len(self.columns) > 1:
            return f" Columns in order: {', '.join(one.name for one in self.columns)}."
        if self._reads_images:
            return ""
        return f" {self.who[:1].upper()}{self.who[1:]} reads no pairs of texts."


def _is_one(value: Any, column: Column) -> bool:
    """Tell whether a value is one item's, and not a sequence of several items' values."""
    if column.kind == "image":
        return is_image(_plain(value, column))
    if not column.many:
        return isinstance(_plain(value, column), str)
    values = _plain(value, column)
    return isinstance(values, (list, tuple)) and bool(values) and all(isinstance(one, str) for one in values)


def _plain(value: Any, column: Column) -> Any:
    """Return a value without numpy's arrays, but those of pixels: MLflow's server makes arrays of records' values."""
    if not isinstance(value, np.ndarray) or (column.kind == "image" and value.dtype.kind in "biuf"):
        return value
    return value.tolist()


def checked_row(index: int, row: Any, columns: Sequence[Column]) -> Any:
    """Return an item whose values are texts or images, or lists of texts where a column is of such.

    Args:
        index: Its place in the request, for messages.
        row: One of :func:`raw_rows`.
        columns: What the task reads.

    Raises:
        InvalidInputError: They are none.
    """
    values = row if isinstance(row, tuple) else (row,)
    if len(values) < len(_needed(columns)):
        needed = " and ".join(f"'{one.name}'" for one in _needed(columns))
        raise InvalidInputError(f"Item {index} must have {needed}, got {shown(row)}.")
    found = [_value(index, value, column) for value, column in zip(values, columns, strict=False)]
    return found[0] if len(found) == 1 and not isinstance(found[0], tuple) else tuple(found)


def _value(index: int, value: Any, column: Column) -> Any:
    title = _title(column)
    if column.kind == "image":
        if _is_missing(value):
            raise InvalidInputError(_missing(title, index, value))
        return read_image(title, index, value)
    if column.many or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = _plain(value, column)
    if not column.many:
        if not isinstance(value, str):
            raise InvalidInputError(_not_a_text(title, index, value))
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise InvalidInputError(f"{title} of item {index} must be a list of at least one text, got {shown(value)}.")
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise InvalidInputError(_not_a_text(f"{title} of item {index}: text", place, text))
    return tuple(value)


def check_alike(items: Sequence[Any], columns: Sequence[Column]) -> None:
    """Refuse a request of items with more and with fewer columns: one of them has likely lost a side.

    Raises:
        InvalidInputError: It is one.
    """
    if len(columns) == 1:
        return
    widths = [width_of(item) for item in items]
    if len(set(widths)) > 1:
        most = max(widths)
        lacking, whole = next(index for index, width in enumerate(widths) if width < most), widths.index(most)
        raise InvalidInputError(
            f"Item {lacking} has no {columns[most - 1].name}, and item {whole} has one. Ask for the two kinds in "
            f"requests of their own."
        )


def _title(column: Column) -> str:
    return column.name[:1].upper() + column.name[1:]


def _not_a_text(title: str, index: int, value: Any) -> str:
    if _is_missing(value):
        return _missing(title, index, value)
    if isinstance(value, (bytes, bytearray)):
        return f"{title} {index} is bytes. Decode it first, for example with .decode('utf-8')."
    return f"{title} {index} must be a string, got {type(value).__name__} ({shown(value)})."


def _missing(title: str, index: int, value: Any) -> str:
    return f"{title} {index} is missing ({shown(value)}). Fill or drop missing values first."


def _is_missing(value: Any) -> bool:
    """Tell whether a value is None, NaN, NaT or ``pandas.NA``, whose comparisons give no bool."""
    if value is None or type(value).__name__ == "NAType":
        return True
    return type(value).__name__ == "NaTType" or (isinstance(value, (float, np.generic)) and bool(value != value))
