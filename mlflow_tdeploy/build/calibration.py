"""The batches that activations are looked at on, where a recipe chooses by what numbers are met."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_tdeploy.build.reference import corner_sizes, never
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.pipeline import Pipeline
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays

#: Most items, and most elements (tokens, for text) of the batch at the usual sizes.
MOST, _ELEMENTS = 256, 2048
#: Most padded tokens of a batch of items: many small ones say more than few large ones, as each has ranges of its own.
_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Calibration:
    """Requests in batches.

    Attributes:
        task: The task.
        data: Its items, in the task's form.
        most: Of more items, so many are drawn.
        seed: Of the drawing, and of what is made up.
    """

    task: Task
    data: VerifyData
    most: int = MOST
    seed: int = 0

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
        found = Pipeline(self.task, never, token_budget=_TOKENS).batches(encoded)
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
        }
