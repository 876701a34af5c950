"""A Triton model that says what its server's host is: which variant suits it is decided before one is sent there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlflow_tdeploy.core import gpu_driver, hardware
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.triton.helper_model import HelperModel

#: It needs this package's own code for that beside it.
HOST = HelperModel(
    "host",
    (Path(__file__).parent / "probe" / "model.py", Path(hardware.__file__), Path(gpu_driver.__file__)),
    ("ask", "TYPE_INT32", 1),
    "host",
)


def question() -> Arrays:
    """Return what the model is asked."""
    return {HOST.takes[0]: np.zeros(1, np.int32)}


def fingerprint_of(answer: Arrays, where: str) -> Fingerprint:
    """Return what the model has said.

    Args:
        answer: Its answer.
        where: The server, for messages.

    Raises:
        ServerError: That is nothing this package understands.
    """
    return HOST.said(Fingerprint, answer, where, "what its host is")
