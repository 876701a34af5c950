"""One thread or several for a lone request: whichever is faster on this host at the moment.

Bulk work runs batches in parallel, one thread each. A request that is a single batch could use the idle cores inside
its operators: on a free machine several spinning threads answer a short text sooner than one, on a busy one far later.
No constant is right for both, so both are kept at hand and measured as requests come.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import ClassVar

from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.runtime.base import Session
from mlflow_tdeploy.runtime.sessions import abandon

_log = logging.getLogger("mlflow_tdeploy")


class _Choice:
    """Which of two ways is faster for requests of about one size, by the medians of what they took lately.

    The way in use is measured with every request, the other one tried from time to time, best of three. A host's
    hiccups (a spinning thread that lost its core) so cost a request, not the choice.
    """

    #: Durations of the way in use whose median counts; a few hiccups in a row do not outvote the others.
    RECENT: ClassVar[int] = 31
    #: As many must be known before that median may overturn the choice.
    SURE: ClassVar[int] = 8
    #: Requests of each way before the first choice.
    FIRST: ClassVar[int] = 3
    #: Every so many requests the other way is tried again.
    RETRY: ClassVar[int] = 128
    #: And after so many: the first choice is made while a process starts and opens what else it needs.
    EARLY: ClassVar[tuple[int, ...]] = (24, 64)

    def __init__(self) -> None:
        self._times: tuple[deque[float], deque[float]] = (deque(maxlen=self.RECENT), deque(maxlen=self.RECENT))
        self._best = 0
        self._trial = False
        self._count = 0

    def next(self) -> int:
        """Return 0 for one thread, 1 for several."""
        self._count += 1
        if self._count <= 2 * self.FIRST:
            return 1 - self._count % 2
        if self._count == 2 * self.FIRST + 1 and self._median(1) < self._median(0):
            self._best = 1
        other = 1 - self._best
        overtaken = len(self._times[self._best]) >= self.SURE and self._median(other) < self._median(self._best)
        due = self._count % self.RETRY == 0 or self._count in self.EARLY
        if not self._trial and (overtaken or due):
            self._times[other].clear()  # from another time
            self._trial = True
        return other if self._trial else self._best

    def record(self, way: int, seconds: float) -> None:
        """Remember how long a way took."""
        self._times[way].append(seconds)
        if not self._trial or way == self._best:
            return
        to_beat = self._median(self._best)
        faster = sum(seconds < to_beat for seconds in self._times[way])
        if faster == 2:
            self._best = way
        if 2 in (faster, len(self._times[way]) - faster):
            self._trial = False

    def _median(self, way: int) -> float:
        times = sorted(self._times[way])
        return times[len(times) // 2] if times else math.inf


class Load:
    """The batches of a model that run at the moment, whatever runs them. Safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._started = 0

    def enter(self) -> tuple[int, bool]:
        """Count a batch in; returns its number and whether it is alone."""
        with self._lock:
            self._running += 1
            self._started += 1
            return self._started, self._running == 1

    def leave(self) -> None:
        """Count a batch out."""
        with self._lock:
            self._running -= 1

    def undisturbed(self, number: int) -> bool:
        """Tell whether no other batch has started since that one."""
        return self._started == number

    def counted(self, infer: Infer) -> Infer:
        """Return ``infer`` with its batches counted."""

        def run(feeds: Arrays) -> Arrays:
            self.enter()
            try:
                return infer(feeds)
            finally:
                self.leave()

        return run


class AdaptiveThreads:
    """Runs single batches on a one-thread session or on a second one with several threads. Safe from many threads.

    The second session is opened in the background once a few requests have come, so it delays no answer; a request
    that is not alone always takes one thread.

    Args:
        narrow: Inference with one thread.
        open_wide: Opens the session with several threads.
        load: Counts the batches of the whole model; its own where there is nothing else that runs.
    """

    #: Single-batch requests before the second session is worth its memory.
    OPEN_AFTER: ClassVar[int] = 2

    def __init__(self, narrow: Infer, open_wide: Callable[[], Session], load: Load | None = None) -> None:
        self._narrow = narrow
        self._open_wide = open_wide
        self._wide: Session | None = None
        self._opener: threading.Thread | None = None
        self._choices: defaultdict[int, _Choice] = defaultdict(_Choice)
        self._lock = threading.Lock()
        self._load = load or Load()
        self._seen = 0
        self._closed = False

    def __call__(self, feeds: Arrays) -> Arrays:
        """Run one batch."""
        number, alone = self._load.enter()
        try:
            wide = self._second()
            if wide is None or not alone:
                return self._narrow(feeds)
            return self._measured(feeds, wide, number)
        finally:
            self._load.leave()

    def _second(self) -> Session | None:
        """Return the second session, if it is open; the first few requests have it opened."""
        with self._lock:
            self._seen += 1
            if self._seen == self.OPEN_AFTER and not self._closed:
                # no daemon: a process that ends while ONNX Runtime opens a session in another thread is aborted
                self._opener = threading.Thread(target=self._open, name="tdeploy-open", daemon=False)
                self._opener.start()
            return self._wide

    def _measured(self, feeds: Arrays, wide: Session, number: int) -> Arrays:
        choice = self._choices[sum(array.size for array in feeds.values()).bit_length()]
        way = choice.next()
        begin = time.perf_counter()
        try:
            outputs = wide.infer(feeds) if way else self._narrow(feeds)
        except Exception as error:
            if not way:
                raise
            outputs = self._narrow(feeds)  # raises where the request is at fault
            self._give_up(wide, error)
            return outputs
        seconds = time.perf_counter() - begin
        if self._load.undisturbed(number):  # alone all the while: nobody else's work is in the figure
            choice.record(way, seconds)
        return outputs

    def _give_up(self, wide: Session, error: Exception) -> None:
        """Go on with one thread: the second session fails where the first does not."""
        with self._lock:
            mine, self._wide = self._wide is wide, None
        if mine:
            _log.warning("Lone requests go on with one thread, the session with several failed: %s", error)
            wide.close()

    def _open(self) -> None:
        try:
            session = self._open_wide()
        except Exception as error:  # what serves already goes on serving
            _log.warning("No second session for lone requests: %s", error)
            return
        with self._lock:
            if not self._closed:
                self._wide = session
                return
        session.close()

    def abandon(self) -> None:
        """Leave the second session alone: this process was forked, and the session's threads are not in it."""
        abandon(self._wide)

    def close(self) -> None:
        """Free the second session; closing twice is fine."""
        with self._lock:
            self._closed = True
            wide, self._wide = self._wide, None
        if self._opener is not None:
            self._opener.join()
        if wide is not None:
            wide.close()
