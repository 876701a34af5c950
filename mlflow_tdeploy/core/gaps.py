"""Requests of which some items cannot be used: with ``errors="null"`` the others are answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.columns import raw_rows
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import ERRORS, Task


@dataclass(frozen=True)
class Usable:
    """What of a request can be answered.

    Attributes:
        items: The items that can.
        places: Where in the request each is; None where all can.
        count: How many items the request has.
    """

    items: list[Any]
    places: Sequence[int] | None
    count: int

    def filled(self, answers: Any) -> Any:
        """Return what the task made of the items' answers, with None for every item that was left out."""
        if self.places is None:
            return answers
        found: list[Any] = [None] * self.count
        for place, answer in zip(self.places, answers, strict=True):
            found[place] = answer
        return found


def usable(task: Task, inputs: Any, params: Mapping[str, Any]) -> Usable:
    """Return the items of a request, without those that cannot be used where that is asked for.

    Args:
        task: The task.
        inputs: What the user passed.
        params: See :meth:`Task.check_params`.

    Raises:
        InvalidInputError: One cannot be used, and nobody asked for the others alone; or it is no request at all.
    """
    if params.get(ERRORS.name) != "null":
        items = task.items(inputs)
        return Usable(items, None, len(items))
    try:
        items = task.items(inputs)
        task.encode(items, params)
    except InvalidInputError:
        return _one_by_one(task, inputs, params)
    return Usable(items, None, len(items))


def _one_by_one(task: Task, inputs: Any, params: Mapping[str, Any]) -> Usable:
    rows = raw_rows(inputs, task.columns, f"task '{task.name}'")
    found: dict[int, Any] = {}
    for place, row in enumerate(rows):
        try:
            (item,) = task.items([row])
            task.encode([item], params)
        except InvalidInputError:
            continue
        found[place] = item
    widths = {place: 1 if isinstance(item, str) else len(item) for place, item in found.items()}
    widest = max(widths.values(), default=0)  # others have lost a side
    whole = {place: item for place, item in found.items() if widths[place] == widest}
    return Usable(list(whole.values()), list(whole), len(rows))
