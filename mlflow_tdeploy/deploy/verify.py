"""Golden requests over the network: a version answers as it did where it was logged, or it does not serve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import TDeployError, UnreachableError, VerificationError
from mlflow_tdeploy.core.golden import GoldenRequest, check_golden
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.core.wire import ANSWER, asked_of, pack, received, sent
from mlflow_tdeploy.triton.bundle_version import BundleVersion
from mlflow_tdeploy.triton.client import TritonClient
from mlflow_tdeploy.triton.config import front_rows
from mlflow_tdeploy.triton.options import TritonOptions
from mlflow_tdeploy.triton.repository import Deployable

#: The same graph on the same server gives the same numbers, but for what a batch of another size rounds.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-5


def check_graph(client: TritonClient, what: Deployable, options: TritonOptions) -> None:
    """Have a version's graph answer the golden requests that were logged with it; none belong to a Triton model.

    Raises:
        VerificationError: An answer is another one.
    """
    if isinstance(what, BundleVersion):
        OverTheNetwork(client, what, options).check_graph()


def check_front(client: TritonClient, what: Deployable, model: str, options: TritonOptions) -> None:
    """Have a version's front answer them, in a model of its own.

    Raises:
        VerificationError: Tokens or answers are others.
    """
    if isinstance(what, BundleVersion):
        OverTheNetwork(client, what, options).check_front(model)


class OverTheNetwork:
    """A deployed version's graph and front, asked as the loader asks a session.

    Args:
        client: The server.
        what: The version.
        options: How it is served.
    """

    def __init__(self, client: TritonClient, what: BundleVersion, options: TritonOptions) -> None:
        self._client = client
        self._what = what
        self._task: Task = what.bundle.task()
        self._golden = what.bundle.golden()
        self._most, self._joins = what.most_rows(options), self._task.batch_dim is not None
        front = front_rows(self._task, options)
        self._front_most = min(front, self._most) if self._most and not self._task.columns else front

    def check_graph(self) -> None:
        """Replay the golden requests on the graph, within the model's budget.

        Raises:
            VerificationError: An answer is another one.
        """
        if not self._golden:
            return
        name = self._what.graph_name
        for place in range(len(self._golden)):
            requests = (self._golden[place], *self._golden[:place], *self._golden[place + 1 :])
            try:
                why = check_golden(self._task, self._what.bundle.manifest.budget, requests, self._infer)
            except UnreachableError:
                raise  # that says nothing about the version
            except TDeployError as error:
                why = str(error)
            if why:
                raise VerificationError(f"'{name}' answers golden request {place} wrongly on the server: {why}")

    def check_front(self, model: str) -> None:
        """Send the golden requests as a user would, and hold the answers against those of the graph there.

        Raises:
            VerificationError: Tokens or answers are others.
        """
        for place, request in enumerate(self._golden):
            try:
                self._check_one(model, request, place)
            except (VerificationError, UnreachableError):
                raise
            except TDeployError as error:
                raise VerificationError(f"'{model}' cannot answer golden request {place}: {error}") from error

    def _check_one(self, model: str, request: GoldenRequest, place: int) -> None:
        items, params = self._task.items(request.inputs), self._task.check_params(self._task.usual)
        # as many rows at once as the front gets: dynamic ranges are of all rows of a run
        by_rows = not self._task.columns and self._joins
        outputs = self._infer(request.feeds, self._front_most if by_rows else self._most)
        encoded = self._task.encode(items, params)
        rows = self._task.decode(outputs, request.feeds, len(encoded.lengths), params)
        finished = self._task.finish(self._task.answers(rows, encoded, params), params)
        if self._task.columns:
            expected = pack(self._task, finished)
            got = self._ask(model, asked_of(self._task.columns, items), self._front_most, self._task.usual)
        else:
            expected, got = finished, self._ask(model, sent(items[0], {}, batched=self._joins), self._front_most)
        exact = not self._task.columns or len(encoded.lengths) == 1  # else rows may be in other batches there
        for name, array in expected.items():
            if name not in got or (exact and not _same(name, array, got[name])):
                raise VerificationError(
                    f"'{model}' answers golden request {place} with another '{name}' than its graph: the tokenizer or "
                    f"what comes after the graph is another one on the server."
                )

    def _infer(self, feeds: Arrays, most: int | None = None) -> Arrays:
        """Run the graph on the server: the signature's dtypes and shapes in and out."""
        asked = sent(feeds, self._what.variant.dtypes, batched=self._most > 0)
        got = self._ask(self._what.graph_name, asked, self._most if most is None else most)
        return received(got, self._what.bundle.manifest.signature)

    def _ask(self, model: str, arrays: Arrays, most: int, params: Mapping[str, Any] | None = None) -> Arrays:
        """Ask a model, in as many requests as its most rows want; 0 for one."""
        rows = len(next(iter(arrays.values())))
        step = most or rows
        found = [
            self._client.infer(
                model,
                {name: array[begin : begin + step] for name, array in arrays.items()} if most else arrays,
                version=self._what.version,
                params=params,
            )
            for begin in range(0, rows, step)
        ]
        return (
            found[0] if len(found) == 1 else {name: np.concatenate([one[name] for one in found]) for name in found[0]}
        )


def _same(name: str, expected: Any, got: Any) -> bool:
    if expected.dtype == object:
        pairs = list(zip(expected.ravel().tolist(), got.ravel().tolist(), strict=False))
        if len(pairs) != expected.size or got.size != expected.size:
            return False
        return all(_same_json(*pair) if name == ANSWER else pair[0] == pair[1] for pair in pairs)
    whole = got.reshape(expected.shape) if got.size == expected.size else None
    return whole is not None and bool(np.allclose(whole, expected, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True))


def _same_json(expected: bytes, got: bytes) -> bool:
    return _alike(json.loads(expected), json.loads(got))


def _alike(expected: Any, got: Any) -> bool:
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and expected.keys() == got.keys()
            and all(_alike(expected[key], got[key]) for key in got)
        )
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        return isinstance(got, list) and len(got) == len(expected) and all(map(_alike, expected, got))
    if isinstance(expected, float):
        return isinstance(got, (int, float)) and bool(np.isclose(got, expected, rtol=_RELATIVE, atol=_ABSOLUTE))
    return bool(expected == got)
