"""Golden requests: a few real requests with the source's answers, replayed whenever a session is opened."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.batching import DEFAULT_TOKEN_BUDGET
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.pipeline import Infer
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays

#: How many arrays-in-arrays-out requests are kept, how large one may be, and how large those after the first few.
_MOST_REQUESTS, _FEW = 16, 4
_MOST_BYTES, _SMALL = 1 << 20, 1 << 16
#: Texts of the mixed batch, by their place in the order of length.
_MIXED = (0.1, 0.35, 0.6, 0.85)


def golden_requests(task: Task, data: VerifyData, reference: Infer) -> tuple[GoldenRequest, ...]:
    """Pick requests and let the reference answer them.

    Text tasks: the shortest, a medium, a long text alone, and a batch of mixed lengths. Image tasks: two small images.
    ``tensors``: the first requests that are small enough to be stored.

    Args:
        task: The task.
        data: Data in the task's form.
        reference: The original model.
    """
    picked: list[Any] = list(golden_texts(task, data)) if data.texts else list(_pick_arrays(data))
    return tuple(_request(task, inputs, reference) for inputs in picked)


def _request(task: Task, inputs: Any, reference: Infer) -> GoldenRequest:
    params = task.check_params(task.usual)
    encoded = task.encode(task.items(inputs), params)
    feeds = encoded.whole()
    outputs = reference(feeds)
    rows = task.decode(outputs, feeds, len(encoded.lengths), params)
    answer = task.finish(task.answers(rows, encoded, params), params)
    return GoldenRequest(inputs, feeds, outputs, answer)


def golden_texts(task: Task, data: VerifyData) -> list[list[Any]]:
    """Return the items of each golden request of a task of items: as many as fit into one run of the graph.

    Raises:
        InvalidInputError: No item does.
    """
    if task.input_kind == "image":
        return _small_images(data)
    encoded = task.encode(task.items(list(data.texts)))
    lengths = [sum(encoded.lengths[row] for row in span) for span in encoded.by_item]
    fitting = [index for index, span in enumerate(encoded.by_item) if len(span) <= task.max_batch]
    if not fitting:
        least = min(map(len, encoded.by_item))
        raise InvalidInputError(
            f"Task '{task.name}' asks the graph with {least} rows for one item of the data, and it takes "
            f"{task.max_batch} at once. Allow more: shapes={{'batch': (1, {least}, {least})}}."
        )
    order = sorted(fitting, key=lambda index: (lengths[index], index))
    order = [index for index in order if lengths[index] <= DEFAULT_TOKEN_BUDGET // 2] or order[:1]
    places = [data.texts[order[int(share * (len(order) - 1))]] for share in (0.0, 0.5, 1.0)]
    mixed: list[int] = []
    for index in (order[int(share * (len(order) - 1))] for share in _MIXED):
        if sum(len(encoded.by_item[one]) for one in (*mixed, index)) <= task.max_batch:
            mixed.append(index)
    return [*([one] for one in dict.fromkeys(places)), *([[data.texts[one] for one in mixed]] if task.pads else [])]


def _small_images(data: VerifyData) -> list[list[Any]]:
    """Return the smallest image, alone and beside the next larger one: to the model all are of one size."""
    small = sorted(data.texts, key=lambda image: image.nbytes if isinstance(image, np.ndarray) else len(image))[:2]
    return [small[:1], small] if len(small) > 1 else [small]


def _pick_arrays(data: VerifyData) -> list[Arrays]:
    small = [request for request in data.requests if _bytes(request) <= _MOST_BYTES] or [min(data.requests, key=_bytes)]
    return [*small[:_FEW], *(one for one in small[_FEW:_MOST_REQUESTS] if _bytes(one) <= _SMALL)]


def _bytes(request: Arrays) -> int:
    return sum(array.nbytes for array in request.values())
