"""A Triton model that counts what is seen of a version which is tried out, and says so to who asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.triton.helper_model import HelperModel

#: It is told of requests, or of nothing.
COUNTING = HelperModel("tally", (Path(__file__).parent / "tally" / "model.py",), ("seen", "TYPE_STRING", -1), "tally")


@dataclass(frozen=True)
class Tally:
    """What was seen of requests that the version which serves has answered.

    Attributes:
        requests: How many.
        failed: To how many of them the version that is tried out had no answer.
        alike: To how many both have said the same, see :func:`mlflow_tdeploy.core.rollout.alike`.
        before: Seconds within which the version that serves answered 95 % of those that both answered, of the newest
            10,000.
        after: The other one's.
        why: Why the last one failed.
        stopped: Whether one that asks it has ceased to, as it hangs or is late again and again.
    """

    requests: int = 0
    failed: int = 0
    alike: int = 0
    before: float = 0.0
    after: float = 0.0
    why: str = ""
    stopped: bool = False

    def __str__(self) -> str:
        p95 = f"p95 {self.after * 1000:.1f} ms beside {self.before * 1000:.1f} ms"
        return f"{self.requests} requests, {self.failed} failed, {self.alike} answered alike, {p95}"


def question() -> Arrays:
    """Return what the model is asked by who wants to know."""
    return {COUNTING.takes[0]: np.array([b""], dtype=object)}


def tally_of(answer: Arrays, where: str) -> Tally:
    """Return what the model has said.

    Args:
        answer: Its answer.
        where: The server, for messages.

    Raises:
        ServerError: That is nothing this package understands.
    """
    return COUNTING.said(Tally, answer, where, "what it has counted")
