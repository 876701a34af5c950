"""Programs that a test starts and that do not outlive it, whatever becomes of the test."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def program(command: Sequence[str], **more: Any) -> Iterator[subprocess.Popen]:
    """Run a program for the length of a block; one that does not end until then is killed.

    ``Popen`` as a context manager waits for ever for what was not told to end, as where an assertion failed before.
    """
    process = subprocess.Popen(command, **more)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()
        process.wait(30)
