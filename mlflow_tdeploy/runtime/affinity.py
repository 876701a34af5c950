"""Threads that keep to a processor each.

Two spinning threads of one operator are fast only where each has a processor. After a rest the scheduler may wake the
second one on the processor of the first, which spins until its time slice ends: on the two-core machine of the
benchmarks that was every other lone request, 11 ms instead of 4.
"""

from __future__ import annotations

import contextlib
import os


def processors(threads: int) -> tuple[int, ...]:
    """Return a processor for each of some threads, the caller's first; nothing where they should not be tied.

    They are tied only where they take every processor that this process may use: else the scheduler may know a better
    one, and replicas on one host would all take the same few.
    """
    if threads < 2 or not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    return tuple(allowed) if len(allowed) == threads else ()


def move_to(processor: int | None) -> set[int] | None:
    """Tie the calling thread to a processor, if it may run there and elsewhere.

    Returns:
        What :func:`release` needs; None where nothing was changed.
    """
    if processor is None:
        return None
    before = os.sched_getaffinity(0)
    if processor not in before or len(before) == 1:
        return None
    try:
        os.sched_setaffinity(0, (processor,))
    except OSError:  # a sandbox may forbid it, a processor may be gone
        return None
    return before


def release(before: set[int] | None) -> None:
    """Let the calling thread run where it ran before :func:`move_to`."""
    if before is None:
        return
    with contextlib.suppress(OSError):  # all of them are gone: the system has put the thread elsewhere already
        os.sched_setaffinity(0, before)
