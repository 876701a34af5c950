"""What all tasks share whose requests are items: texts, images, or several of them in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mlflow_tdeploy.core.columns import check_alike, raw_rows
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.tasks._base import Task
from mlflow_tdeploy.core.tasks._forms import ERRORS, Param


class ItemTask(Task):
    """A task whose :attr:`columns` say what an item consists of; it answers ``errors="null"``."""

    params: ClassVar[tuple[Param, ...]] = (ERRORS,)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if ERRORS not in cls.params:
            cls.params = (*cls.params, ERRORS)

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check ``errors``."""
        checked = super().check_params(params)
        if checked[ERRORS.name] not in ("raise", "null"):
            raise InvalidInputError(f"errors must be 'raise' or 'null', got {shown(checked[ERRORS.name])}.")
        return checked

    def items(self, inputs: Any) -> list[Any]:
        """Return the items of a request: of one value, a list, an array, a Series, a table or a mapping.

        An item is a text or an image, or a tuple of what the task's :attr:`columns` hold.
        """
        rows = raw_rows(inputs, self.columns, f"task '{self.name}'")
        items = [self.item(index, row) for index, row in enumerate(rows)]
        check_alike(items, self.columns)
        return items
