"""From a request to its answer: items, tokens, sorted batches, inference, answers in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from mlflow_tdeploy.core.batching import DEFAULT_TOKEN_BUDGET, plan_batches
from mlflow_tdeploy.core.gaps import usable
from mlflow_tdeploy.core.tasks import Encoded, Task
from mlflow_tdeploy.core.tensors import Arrays

Infer = Callable[[Arrays], Arrays]


class Pipeline:
    """One task over one inference function. Holds no state between calls, so threads may share it.

    Args:
        task: What to do before and after inference.
        infer: Maps input arrays to output arrays.
        single: Used instead of ``infer`` for a request that is one batch; the same function by default.
        token_budget: Most padded tokens in a batch.
        executor: Runs batches of one request at once; None runs them one after the other.
        workers: How many of them at once.
    """

    def __init__(
        self,
        task: Task,
        infer: Infer,
        *,
        single: Infer | None = None,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        executor: Executor | None = None,
        workers: int = 1,
    ) -> None:
        self.task = task
        self.infer = infer
        self.single = single or infer
        self._token_budget = token_budget
        self._executor = executor
        self._workers = workers if executor is not None else 1
        self._max_batch = task.max_batch

    def __call__(self, inputs: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Answer a request.

        Raises:
            InvalidInputError: The inputs or parameters cannot be used; nothing was run.
        """
        checked = self.task.check_params(params)
        found = usable(self.task, inputs, checked)
        if not found.items:
            return found.filled([])
        encoded = found.encoded or self.task.encode(found.items, checked)
        rows = self._run(encoded, checked)
        return found.filled(self.task.finish(self.task.answers(rows, encoded, checked), checked))

    def batches(self, encoded: Encoded) -> list[list[int]]:
        """Return the plan for an encoded request."""
        return plan_batches(
            encoded.lengths,
            max_batch=self._max_batch,
            token_budget=self._token_budget,
            workers=self._workers,
            pads=self.task.pads,
        )

    def _run(self, encoded: Encoded, params: Mapping[str, Any]) -> list[Any]:
        if len(encoded.lengths) == 1:  # the lone request: no plan, no other thread
            return list(self._run_batch(self.single, encoded, [0], params))
        batches = self.batches(encoded)
        infer = self.single if len(batches) == 1 else self.infer
        rows: list[Any] = [None] * len(encoded.lengths)

        def run(batch: list[int]) -> None:
            for index, row in zip(batch, self._run_batch(infer, encoded, batch, params), strict=True):
                rows[index] = row

        if self._executor is None or len(batches) == 1:
            for batch in batches:
                run(batch)
        else:
            list(self._executor.map(run, batches))
        return rows

    def _run_batch(
        self, infer: Infer, encoded: Encoded, batch: Sequence[int], params: Mapping[str, Any]
    ) -> Sequence[Any]:
        feeds = encoded.collate(batch)
        return self.task.decode(infer(feeds), feeds, len(batch), params)
