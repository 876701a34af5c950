"""Texts with the right answers, from a file."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.columns import records_of, text_columns
from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, first_line
from mlflow_tdeploy.core.tasks import TASKS

_LABEL = "label"
_WHOLE = re.compile(r"-?[0-9]{1,9}")
#: Forms of tables, by the file's ending.
_TABLES: Mapping[str, Mapping[str, Any]] = {".csv": {}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}


@dataclass(frozen=True)
class Labelled:
    """Texts with the right answers.

    Attributes:
        texts: The texts; records where there are several columns of them.
        labels: Names or class indices.
    """

    texts: tuple[Any, ...]
    labels: tuple[Any, ...]

    @classmethod
    def read(cls, path: Path) -> Labelled:
        """Read a file: CSV or TSV with the columns ``text`` and ``label``, or JSON lines with these keys.

        Instead of ``text`` there may be what else a task reads, such as ``question`` and ``context``. A list, such as
        of documents, is JSON in a table.

        A column of nothing but whole numbers is one of class indices; of a model whose labels are numbers, of those.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is not of that form, or empty.
        """
        form = _TABLES.get(path.suffix.lower())
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:  # Excel begins a table with a mark
                lines = (json.loads(line) for line in file if line.strip())
                rows: list[Mapping[str, Any]] = [*(lines if form is None else csv.DictReader(file, **form))]
            keys = text_columns(rows[0] if rows else (), (task.columns for task in TASKS))
            if rows and (lacking := [key for key in (_LABEL,) if key not in rows[0]] if keys else ["text"]):
                raise ValueError(f"'{lacking[0]}' is not there, found {', '.join(map(str, rows[0])) or 'nothing'}")
            texts = tuple(records_of({name: [row[key] for row in rows] for name, key in keys.items()}))
            labels = tuple(row[_LABEL] for row in rows)
            if None in labels:
                raise ValueError(f"row {labels.index(None)} has no label")
            if form is not None:  # a table has no lists
                texts, labels = tuple(map(_with_lists, texts)), tuple(map(_list_in, labels))
            if form is not None and all(isinstance(one, str) and _WHOLE.fullmatch(one) for one in labels):
                labels = tuple(map(int, labels))
        except FileNotFoundError:
            raise NotFoundError(f"There is no file '{path}'.") from None
        except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
            raise InvalidInputError(
                f"'{path}' is neither CSV or TSV with the columns text and label nor JSON lines with these keys: "
                f"{first_line(error)}"
            ) from error
        if not texts or not all(isinstance(one, (str, dict)) for one in texts):
            raise InvalidInputError(f"'{path}' holds no texts.")
        return cls(texts, labels)


def _with_lists(text: Any) -> Any:
    """Return a row's texts, of which some columns hold lists."""
    many = {column.name for task in TASKS for column in task.columns if column.many}
    if not isinstance(text, dict):
        return text
    return {name: _list_in(one) if name in many else one for name, one in text.items()}


def _list_in(cell: Any) -> Any:
    """Return the list in a cell, where it is JSON of one; else the cell."""
    if isinstance(cell, str) and cell.startswith("["):
        with contextlib.suppress(ValueError):
            found = json.loads(cell)
            return found if isinstance(found, list) else cell
    return cell
