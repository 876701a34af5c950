"""Golden requests: inputs and the reference's answers, logged with the model.

Stored as one JSON document whose arrays are references into one ``.npz`` file (never pickled).
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_tdeploy.core.compare import same_outputs
from mlflow_tdeploy.core.errors import InvalidInputError, ManifestError
from mlflow_tdeploy.core.tensors import Array, Arrays, numpy_dtype

if TYPE_CHECKING:
    from mlflow_tdeploy.core.budget import Budget
    from mlflow_tdeploy.core.pipeline import Infer
    from mlflow_tdeploy.core.tasks import Task

_KEY, _BYTES = "$array", "$bytes"
#: What the readers of JSON, zip, deflate and the array format raise on damaged content.
_DAMAGED = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, RuntimeError),
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, SyntaxError, InvalidInputError),
)


@dataclass(frozen=True)
class GoldenRequest:
    """One request and the reference's answers to it.

    Attributes:
        inputs: What ``predict`` takes: texts or images, or a name → array mapping for ``tensors``.
        feeds: The graph's input arrays for it (one batch).
        outputs: The reference's output arrays for ``feeds``.
        answer: What ``predict`` returned for the reference.
    """

    inputs: Any
    feeds: Arrays
    outputs: Arrays
    answer: Any


def check_golden(task: Task, budget: Budget, requests: Sequence[GoldenRequest], infer: Infer) -> str | None:
    """Return why the answer to the first of some golden requests is outside the budget, or None.

    The others tell what answers are like: one that is next to nothing beside them may be off by as much.

    Args:
        task: Whose requests they are.
        budget: How far an answer may be.
        requests: At least one.
        infer: What is asked.
    """
    request, *others = requests
    got = infer(request.feeds)
    if problem := same_outputs(request.outputs, got):
        return problem
    comparison = task.comparison()
    for other in others:
        comparison.add(other.outputs, other.outputs, other.feeds)
    comparison.add(request.outputs, got, request.feeds)
    own = budget.of_one(task.usual_budget())
    told = "; ".join(own.violations(comparison.metrics(), single=True))
    if told and own is not budget:
        told += (
            " (the model's budget limits nothing that one request shows, so the task's own holds for golden requests: "
            "state a limit for that, too)"
        )
    return told or None


def dump(requests: tuple[GoldenRequest, ...]) -> tuple[str, bytes]:
    """Return the JSON text and the ``.npz`` content of the requests."""
    arrays: Arrays = {}
    plain = [_flatten(vars(request), arrays) for request in requests]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return json.dumps({"requests": plain}, indent=1, ensure_ascii=False) + "\n", buffer.getvalue()


def load(text: str | bytes, npz: bytes) -> tuple[GoldenRequest, ...]:
    """Read what :func:`dump` wrote.

    Raises:
        ManifestError: The files are damaged.
    """
    try:
        with np.load(io.BytesIO(npz), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        return tuple(GoldenRequest(**_restore(entry, arrays)) for entry in json.loads(text)["requests"])
    except _DAMAGED as error:
        raise ManifestError(f"The golden requests are damaged ({error}). Log the model again.") from error


def _flatten(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:  # texts; numpy could only pickle them
            return _flatten(value.tolist(), arrays)
        key = f"a{len(arrays)}"
        arrays[key] = value
        return {_KEY: key, "dtype": str(value.dtype)}
    if isinstance(value, bytes):  # an image's file
        key = f"a{len(arrays)}"
        arrays[key] = np.frombuffer(value, np.uint8)
        return {_BYTES: key}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _flatten(item, arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, arrays) for item in value]
    return value


def _restore(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, dict):
        if _KEY in value:
            array: Array = arrays[value[_KEY]]
            # .npz stores a type that numpy itself lacks, such as bfloat16, as raw bytes
            return array.view(numpy_dtype(value["dtype"])) if array.dtype.kind == "V" else array
        if _BYTES in value:
            return arrays[value[_BYTES]].tobytes()
        return {key: _restore(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, arrays) for item in value]
    return value
