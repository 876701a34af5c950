"""Texts or images with the right answers, from a file or a folder."""

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
#: Of files that are images.
IMAGE_SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_WHOLE = re.compile(r"-?[0-9]{1,9}")
#: Forms of tables, by the file's ending.
_TABLES: Mapping[str, Mapping[str, Any]] = {".csv": {}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}


@dataclass(frozen=True)
class Labelled:
    """Texts or images with the right answers.

    Attributes:
        texts: The texts; records where there are several columns of them, or images.
        labels: Names or class indices.
    """

    texts: tuple[Any, ...]
    labels: tuple[Any, ...]

    @classmethod
    def read(cls, path: Path) -> Labelled:
        """Read a file: CSV or TSV with the columns ``text`` and ``label``, or JSON lines with these keys; or a folder.

        Instead of ``text`` there may be what else a task reads, such as ``question`` and ``context``. A list, such as
        of documents, is JSON in a table; an ``image`` is the path of a file, beside the table or in a folder there. Of
        a folder, each folder in it is called as the class of the images in it.

        A column of nothing but whole numbers is one of class indices; of a model whose labels are numbers, of those.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is not of that form, or empty.
        """
        if path.is_dir():
            return cls._of_folders(path)
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
            texts = tuple(_with_files(path.parent, one) for one in texts)
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

    @classmethod
    def _of_folders(cls, path: Path) -> Labelled:
        classes = [one for one in sorted(path.iterdir()) if one.is_dir() and not one.name.startswith(".")]
        found = [(file, one.name) for one in classes for file in image_files(one)]
        if not found:
            raise InvalidInputError(f"'{path}' has no folders with images in them: each is to be called as a class.")
        return cls(tuple({"image": file} for file, _ in found), tuple(name for _, name in found))


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder and those in it, by their names; hidden ones are none."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    return sorted(file for file in found if not any(one.startswith(".") for one in file.relative_to(folder).parts))


def _with_files(folder: Path, text: Any) -> Any:
    """Return a row with its images as files of a folder.

    Raises:
        ValueError: One is none, or none of that folder.
    """
    if not isinstance(text, dict):
        return text
    images = {column.name for task in TASKS for column in task.columns if column.kind == "image"}
    lenient = bool(set(text) - images)  # where there are texts, too, the images may be none that anybody asks for
    return {name: _file(folder, one, lenient=lenient) if name in images else one for name, one in text.items()}


def _file(folder: Path, name: Any, *, lenient: bool) -> Any:
    found = folder / str(name)
    if found.is_file() and found.resolve().is_relative_to(folder.resolve()):
        return found
    if lenient:
        return name
    raise ValueError(f"there is no image '{name}' in the table's folder")


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
