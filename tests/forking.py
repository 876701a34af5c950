"""Children by ``os.fork`` that end: who waits for one that hangs would wait for ever, and nobody would know why."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from collections.abc import Callable

SECONDS = 120


def forked(work: Callable[[], int]) -> int:
    """Run ``work`` in a forked process; return what it returned, or minus the signal that ended it.

    The child leaves without the exit handlers, as those of multiprocessing do. One that hangs says where, and SIGALRM
    ends it.
    """
    child = os.fork()
    if child == 0:
        end_in_time()
        code = 70
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_in_time(seconds: int = SECONDS) -> None:
    """End this process with the stacks of its threads if it still runs after so many seconds."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not by a handler in Python: a thread that waits may not run it
    faulthandler.register(signal.SIGALRM, file=2, chain=True)
    signal.alarm(seconds)
