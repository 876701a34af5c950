"""The batches that activations are looked at on, where a recipe chooses by what numbers are met."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlflow_tdeploy.build.reference import corner_sizes, never
from mlflow_tdeploy.build.verify_data import VerifyData, holds_items
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.pipeline import Pipeline
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays

#: Most items, and most elements (tokens, for text) of the batch at the usual sizes.
MOST, _ELEMENTS = 256, 2048
#: Most padded tokens of a batch of items: many small ones say more than few large ones, as each has ranges of its own.
_TOKENS = 1024
#: Fewer items say little about ranges.
_FEW = 16
_log = logging.getLogger("mlflow_tdeploy")


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """What ranges of activations are found on, and how much of it.

    Attributes:
        data: Texts, a table, requests, a dataset, a reader with ``get_next``, as ONNX Runtime's quantizers take, or an
            iterator of texts or requests; None for what variants are checked on.
        most: Of more items, so many are drawn; of a reader or an iterator, which is read once, the first so many are
            taken.
        seed: Of the drawing, and of the order of batches.
        batch_tokens: Most padded tokens of a batch of texts; arrays stay in the batches they come in.

    Raises:
        InvalidInputError: A number that is none, or is less than one (of the seed: than zero).
    """

    data: Any = None
    most: int = MOST
    seed: int = 0
    batch_tokens: int = _TOKENS

    def __post_init__(self) -> None:
        for name, least in (("most", 1), ("seed", 0), ("batch_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInputError(
                    f"{name} of CalibrationData must be an integer of at least {least}, got {value!r}."
                )

    @classmethod
    def of(cls, value: Any) -> CalibrationData:
        """Return what a user passes to calibrate with, read once.

        Raises:
            InvalidInputError: Not of a form that is known, or empty.
        """
        said = value if isinstance(value, CalibrationData) else cls(value)
        return said if said.data is None else replace(said, data=_read(said.data, said.most))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Requests in batches.

    Attributes:
        task: The task.
        data: Its items, in the task's form.
        most: Of more items, so many are drawn.
        seed: Of the drawing, and of what is made up.
        batch_tokens: Most padded tokens of a batch of texts.
    """

    task: Task
    data: VerifyData
    most: int = MOST
    seed: int = 0
    batch_tokens: int = _TOKENS

    @classmethod
    def of(cls, task: Task, data: VerifyData, said: CalibrationData) -> Calibration | None:
        """Return what there is: what was given for this, else what variants are checked on.

        Args:
            task: The task.
            data: What variants are checked on, in the task's form.
            said: What was said of it, see :meth:`CalibrationData.of`.

        Returns:
            None where all that there is is made up: ranges would fit that alone.

        Raises:
            InvalidInputError: What was given is not what the task takes.
        """
        found = data if said.data is None else cls._fitted(task, said.data)
        if said.data is None and data.real is None:
            return None
        return cls(task, found, said.most, said.seed, said.batch_tokens)

    @staticmethod
    def _fitted(task: Task, given: VerifyData) -> VerifyData:
        if task.columns:
            try:
                given = given.items_of(task)
                task.encode(task.items(list(given.texts)))
            except InvalidInputError as error:  # drawn by chance, a text would be known by another number
                raise InvalidInputError(f"Of the {task.input_kind}s to calibrate with: {error}") from error
            return given
        if given.texts:
            raise InvalidInputError(f"Task '{task.name}' is calibrated on arrays by input name, got other data.")
        return replace(given, requests=tuple(_fitting(task, given)))

    def warn_of_few(self) -> None:
        """Say so where there is too little to tell what numbers are met."""
        if (count := min(self.most, len(self.data.items))) < _FEW:
            _log.warning("%d items to calibrate with say little about what numbers are met: give more.", count)

    @functools.cached_property
    def batches(self) -> tuple[Arrays, ...]:
        """Graph inputs: every item once, in the order of a draw.

        Texts come in batches as serving makes them, and besides joined to the signature's usual length: short texts
        alone would say nothing about the ends of long ones.
        """
        return (*self._of_items(), *(self._joined() if self.data.texts else ()))

    def _of_items(self) -> Iterator[Arrays]:
        items, random = list(self.data.items), np.random.default_rng(self.seed)
        drawn = random.permutation(len(items))[: self.most]
        if not self.data.texts:
            yield from (items[index] for index in drawn)
            return
        encoded = self.task.encode(self.task.items([items[index] for index in drawn]))
        found = Pipeline(self.task, never, token_budget=self.batch_tokens).batches(encoded)
        for index in random.permutation(len(found)):  # long ones among short ones
            yield encoded.collate(found[index])

    def _joined(self) -> Iterator[Arrays]:
        for sizes in corner_sizes(self.task.signature, "opt", _ELEMENTS):
            for seed in (self.seed, self.seed + 1):
                yield self.task.example_feeds("opt", ragged=True, seed=seed, sizes=sizes, items=self.data.real)

    @property
    def record(self) -> dict[str, Any]:
        """What a variant's record says about it."""
        data = self.data.record
        return {
            "data": data.name,
            "sha256": data.sha256,
            "items": min(self.most, len(self.data.items)),
            "batches": len(self.batches),
            "seed": self.seed,
            **({"batch_tokens": self.batch_tokens} if self.data.texts else {}),
        }


def _read(value: Any, most: int) -> VerifyData:
    if callable(reader := getattr(value, "get_next", None)):
        value = list(itertools.islice(iter(reader, None), most))
    elif (columns := getattr(value, "column_names", None)) is not None:  # of Hugging Face's datasets
        known = "text" in columns or (len(value) > 0 and holds_items(value[0]))
        value = {str(name): value[name] for name in columns} if known else list(value)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) and not hasattr(value, "__len__"):
        value = list(itertools.islice(value, most))
    if not isinstance(value, Mapping) and hasattr(value, "__len__") and len(value) == 0:
        raise InvalidInputError("The calibration data is empty: give at least one item, or leave calibrate_with out.")
    return VerifyData.of(value, "given to calibrate")


def _fitting(task: Task, given: VerifyData) -> Iterator[Arrays]:
    for index, request in enumerate(given.requests):
        try:
            yield task.items(request)[0]
        except InvalidInputError as error:
            raise InvalidInputError(f"Calibration request {index}: {error}") from error
