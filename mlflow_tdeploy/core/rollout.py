"""A version tried out beside the one that serves: on a share of everybody's requests, with the answers compared.

A ``canary`` answers those requests; where it fails, or is late, the version that serves does, which is asked all of
them. A ``shadow`` gets copies, when the requests have been answered. A request that is not chosen is answered as ever;
those that came together with one that is wait for a canary as long as that.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from mlflow_tdeploy.core.tensors import Array, Arrays
from mlflow_tdeploy.core.wire import ANSWER

Kind = Literal["canary", "shadow"]
#: Requests that are with the other version, or wait for it, at once; while there are more, no others are chosen.
_MOST_WAITING, _WORKERS = 64, 32
#: Seconds within which it has to answer, at least; and how many times as long as the version that serves took.
_PATIENCE_S, _PATIENCE = 1.0, 5.0
#: After so many late answers in a row nobody is chosen any more: whoever watches has seen enough.
MOST_LATE = 3
#: Vectors with at least this cosine, and single numbers that differ by at most this part of them, are alike.
_COSINE, _RELATIVE = 0.99, 0.05
_LONGEST = 300  # characters of a reason


@dataclass(frozen=True)
class Rollout:
    """A version that is tried out.

    Attributes:
        version: The version.
        model: Name of the model on the same server that answers as the version will.
        tally: Name of the model there that is told of each request.
        kind: ``canary`` or ``shadow``.
        share: Part of the requests, 0 to 1.
        seconds: For how long at most, whatever becomes of who has begun it.
    """

    version: int
    model: str
    tally: str
    kind: Kind
    share: float
    seconds: float


@dataclass
class _Patience:
    """For how long answers to requests that came together are waited for: not known before the own ones are there."""

    seconds: float = float("inf")


@dataclass(frozen=True)
class Sample:
    """What was seen of one request that the version which serves has answered.

    Attributes:
        before: Seconds that the version which serves took.
        after: Seconds that the other one took.
        alike: Whether both said the same, see :func:`alike`.
        failed: Why the other one has no answer; empty where it has.
        stopped: Whether it is asked no more: too many answers in a row were late, or one does not come at all.
    """

    before: float
    after: float
    alike: bool = True
    failed: str = ""
    stopped: bool = False


class Beside:
    """Asks another version beside the own one.

    Args:
        rollout: Which, and how.
        ask: Has the model of the name answer a request; called in threads.
        tell: Sends the model of the name what was seen, as JSON; called in a thread.
    """

    def __init__(self, rollout: Rollout, ask: Callable[[str, Any], Arrays], tell: Callable[[str, str], None]) -> None:
        self._rollout, self._ask, self._tell = rollout, ask, tell
        self._asking = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tdeploy-rollout")
        self._telling = ThreadPoolExecutor(1, thread_name_prefix="tdeploy-tally")  # also while all others wait
        self._lock = threading.Lock()
        self._waiting, self._overdue, self._late = 0, 0, 0
        self._asked: dict[int, tuple[float, _Patience]] = {}  # since when, and for how long, by thread
        self._hangs = False
        self._until = time.monotonic() + rollout.seconds

    async def answers(
        self, requests: Sequence[Any], own: Awaitable[list[Arrays | Exception]]
    ) -> list[Arrays | Exception]:
        """Return the answers to requests, those of the other version where it is a canary that answers.

        Args:
            requests: What ``ask`` gets.
            own: The own answers to all of them.
        """
        chosen, canary = self._chosen(len(requests)), self._rollout.kind == "canary"
        started = time.perf_counter()
        patience = _Patience()
        places = chosen if canary else []
        asked = {place: self._asking.submit(self._timed, requests[place], patience) for place in places}
        found = await own
        before = time.perf_counter() - started
        patience.seconds = _patience(before)
        if asked:
            await self._in_time(asked, before, found)
        elif chosen:
            for place in chosen:
                self._asking.submit(self._copied, requests[place], found[place], before)
        return found

    def close(self) -> None:
        """End what is under way."""
        for pool in (self._asking, self._telling):
            pool.shutdown(wait=True, cancel_futures=True)

    def _chosen(self, count: int) -> list[int]:
        if time.monotonic() > self._until:
            return []
        found = [place for place in range(count) if random.random() < self._rollout.share]  # noqa: S311 - no secret
        with self._lock:
            self._notice_hanging()
            if self._overdue or self._hangs or self._late >= MOST_LATE:  # whoever waits for it waits long
                return []
            found = found[: max(0, _MOST_WAITING - self._waiting)]
            self._waiting += len(found)
        return found

    def _notice_hanging(self) -> None:
        """Tell, once, of a request to which no answer comes: nobody else would, for it is not over."""
        now = time.perf_counter()
        hanging = [
            now - since for since, patience in self._asked.values() if now - since > MOST_LATE * patience.seconds
        ]
        if hanging and not self._hangs:
            self._hangs = True
            waited = max(hanging)
            why = f"no answer within {waited:.1f} s"
            sample = Sample(0.0, waited, alike=False, failed=why, stopped=True)
            self._telling.submit(self._tell, self._rollout.tally, json.dumps(asdict(sample)))

    def _timed(self, request: Any, patience: _Patience) -> tuple[Arrays | Exception, float]:
        started = time.perf_counter()
        with self._lock:
            self._asked[threading.get_ident()] = started, patience
        try:
            return self._ask(self._rollout.model, request), time.perf_counter() - started
        except Exception as error:  # whatever it is, it is no answer
            return error, time.perf_counter() - started
        finally:
            with self._lock:
                del self._asked[threading.get_ident()]

    async def _in_time(
        self, asked: dict[int, Future[tuple[Arrays | Exception, float]]], before: float,
        found: list[Arrays | Exception],
    ) -> None:  # fmt: skip
        """Replace own answers by those that come in time: all are waited for together, as they go out together."""
        patience = _patience(before)
        await asyncio.wait([asyncio.wrap_future(one) for one in asked.values()], timeout=patience - before)
        for place, future in asked.items():
            own = found[place]
            if future.done():
                other, after = future.result()
            else:
                other, after = _LateError(patience), patience
                with self._lock:
                    self._overdue += 1
                future.add_done_callback(self._is_there)
            self._telling.submit(self._seen, own, before, other, after)
            if not isinstance(other, Exception) and not isinstance(own, Exception):
                found[place] = other

    def _is_there(self, _: Any) -> None:
        with self._lock:
            self._overdue -= 1

    def _copied(self, request: Any, own: Arrays | Exception, before: float) -> None:
        patience = _patience(before)
        other, after = self._timed(request, _Patience(patience))
        self._telling.submit(self._seen, own, before, other if after <= patience else _LateError(patience), after)

    def _seen(self, own: Arrays | Exception, before: float, other: Arrays | Exception, after: float) -> None:
        late = isinstance(other, _LateError)
        with self._lock:
            self._waiting -= 1
            self._late = self._late + 1 if late else 0
            stopped = self._late >= MOST_LATE
        if isinstance(own, Exception) and not stopped:
            return  # a request that nobody can answer says nothing
        failed = f"{other}"[:_LONGEST] or type(other).__name__ if isinstance(other, Exception) else ""
        same = not isinstance(own, Exception) and not isinstance(other, Exception) and alike(own, other)
        self._tell(self._rollout.tally, json.dumps(asdict(Sample(before, after, same, failed, stopped))))


class _LateError(TimeoutError):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:.1f} s")


def _patience(before: float) -> float:
    """Return within how many seconds the other version has to answer what the own one took so long for."""
    return max(_PATIENCE_S, _PATIENCE * before)


def alike(one: Arrays, other: Arrays) -> bool:
    """Tell whether two versions' answers to a request say the same.

    Two versions of a model never give the same numbers. Where an answer says something in words, such as a label, the
    words count; else each row of numbers by its direction (cosine of at least 0.99), a single number within 5 %.
    """
    if one.keys() != other.keys():
        return False
    words = [name for name, array in one.items() if array.dtype == object and _says_words(name, array)]
    return all(_alike(name, one[name], other[name]) for name in (words or one))


def _says_words(name: str, array: Array) -> bool:
    return name != ANSWER or any(_words(json.loads(value)) for value in array.reshape(-1))


def _words(value: Any) -> list[str]:
    """Return the words in a value of JSON, in their order."""
    if isinstance(value, dict):
        return [word for key in sorted(value) for word in _words(value[key])]
    if isinstance(value, list):
        return [word for one in value for word in _words(one)]
    return [value] if isinstance(value, str) else []


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [float(value)] if isinstance(value, (int, float)) else []


def _alike(name: str, one: Array, other: Array) -> bool:
    if one.dtype != object:
        return one.shape == other.shape and _close(one, other)
    if one.size != other.size:
        return False
    pairs = zip(one.reshape(-1).tolist(), other.reshape(-1).tolist(), strict=True)
    if name != ANSWER:
        return all(mine == theirs for mine, theirs in pairs)
    return all(_same_answer(json.loads(mine), json.loads(theirs)) for mine, theirs in pairs)


def _same_answer(one: Any, other: Any) -> bool:
    if words := _words(one):
        return words == _words(other)
    mine, theirs = (np.asarray(_numbers(value)) for value in (one, other))
    return mine.shape == theirs.shape and _close(mine, theirs)


def _close(one: Array, other: Array) -> bool:
    if one.dtype.kind in "biu":
        return bool(np.array_equal(one, other))
    mine, theirs = (array.astype(np.float64) for array in (one, other))
    if mine.ndim < 2 or mine.shape[-1] == 1:
        return bool(np.allclose(mine, theirs, rtol=_RELATIVE, atol=1e-6, equal_nan=True))
    rows, others = (array.reshape(-1, array.shape[-1]) for array in (mine, theirs))
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    same = np.isclose(rows, others, rtol=_RELATIVE, atol=1e-6, equal_nan=True).all(axis=1)
    return bool((same | (np.einsum("ij,ij->i", rows, others) >= _COSINE * np.maximum(lengths, 1e-30))).all())
