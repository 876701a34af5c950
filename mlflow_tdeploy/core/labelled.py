"""Texts with the right answers, from a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, first_line

_TEXT, _LABEL = "text", "label"
#: Forms of tables, by the file's ending.
_TABLES: Mapping[str, Mapping[str, Any]] = {".csv": {}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}


@dataclass(frozen=True)
class Labelled:
    """Texts with the right answers.

    Attributes:
        texts: The texts.
        labels: Names or class indices.
    """

    texts: tuple[str, ...]
    labels: tuple[Any, ...]

    @classmethod
    def read(cls, path: Path) -> Labelled:
        """Read a file: CSV or TSV with the columns ``text`` and ``label``, or JSON lines with these keys.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is not of that form, or empty.
        """
        form = _TABLES.get(path.suffix)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                lines = (json.loads(line) for line in file if line.strip())
                rows: list[Mapping[str, Any]] = [*(lines if form is None else csv.DictReader(file, **form))]
            texts, labels = (tuple(row[key] for row in rows) for key in (_TEXT, _LABEL))
        except FileNotFoundError:
            raise NotFoundError(f"There is no file '{path}'.") from None
        except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
            raise InvalidInputError(
                f"'{path}' is neither CSV or TSV with the columns text and label nor JSON lines with these keys: "
                f"{first_line(error)}"
            ) from error
        if not texts or not all(isinstance(one, str) for one in texts):
            raise InvalidInputError(f"'{path}' holds no texts.")
        return cls(texts, labels)
