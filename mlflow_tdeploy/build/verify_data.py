"""The data that variants are verified on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlflow_tdeploy.core.columns import records_of, text_columns
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.evidence import DataRecord
from mlflow_tdeploy.core.images import is_image, made_up_image
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.tensors import Arrays, At

_LABEL_KEYS = ("label", "labels")
#: Of questions, as SQuAD calls them.
_ANSWERS = "answers"
_log = logging.getLogger("mlflow_tdeploy")

#: Fewer texts than these are joined by built-in ones: a variant that is far off on few texts of many shall be found.
#: An image costs as much as a long text.
_FEWEST = {"text": 200, "image": 64}
_DEFAULT, _GENERATED, _PICTURES = "default", "generated from the signature", "made-up pictures"
#: Least and most height and width of those.
_SIDES = (32, 480)
#: Of requests that are made up: so many of each kind.
_SEEDS = (7, 8, 9)
_GLOSSES = "glosses.txt"
#: How many of them are used, taken evenly over the file, which holds short and long ones.
_TEXTS = 256
_FORMS = (
    "Pass a list of texts or images, or of pairs where the task reads such; a table or mapping with 'text', or what "
    "else the task reads, and optionally 'label'; or, for task 'tensors', a list of mappings from input name to array."
)


@dataclass(frozen=True, eq=False)
class VerifyData:
    """Items that every variant answers, as the reference did.

    Attributes:
        texts: For tasks of items: texts or images, or what the task's columns hold; records of these until it is known
            which task.
        requests: For ``tensors``: one name → array mapping per request.
        labels: The right answer per item, or None; items that were only added to have enough come last and have none.
        name: Where the data is from, for people.
    """

    texts: tuple[Any, ...] = ()
    requests: tuple[Arrays, ...] = ()
    labels: tuple[Any, ...] | None = None
    name: str = "given"

    def __post_init__(self) -> None:
        count = len(self.texts) or len(self.requests)
        if self.labels is not None and len(self.labels) > count:
            raise _uneven(count, self.labels)

    @classmethod
    def of(cls, value: Any, name: str = "given") -> VerifyData:
        """Make verification data from what a user passes.

        Args:
            value: None (256 WordNet definitions, pictures or arrays that are made up), a list of texts or images, a
                DataFrame or mapping with such and optional labels, or a list of name → array mappings.
            name: Where it is from.

        Raises:
            InvalidInputError: Not of that form, or empty.
        """
        if isinstance(value, VerifyData):
            return value
        if value is None:
            return cls(name=_DEFAULT)
        if hasattr(value, "columns") or isinstance(value, Mapping):
            return _of_table(value, name)
        if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):  # a Series or an array
            value = list(value) if getattr(value, "ndim", 1) == 4 else value.tolist()  # of the first, each is an image
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise InvalidInputError(f"Data cannot be of type {type(value).__name__}. {_FORMS}")
        if value and all(isinstance(item, Mapping) for item in value):
            table = _columns(value)
            if any(holds_items(item) for item in value):
                return _of_table(table, name)
            return cls(requests=tuple(_arrays(item) for item in value), name=name)
        return cls(texts=_texts(value), name=name)

    def for_task(self, task: Task, examples: Sequence[Arrays] = ()) -> VerifyData:
        """Return the data in the form that ``task`` takes, the default data filled in.

        Args:
            task: The task.
            examples: For ``tensors``: requests that came with the model, which what is made up shall be like.

        Raises:
            InvalidInputError: The data does not fit the task or the signature.
        """
        data = self._for_items(task) if task.columns else self._for_tensors(task, examples)
        if data.labels is not None:
            task.check_labels(data.labels, data.texts)
        return data

    def items_of(self, task: Task) -> VerifyData:
        """Return the data as the task's items.

        Raises:
            InvalidInputError: It is none that the task reads.
        """
        if self.requests and task.input_kind == "image":  # arrays may be images, which only the task knows
            return self._of_pixels(task)
        if not self.texts:
            raise InvalidInputError(f"A task of {task.input_kind}s takes such, got arrays. {_FORMS}")
        return replace(self, texts=_items(task, self.texts))

    def _of_pixels(self, task: Task) -> VerifyData:
        """Return arrays by name as images: records of one each, or a column of them all, with labels or without."""
        images: list[Any] = []
        labels: list[Any] = []
        for request in self.requests:
            label = next((request[key] for key in _LABEL_KEYS if key in request), None)
            found = task.items({name: array for name, array in request.items() if name not in _LABEL_KEYS})
            images += found
            labels += [] if label is None else np.asarray(label).reshape(-1).tolist()
        if labels and len(labels) != len(images):
            raise _uneven(len(images), labels)
        return replace(self, texts=tuple(images), requests=(), labels=tuple(map(_plain, labels)) or None)

    def _for_items(self, task: Task) -> VerifyData:
        if self.name == _DEFAULT and not self.items:
            return _built_in(task)
        given = self.items_of(task)
        if len(given.texts) >= (fewest := _FEWEST[task.input_kind]):
            return given
        built_in = _built_in(task, given.texts[0])
        more = [one for one in built_in.texts if not isinstance(one, (str, tuple)) or one not in given.texts]
        more = more[: fewest - len(given.texts)]
        unlabelled = " without labels" if given.labels is not None else ""
        return replace(
            given, texts=(*given.texts, *more), name=f"{self.name} and {len(more)} {built_in.name}{unlabelled}"
        )

    def _for_tensors(self, task: Task, examples: Sequence[Arrays]) -> VerifyData:
        if self.texts:
            raise InvalidInputError(f"Task '{task.name}' is verified on arrays, got texts. {_FORMS}")
        if not self.requests:
            usable = tuple(_usable(task, examples))
            _warn_blind(task, usable)
            name = "requests that came with the model" if usable else _GENERATED
            return replace(self, requests=usable or _generated(task), name=name)
        requests = []
        for index, request in enumerate(self.requests):
            try:
                requests.append(task.items(request)[0])
            except InvalidInputError as error:
                raise InvalidInputError(f"Verification request {index}: {error}") from error
        return replace(self, requests=tuple(requests))

    @property
    def real(self) -> Sequence[Any] | None:
        """What somebody gave, to fill shapes with that nobody gave; None where all is made up."""
        return None if self.name in (_GENERATED, _PICTURES) else self.items

    @property
    def items(self) -> Sequence[Any]:
        """Texts or images, or name → array mappings."""
        return self.texts or self.requests

    @property
    def sha256(self) -> str:
        """Digest of items and labels: equal for equal data, whatever it is called."""
        digest = hashlib.sha256(json.dumps([self.texts, self.labels], default=_digest, ensure_ascii=True).encode())
        for request in self.requests:
            for name in sorted(request):
                array = np.ascontiguousarray(request[name])
                digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def record(self) -> DataRecord:
        """What evidence says about its data."""
        return DataRecord(self.name, self.sha256, len(self.items))


def default_texts() -> tuple[str, ...]:
    """Return the texts that variants are verified on when none are given."""
    text = (importlib.resources.files("mlflow_tdeploy.build") / "data" / _GLOSSES).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line]
    return tuple(lines[index * len(lines) // _TEXTS] for index in range(_TEXTS))


def _built_in(task: Task, like: Any = None) -> VerifyData:
    """Return what a task of items is verified on when nothing is given.

    Args:
        task: The task.
        like: An item that it shall be like.
    """
    if task.input_kind == "image":
        sizes = np.random.default_rng(0).integers(*_SIDES, (_FEWEST["image"], 2))
        images = (made_up_image(seed, height, width) for seed, (height, width) in enumerate(sizes.tolist()))
        return VerifyData(texts=tuple(images), name=_PICTURES)
    return VerifyData(texts=_items(task, task.sample(default_texts(), like)), name="WordNet definitions")


def _digest(value: Any) -> str:
    """Return what stands for a value that JSON does not know: images, by their content."""
    if isinstance(value, np.ndarray):
        return f"{value.shape}{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _of_table(value: Any, name: str) -> VerifyData:
    columns = [str(column) for column in (value.columns if hasattr(value, "columns") else value)]
    keys = text_columns(columns, (task.columns for task in TASKS))
    keys = {name: key for name, key in keys.items() if _holds(name, value[key])}
    label_keys = (*_LABEL_KEYS, *([_ANSWERS] if "question" in keys else []))
    label_key = next((key for key in label_keys if key in columns), None)
    if not keys:
        if isinstance(value, Mapping) and value:
            return VerifyData(requests=(_arrays(value),), name=name)
        raise InvalidInputError(f"The verification table has no column of texts or images, only {columns}. {_FORMS}")
    labels = None if label_key is None else tuple(_plain(label) for label in _listed(value[label_key]))
    table = {name: _listed(value[key]) for name, key in keys.items()}
    if len({len(one) for one in table.values()}) > 1:
        raise InvalidInputError(f"The columns {', '.join(keys.values())} of the data are of different lengths.")
    texts = _texts(records_of(table))
    if labels is not None and len(labels) != len(texts):
        raise _uneven(len(texts), labels)
    return VerifyData(texts=texts, labels=labels, name=name)


def _uneven(count: int, labels: Sequence[Any]) -> InvalidInputError:
    return InvalidInputError(
        f"The verification data has {count} items and {len(labels)} labels: give one label per item."
    )


def _holds(name: str, cells: Any) -> bool:
    """Tell whether a column holds what its name says: a graph may have an input of that name, a table a number so."""
    if isinstance(cells, np.ndarray) and cells.dtype.kind in "biuf":
        return False
    images = {column.name for task in TASKS for column in task.columns if column.kind == "image"}
    values = [cells] if is_image(cells) else _listed(cells)
    return name not in images or not values or any(is_image(one) for one in values)


def holds_items(row: Mapping[str, Any]) -> bool:
    """Tell whether a row of a dataset is an item of texts or images, and not the arrays of a request."""
    return bool(text_columns(row, (task.columns for task in TASKS))) and _is_record(row)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    return list(value.tolist() if hasattr(value, "tolist") else value)


def _is_record(item: Mapping[Any, Any]) -> bool:
    """Tell whether a mapping holds an image, a text, or a list of these: an array of texts is an input of a graph."""
    if any(is_image(one) and not isinstance(one, np.ndarray) for one in item.values()):
        return True
    values = (one.item() if isinstance(one, np.ndarray) and one.ndim == 0 else one for one in item.values())
    return any(isinstance(one, str) or (isinstance(one, list) and one and isinstance(one[0], str)) for one in values)


def _columns(records: Sequence[Mapping[Any, Any]]) -> dict[str, list[Any]]:
    """Return records as columns; what one has not is None there, which is told as missing where it is read."""
    names = dict.fromkeys(str(name) for record in records for name in record)
    return {name: [_scalar(record.get(name)) for record in records] for name in names}


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _items(task: Task, texts: Sequence[Any]) -> tuple[Any, ...]:
    """Return data as the task's items.

    Raises:
        InvalidInputError: It is none that the task reads.
    """
    if task.input_kind == "text" and len(task.columns) == 1 and all(isinstance(text, str) for text in texts):
        return tuple(texts)
    try:
        return tuple(task.items(list(texts)))
    except InvalidInputError as error:
        raise InvalidInputError(f"Of the data: {error}") from error


def _texts(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return texts, images, pairs or records; which of them the task reads is checked when it is known."""
    if not values:
        raise InvalidInputError("The data is empty: give at least one item, or None for the default.")
    for index, text in enumerate(values):
        if not is_image(text) and not isinstance(text, (list, tuple, Mapping)):
            raise InvalidInputError(f"The data's item {index} must be a text or an image, got {type(text).__name__}.")
    return tuple(values)


def _arrays(request: Mapping[Any, Any]) -> Arrays:
    try:
        return {str(name): np.asarray(array) for name, array in request.items()}
    except ValueError as error:  # rows of different lengths
        raise InvalidInputError(
            f"The data's {', '.join(map(str, request))} are no arrays: {error}. {_FORMS}"
        ) from error


def _plain(label: Any) -> Any:
    value = label.item() if isinstance(label, np.generic) else label
    if isinstance(value, Mapping):  # the answers of a question, say
        return {str(key): one.tolist() if isinstance(one, np.ndarray) else one for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):  # of spans, say
        return [dict(one) if isinstance(one, Mapping) else _plain(one) for one in value]
    if not isinstance(value, (str, int, float)) or value != value:
        raise InvalidInputError(
            f"A label must be a class name or number, or a list of spans or answers, got {label!r}."
        )
    return value


def _usable(task: Task, examples: Sequence[Arrays]) -> Iterator[Arrays]:
    """Yield the examples that are requests: one that is only there to be traced may be of another dtype."""
    for example in examples:
        with contextlib.suppress(InvalidInputError):
            yield task.items(example)[0]


def _warn_blind(task: Task, items: Sequence[Arrays]) -> None:
    if unknown := task.made_up_blindly(items):
        _log.warning(
            "Nobody says which values the input '%s' takes, so variants are checked with 0 and 1 only. Give example=… "
            "or verify_with=….",
            unknown[0],
        )


def _generated(task: Task) -> tuple[Arrays, ...]:
    """Make requests up: small and usual ones, full and ragged, several of each."""
    sizes: tuple[At, ...] = ("min", "opt")
    corners = [(at, ragged) for at in sizes for ragged in (False, True)]
    return tuple(task.example_feeds(at, ragged=ragged, seed=seed) for seed in _SEEDS for at, ragged in corners)
