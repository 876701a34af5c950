"""Progress bars of the libraries that load and write models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turn off the progress bars of transformers, and put them back as they were.

    They would stand between the steps that the build tells. Nothing is imported for it: transformers is not there
    when an ONNX graph is read.
    """
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
