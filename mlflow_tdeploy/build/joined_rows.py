"""Are a request's rows answered each by itself? Only then may a server join requests."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from mlflow_tdeploy.build.reference import ReferenceAnswers
from mlflow_tdeploy.core.masks import without_answer
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.spread import ABSOLUTE
from mlflow_tdeploy.core.tensors import Array, Arrays

#: Requests with several rows of which some are asked alone, and how far apart answers are that are the same.
_JOINED, _ROUNDED = 4, 1e-3
#: A column of answers next to 0 is as exact as this share of what is usual beside it.
_USUAL = 0.01


def rows_depend(answers: ReferenceAnswers, reference: Infer) -> bool:
    """Ask for rows alone that were asked beside others; tell whether they are answered otherwise.

    Then no server may join requests: a score that is normalised over a request's rows would be of everybody's.

    Args:
        answers: What was asked, and the reference's answers.
        reference: The original model.
    """
    rows = answers.task.signature.batch_dim
    cases = [(case.feeds, together) for case, together in answers if rows and _count(case.feeds) > 1][:_JOINED]
    if cases and not any(_differ(feeds) for feeds, _ in cases):  # one row was given: another one is made of it
        feeds = {name: _turned(array) for name, array in cases[0][0].items()}
        with contextlib.suppress(Exception):  # it may be none that the model takes
            cases.append((feeds, reference(feeds)))
    for feeds, together in cases:
        for row in (0, _count(feeds) - 1):
            try:
                alone = reference({name: array[row : row + 1] for name, array in feeds.items()})
            except Exception:  # it means something only beside the others, such as a position among them
                return True
            if not all(_alike(array, alone[name], row) for name, array in together.items()):
                return True
    return False


def _alike(together: Array, alone: Array, row: int) -> bool:
    """Tell whether a row has the same answer alone, but for what batches of another size round."""
    one = together[row : row + 1]
    if one.shape != alone.shape:
        return False
    if one.dtype.kind in "biu":
        return bool(np.mean(one != alone) <= _ROUNDED)
    wide = together.astype(np.float64)
    most = _ROUNDED * _scale(wide, together.dtype)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        apart = np.abs(alone - wide[row : row + 1])
    same = apart <= np.maximum(most, ABSOLUTE) + _ROUNDED * np.abs(wide[row : row + 1])
    return bool((same | ~np.isfinite(wide[row : row + 1])).all())


def _scale(rows: Array, dtype: np.dtype[Any]) -> Array:
    """Return how large answers are where each of them is, as numbers that go with a row: a price may hide a score."""
    answers = ~without_answer(rows.reshape(len(rows), -1), dtype).reshape(rows.shape)
    sizes = np.where(answers, np.abs(rows), 0.0)
    found = np.full((1, *rows.shape[1:]), np.inf)
    for axis in range(1, rows.ndim):
        others = tuple(other for other in range(rows.ndim) if other != axis)
        columns = sizes.max(axis=others, keepdims=True)
        found = np.minimum(found, np.maximum(columns, _USUAL * np.median(columns)))
    return found if rows.ndim > 1 else np.asarray(sizes.max(initial=0.0))


def _count(feeds: Arrays) -> int:
    return len(next(iter(feeds.values())))


def _differ(feeds: Arrays) -> bool:
    """Tell whether rows differ from the first one in something."""
    return any((array != array[:1]).any() for array in feeds.values())


def _turned(array: Array) -> Array:
    """Return rows of which each second one has what is in it the other way round."""
    found = array.copy()
    found[1::2] = np.flip(found[1::2], axis=tuple(range(1, array.ndim)))
    return found
