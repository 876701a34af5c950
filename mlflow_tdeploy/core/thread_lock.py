"""Locks between the threads of a process, and what is done by one of them at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ThreadLock", "one_at_a_time"]


class ThreadLock:
    """A lock for the length of a module's life; a thread that has it may take it again, a forked child starts anew.

    The thread that holds it is not there in a child to let it go.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait until no other thread has it."""
        with self._lock:
            yield


_models = ThreadLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other thread reads or builds a model; as a decorator, for the length of a call.

    What exporters have to be kept from is kept from them by changing what the whole process has (torch's methods, the
    rules of onnxscript, its output, its logs) and putting it back: of two threads, the second would save what the
    first has put there, and leave that for good.
    """
    with _models.held():
        yield
