"""The threads of a model, for batches that run side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from mlflow_tdeploy.core.errors import SessionError

P = ParamSpec("P")
T = TypeVar("T")


class Workers(ThreadPoolExecutor):
    """Threads for batches; work that comes after the end is refused as by anything else of a closed model."""

    closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call on one of the threads.

        Raises:
            SessionError: The threads have ended with their model.
        """
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:  # also raised where no thread can be started
            if self.closed:
                raise SessionError("The model is closed.") from error
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads."""
        self.closed = True
        super().shutdown(wait, cancel_futures=cancel_futures)
