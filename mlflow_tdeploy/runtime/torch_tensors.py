"""Torch tensors where arrays are expected, without importing torch: whoever passes one has done so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tensors import Array, Arrays, numpy_dtype


def are_tensors(feeds: Mapping[str, Any]) -> bool:
    """Tell whether some of the values are torch tensors.

    Raises:
        InvalidInputError: Others are not, or they are on several devices.
    """
    torch: Any = sys.modules.get("torch")
    found = [isinstance(value, torch.Tensor) for value in feeds.values()] if torch is not None else []
    if not any(found):
        return False
    if not all(found) or len({value.device for value in feeds.values()}) > 1:
        raise InvalidInputError("infer takes numpy arrays or torch tensors of one device, not some of each.")
    for name, value in feeds.items():
        if value.is_meta or value.layout != torch.strided:
            kind = "on the meta device" if value.is_meta else f"of layout {value.layout}"
            raise InvalidInputError(f"Input '{name}' is a tensor {kind}, which holds no dense numbers.")
    return True


def stand_ins(feeds: Mapping[str, Any]) -> Arrays:
    """Return arrays of the tensors' dtypes and shapes that hold nothing: what a signature looks at.

    Raises:
        InvalidInputError: A dtype that numpy has no name for.
    """
    return {name: _stand_in(name, tensor) for name, tensor in feeds.items()}


def _stand_in(name: str, tensor: Any) -> Array:
    try:
        dtype = numpy_dtype(str(tensor.dtype).removeprefix("torch."))
    except InvalidInputError as error:
        raise InvalidInputError(f"Input '{name}' has the dtype {tensor.dtype}, which no model takes.") from error
    return np.broadcast_to(np.empty((), dtype), tuple(tensor.shape))


def through_host(infer: Callable[[Arrays], Arrays], feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Run a function of arrays on tensors: copied to the host, the answers copied back to where the inputs are."""
    torch, device = sys.modules["torch"], next(iter(feeds.values())).device
    answers = infer({name: _array(torch, tensor.detach().cpu()) for name, tensor in feeds.items()})
    return {name: _tensor(torch, array).to(device) for name, array in answers.items()}


def _array(torch: Any, tensor: Any) -> Array:
    """Return a tensor's numbers as an array; numpy has bfloat16 from elsewhere, so torch does not convert it."""
    if tensor.dtype != torch.bfloat16:
        array: Array = tensor.numpy()
        return array
    return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))  # type: ignore[no-any-return]


def _tensor(torch: Any, array: Array) -> Any:
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
