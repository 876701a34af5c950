"""How good predictions are beside the right answers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

#: Shares that :func:`classified` returns.
CLASSIFIED = ("accuracy", "precision", "recall", "f1")
#: What a predicted probability counts as at least, so that one wrong answer does not make the loss infinite.
_LEAST = float(np.finfo(np.float64).eps)


def classified(predicted: Sequence[Hashable], right: Sequence[Hashable]) -> dict[str, float]:
    """Return accuracy and the macro averages of precision, recall and F1.

    As scikit-learn has them with ``average="macro", zero_division=0``: each class that is right, or predicted,
    somewhere counts alike, and one that is never predicted has a precision of 0.

    Args:
        predicted: A class for each item, at least one.
        right: The right ones.
    """
    classes = {one: index for index, one in enumerate(dict.fromkeys([*right, *predicted]))}
    got, wanted = (np.array([classes[one] for one in which]) for which in (predicted, right))
    hits, said, there = (np.bincount(which, minlength=len(classes)) for which in (got[got == wanted], got, wanted))
    return {
        "accuracy": float(np.mean(got == wanted)),
        "precision": _mean(hits, said),
        "recall": _mean(hits, there),
        "f1": _mean(2 * hits, said + there),
    }


def log_loss(probabilities: Sequence[float]) -> float:
    """Return the mean of ``-log(p)``, where each p is the probability that was given to the right answer."""
    return float(-np.log(np.clip(np.asarray(probabilities, dtype=np.float64), _LEAST, 1.0)).mean())


def _mean(hits: npt.NDArray[np.int_], of: npt.NDArray[np.int_]) -> float:
    return float(np.mean(hits / np.maximum(of, 1)))
