"""The signature of an ONNX graph that takes the pixels of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import heads
from mlflow_tdeploy.core.tasks._image import INPUT
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source._shapes import BATCH, check_shapes, make_dims

_RANK = 4


def image_signature(
    task: str,
    inputs: Sequence[TensorSpec],
    outputs: Mapping[str, TensorSpec],
    shape: Sequence[int],
    options: Options,
) -> Signature:
    """Return what a task asks of a graph: images of one size, whatever sizes the graph would take.

    Args:
        task: The task.
        inputs: What the graph takes.
        outputs: What it returns, by name.
        shape: Height and width that the image processor makes.
        options: What the caller said.

    Raises:
        InvalidInputError: The graph takes or returns something else.
    """
    _check(task, inputs, outputs, (3, *shape))
    rows = inputs[0].shape[0]
    if isinstance(rows, int):
        for name in check_shapes(options.shapes):
            raise InvalidInputError(f"shapes names '{name}', which is fixed in the graph: {inputs[0]}.")
    dims = () if isinstance(rows, int) else make_dims((Dim.of("batch", BATCH),), options.shapes)
    first = rows if isinstance(rows, int) else "batch"
    head = heads()[task]
    found = [outputs[name] for name in (head.output, *head.optional) if name in outputs]
    specs = tuple(TensorSpec(one.name, one.dtype, (first, *one.shape[1:])) for one in found)
    return Signature(dims, (TensorSpec(INPUT, "float32", (first, 3, *shape)),), specs)


def _check(task: str, inputs: Sequence[TensorSpec], outputs: Mapping[str, TensorSpec], wanted: Sequence[int]) -> None:
    """Make sure that a graph takes images and returns what the task reads.

    Raises:
        InvalidInputError: It does not.
    """
    first = inputs[0]
    fits = len(inputs) == 1 and (first.name, first.dtype, len(first.shape)) == (INPUT, "float32", _RANK)
    if not fits or any(isinstance(a, int) and a != b for a, b in zip(first.shape[1:], wanted, strict=True)):
        raise InvalidInputError(
            f"Task '{task}' needs a graph whose only input is {INPUT} of float32 "
            f"[batch, {', '.join(map(str, wanted))}], as the image processor makes it; this one takes "
            f"{', '.join(map(str, inputs))}. Log it with task='tensors'."
        )
    output = heads()[task].output
    if output not in outputs:
        raise InvalidInputError(
            f"Task '{task}' needs a graph output named '{output}'; this graph has {', '.join(outputs)}. Rename it, or "
            f"log the graph with task='tensors'."
        )
