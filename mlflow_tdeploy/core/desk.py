"""Requests that come together, answered together: what a Triton model does with those that it is handed.

Texts of all requests are tokenized and planned into batches as one, all batches run at once, and each request gets
its own answer or its own error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow_tdeploy.core.batching import DEFAULT_TOKEN_BUDGET, plan_batches
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.gaps import Usable, leaves_gaps, usable
from mlflow_tdeploy.core.tasks import Encoded, Task
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.core.wire import asked_in, pack

#: Runs the graph somewhere else.
AsyncInfer = Callable[[Arrays], Awaitable[Arrays]]


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        arrays: Its tensors; texts as bytes.
        params: Parameters of the task.
        outputs: Names of the outputs that it wants; all by default.
    """

    arrays: Arrays
    params: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


@dataclass
class _Texts:
    """A request of texts on its way."""

    place: int
    ask: Ask
    params: dict[str, Any]
    usable: Usable

    @property
    def items(self) -> list[Any]:
        """Those that can be answered."""
        return self.usable.items


class Desk:
    """Answers requests of one task.

    Args:
        task: The task.
        infer: Runs the graph: arrays of the signature's dtypes in and out.
        token_budget: Most padded tokens in a batch.
        workers: How many batches the graph's server runs at once.
    """

    def __init__(
        self, task: Task, infer: AsyncInfer, *, token_budget: int = DEFAULT_TOKEN_BUDGET, workers: int = 1
    ) -> None:
        self._task = task
        self._infer = infer
        self._token_budget = token_budget
        self._workers = workers
        self._names = [column.name for column in task.columns]

    async def answer(self, asks: Sequence[Ask]) -> list[Arrays | Exception]:
        """Return each request's outputs, or what is wrong with it."""
        found: list[Arrays | Exception] = [{} for _ in asks]
        texts, raw = [], []
        for place, ask in enumerate(asks):
            try:
                if not any(name in ask.arrays for name in self._names):
                    raw.append((place, self._feeds(ask)))
                else:
                    texts.append(self._texts(place, ask))
            except Exception as error:  # whatever is wrong with one request is that one's answer
                found[place] = error
        await asyncio.gather(self._answer_texts(texts, found), *(self._answer_raw(*one, asks, found) for one in raw))
        return found

    def _feeds(self, ask: Ask) -> Arrays:
        self._task.check_params(ask.params)
        if not self._task.columns:
            feeds: Arrays = self._task.items(dict(ask.arrays))[0]
            return feeds
        self._task.signature.bind(ask.arrays)
        return ask.arrays

    def _texts(self, place: int, ask: Ask) -> _Texts:
        if more := [name for name in ask.arrays if name not in self._names]:
            own = " and ".join(f"'{name}'" for name in self._names if name in ask.arrays)
            raise InvalidInputError(f"A request has {own} or the graph's own tensors, not both; got {shown(more)}.")
        params = self._task.check_params(ask.params)
        rows = asked_in(self._task.columns, ask.arrays, lenient=leaves_gaps(params))
        return _Texts(place, ask, params, usable(self._task, rows, params))

    async def _answer_raw(
        self, place: int, feeds: Arrays, asks: Sequence[Ask], found: list[Arrays | Exception]
    ) -> None:
        try:
            outputs = await self._infer(feeds)
            wanted = asks[place].outputs or tuple(outputs)
            found[place] = _some({name: array for name, array in outputs.items() if name in wanted}, wanted, outputs)
        except Exception as error:  # whatever the graph's server says is this request's answer
            found[place] = error

    async def _answer_texts(self, texts: list[_Texts], found: list[Arrays | Exception]) -> None:
        groups: dict[str, list[_Texts]] = {}  # by what they are tokenized by
        for one in texts:
            groups.setdefault(_key({name: one.params[name] for name in self._task.encoding}), []).append(one)
        await asyncio.gather(*(self._answer_group(group, found) for group in groups.values()))

    async def _answer_group(self, texts: list[_Texts], found: list[Arrays | Exception]) -> None:
        try:
            answers = await self._run(texts)
        except Exception as error:
            if len(texts) == 1:
                found[texts[0].place] = error
                return
            for one in texts:  # one of them is wrong: only that one shall fail
                await self._answer_group([one], found)
            return
        for one, answer in zip(texts, answers, strict=True):
            try:
                finished = one.usable.filled(self._task.finish(answer, one.params) if answer else [])
                packed = pack(self._task, finished, one.ask.outputs)
                found[one.place] = _some(packed, one.ask.outputs, packed or pack(self._task, finished))
            except Exception as error:
                found[one.place] = error

    async def _run(self, texts: list[_Texts]) -> list[list[Any]]:
        """Return the answers to the items of each request."""
        items = [item for one in texts for item in one.items]
        if not items:
            return [[] for _ in texts]
        encoded = self._task.encode(items, texts[0].params)
        batches = plan_batches(
            encoded.lengths,
            max_batch=self._task.max_batch,
            token_budget=self._token_budget,
            workers=self._workers,
            pads=self._task.pads,
        )
        of_items = [one for one in texts for _ in one.items]
        owners = [one for one, span in zip(of_items, encoded.by_item, strict=True) for _ in span]
        rows: list[Any] = [None] * len(owners)
        await asyncio.gather(*(self._run_batch(encoded, batch, owners, rows) for batch in batches))
        parts, begin = [], 0
        for one in texts:
            parts.append(self._task.answers(rows, encoded, one.params, range(begin, begin + len(one.items))))
            begin += len(one.items)
        return parts

    async def _run_batch(
        self, encoded: Encoded, batch: Sequence[int], owners: Sequence[_Texts], rows: list[Any]
    ) -> None:
        feeds = encoded.collate(batch)
        outputs = await self._infer(feeds)
        decoded: dict[str, Sequence[Any]] = {}  # once for each set of parameters among them
        for row, index in enumerate(batch):
            params = owners[index].params
            key = _key(params)
            if key not in decoded:
                decoded[key] = self._task.decode(outputs, feeds, len(batch), params)
            rows[index] = decoded[key][row]


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def _some(answer: Arrays, wanted: Sequence[str], has: Iterable[str]) -> Arrays:
    """Return an answer that holds something of what is wanted.

    Raises:
        InvalidInputError: It holds nothing: a client would take it for a success.
    """
    if not answer:
        raise InvalidInputError(
            f"This request has no output {', '.join(map(shown, wanted))}; with its parameters the answer is "
            f"{', '.join(has)}."
        )
    return answer
