"""Requests of which some items cannot be used: with ``errors="null"`` the others are answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.columns import Column, checked_row, raw_rows, texts_in, width_of
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import ERRORS, Encoded, Task


@dataclass(frozen=True)
class Usable:
    """What of a request can be answered.

    Attributes:
        items: The items that can.
        places: Where in the request each is; None where all can.
        count: How many items the request has.
        encoded: What :meth:`Task.encode` makes of the items, where that had to be known.
    """

    items: list[Any]
    places: Sequence[int] | None
    count: int
    encoded: Encoded | None = None

    def filled(self, answers: Any) -> Any:
        """Return what was made of the items' answers, with None for every item that was left out."""
        if self.places is None:
            return answers
        found: list[Any] = [None] * self.count
        for place, answer in zip(self.places, answers, strict=True):
            found[place] = answer
        return found


def leaves_gaps(params: Mapping[str, Any] | None) -> bool:
    """Tell whether a request wants answers to the items that can be used alone."""
    return (params or {}).get(ERRORS.name) == "null"


def usable(task: Task, inputs: Any, params: Mapping[str, Any]) -> Usable:
    """Return the items of a request, without those that cannot be used where that is asked for.

    Args:
        task: The task.
        inputs: What the user passed.
        params: See :meth:`Task.check_params`.

    Raises:
        InvalidInputError: One cannot be used, and nobody asked for the others alone; it is no request at all; or its
            parameters fit no item.
    """
    if not leaves_gaps(params) or not task.columns:
        items = task.items(inputs)
        return Usable(items, None, len(items))
    task.check_encoding(params)
    try:
        items = task.items(inputs)
        encoded = task.encode(items, params)
    except InvalidInputError:
        pass
    else:
        return Usable(items, None, len(items), encoded)

    def one(index: int, row: Any) -> Any:
        item = task.item(index, row)
        task.encode([item], params)
        return item

    return _one_by_one(raw_rows(inputs, task.columns, f"task '{task.name}'", lenient=True), one)


def readable(columns: Sequence[Column], inputs: Any, who: str) -> Usable:
    """Return the items of a request that somebody else answers, without those that are no texts.

    Args:
        columns: What is read.
        inputs: What the user passed.
        who: Who reads it, for messages.

    Raises:
        InvalidInputError: It is no request at all.
    """

    def one(index: int, row: Any) -> Any:
        item = checked_row(index, row, columns)
        for text in texts_in(item):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # it cannot be sent
                raise InvalidInputError(f"Text {index} is not valid Unicode: {error}.") from error
        return item

    return _one_by_one(raw_rows(inputs, columns, who, lenient=True), one)


def _one_by_one(rows: Sequence[Any], read: Callable[[int, Any], Any]) -> Usable:
    found: dict[int, Any] = {}
    for place, row in enumerate(rows):
        try:
            found[place] = read(place, row)
        except InvalidInputError:
            continue
    usual = _usual(width_of(item) for item in found.values())  # others have lost a side, or have one too many
    whole = {place: item for place, item in found.items() if width_of(item) == usual}
    return Usable(list(whole.values()), list(whole), len(rows))


def _usual(widths: Iterable[int]) -> int:
    """Return how many columns most items have; of as many the more."""
    return max(((count, width) for width, count in Counter(widths).items()), default=(0, 0))[1]
