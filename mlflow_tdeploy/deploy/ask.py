"""Requests to a deployment in the forms that ``predict`` takes, and its answers in those that it returns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_tdeploy.core.columns import TEXT, Column, read_items
from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, TDeployError, shown
from mlflow_tdeploy.core.gaps import Usable, leaves_gaps, readable
from mlflow_tdeploy.core.records import from_plain
from mlflow_tdeploy.core.tensors import Array, Arrays
from mlflow_tdeploy.core.wire import ANSWER, STRING, asked_of
from mlflow_tdeploy.triton.client import TritonClient, parameters_of
from mlflow_tdeploy.triton.config import DTYPE_OF, ours

#: Texts in one request to a deployment whose requests are not joined.
_ROWS = 256
#: Most bytes of texts or images in one: Triton's HTTP server takes 64 MiB by default.
_BYTES = 32 << 20
#: So many versions may come while one call is answered.
_SWITCHES = 4


@dataclass(frozen=True)
class _Tensor:
    """A tensor as a configuration declares it: its dtype, and whether it is sent with an axis that it has not."""

    name: str
    dtype: str
    axes: int
    reshaped: bool

    @classmethod
    def of(cls, entry: Mapping[str, Any], rows: int) -> _Tensor:
        return cls(entry["name"], DTYPE_OF[entry["data_type"]], len(entry["dims"]) + rows, "reshape" in entry)

    def sent(self, value: Any) -> Array:
        """Return a value as it is sent."""
        if self.dtype == STRING:
            array = _as_bytes(value)
            return array[..., None] if array.ndim < self.axes else array
        try:
            array = value if isinstance(value, np.ndarray) and value.dtype != object else np.asarray(_listed(value))
            exact = array.astype(self.dtype)
            if array.dtype.kind in "iuf" and exact.dtype.kind in "iu" and (exact != array).any():
                raise ValueError(f"{shown(array.reshape(-1)[0])} does not fit")
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInputError(
                f"The input '{self.name}' cannot be made an array of {self.dtype}: {error}."
            ) from error
        if exact.size == 0:
            raise InvalidInputError(f"The input '{self.name}' is empty (shape {exact.shape}).")
        return exact[..., None] if self.reshaped and exact.ndim < self.axes else exact

    def received(self, array: Array) -> Array:
        """Return an array as the model gave it."""
        return array[..., 0] if self.reshaped and array.ndim == self.axes else array


def ask(
    client: TritonClient, name: str, inputs: Any, *, version: int | None = None, params: Mapping[str, Any] | None = None
) -> Any:
    """Ask a deployment.

    Args:
        client: The server.
        name: The deployment.
        inputs: Texts in any form that the loader takes; for ``tensors``, and for token ids, a mapping from name to
            array, or the only array that it has.
        version: A version that is loaded under the stable name; the one that answers by default.
        params: The task's parameters.

    Returns:
        What the loader returns: an array, a list of records or of arrays, or name → array.

    Raises:
        NotFoundError: The server has no such deployment.
        InvalidInputError: The request cannot be used.
        ServerError: The server cannot answer.
    """
    for _ in range(_SWITCHES):
        config, active = _answering(client, name, version)
        try:
            return _asked(client, name, config, inputs, active, params)
        except TDeployError:
            if version is not None or _answering(client, name, None)[1] == active:
                raise  # else another version has come meanwhile, and no answer is made of two
    config, active = _answering(client, name, version)
    return _asked(client, name, config, inputs, active, params)


def _answering(client: TritonClient, name: str, version: int | None) -> tuple[dict[str, Any], int]:
    """Return a deployment's configuration and the version that answers, or the one that is asked for."""
    config = client.config(name, version)
    own = {} if config is None else ours(parameters_of(config))
    if config is None or "takes" not in own:
        asked = f" version {version}" if version is not None else ""
        raise NotFoundError(f"The server at {client.connection.url} has no deployment '{name}'{asked} that answers.")
    if version is None:  # a repository that was rendered has a version, and no route
        rendered = config.get("version_policy", {}).get("specific", {}).get("versions", [0])
        version = int(own.get("active") or rendered[-1])
    return config, version


def _asked(
    client: TritonClient,
    name: str,
    config: Mapping[str, Any],
    inputs: Any,
    version: int,
    params: Mapping[str, Any] | None,
) -> Any:
    """Ask one version, with as many requests as it takes."""
    own, rows = ours(parameters_of(config)), int(int(config.get("max_batch_size", 0)) > 0)
    tensors = {entry["name"]: _Tensor.of(entry, rows) for entry in config["input"]}
    given = _given(inputs)
    columns = _columns(own)
    named = {column.name for column in columns}
    if named & set(given) and (both := sorted(set(given) & set(tensors) - named)):
        first = next(column.name for column in columns if column.name in given)
        raise InvalidInputError(f"A request has '{first}' or the graph's own tensors, not both; got {shown(both)}.")
    if columns and not (given and set(given) <= set(tensors) - named):
        most = int(config.get("max_batch_size", 0)) or _ROWS
        found = _readable(name, columns, inputs, params)
        if not found.items:
            return found.filled([])
        parts = [
            client.infer(name, asked, version=version, params=params)
            for asked in _parts(asked_of(columns, found.items), most)
        ]
        # an answer with a gap has no column for each of its fields
        common = [one for one in parts[0] if all(one in part for part in parts)]
        answer = _answer(own["answers"], {one: np.concatenate([part[one] for part in parts]) for one in common})
        return found.filled(answer)
    arrays = _arrays(name, tensors, inputs, given)
    outputs = {entry["name"]: _Tensor.of(entry, rows) for entry in config["output"]}
    got = client.infer(name, arrays, version=version, params=params)
    return {one: outputs[one].received(array) for one, array in got.items()}


def _parts(arrays: Arrays, most: int) -> Iterator[Arrays]:
    """Yield requests of at most so many rows, and of no more bytes than a server takes, unless one row has them."""
    sizes = [sum(len(one) for one in row) for row in zip(*(array.ravel() for array in arrays.values()), strict=True)]
    begin, held = 0, 0
    for row, size in enumerate(sizes):
        if row > begin and (row - begin == most or held + size > _BYTES):
            yield {name: array[begin:row] for name, array in arrays.items()}
            begin, held = row, 0
        held += size
    yield {name: array[begin:] for name, array in arrays.items()}


def _readable(name: str, columns: Sequence[Column], inputs: Any, params: Mapping[str, Any] | None) -> Usable:
    """Return what can be sent of a request."""
    who = f"'{name}'"
    if all(column.kind == "text" for column in columns):
        inputs = _decoded(inputs)
    if leaves_gaps(params):
        return readable(columns, inputs, who)
    items = read_items(inputs, columns, who)
    return Usable(items, None, len(items))


def _columns(own: Mapping[str, str]) -> tuple[Column, ...]:
    """Return the columns that a deployment reads; none where it takes tensors alone."""
    if own["takes"] == "tensors":
        return ()
    if "columns" not in own:  # of an older version, which knew single texts
        return (TEXT,)
    return tuple(from_plain(Column, one, "columns") for one in json.loads(own["columns"]))


def _decoded(inputs: Any) -> Any:
    """Return texts that come as Triton's BYTES as such; what is none is left for whoever reads them."""
    if isinstance(inputs, bytes):
        return inputs.decode("utf-8", "replace")
    if isinstance(inputs, Mapping):
        return {name: _decoded(value) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [_decoded(one) for one in inputs]
    if not (isinstance(inputs, np.ndarray) and inputs.dtype.kind in "OS"):
        return inputs
    found = np.empty(inputs.size, object)
    for index, one in enumerate(inputs.ravel()):  # else cells that are lists would be taken apart
        found[index] = _decoded(one)
    return found.reshape(inputs.shape)


def _as_bytes(value: Any) -> Array:
    """Return texts or bytes as an array of bytes, of the same shape."""
    array = np.asarray(_listed(value), object)
    flat = [one if isinstance(one, bytes) else str(one).encode("utf-8", "replace") for one in array.ravel()]
    found = np.empty(len(flat), object)
    found[:] = flat
    return found.reshape(array.shape)


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _given(inputs: Any) -> list[str]:
    """Return the names in a request that has names."""
    if hasattr(inputs, "columns"):
        return [str(column) for column in inputs.columns]
    return [str(name) for name in inputs] if isinstance(inputs, Mapping) else []


def _values(table: Any, axes: int) -> Array:
    """Return a table as the only input there is, as mlflow.onnx passes it on: a row each, a column a number."""
    array = np.asarray(table.to_numpy())
    if array.dtype == object and array.shape[1] == 1:
        array = np.asarray(table.iloc[:, 0].tolist())
    return array[:, 0] if array.ndim == axes + 1 and array.shape[1] == 1 else array


def _arrays(name: str, tensors: Mapping[str, _Tensor], inputs: Any, given: Iterable[str]) -> Arrays:
    known = list(tensors)
    names = list(given)
    if hasattr(inputs, "columns") and len(known) == 1 and known[0] not in names:
        names, inputs = [], _values(inputs, tensors[known[0]].axes)
    if not names:
        if len(known) != 1:
            raise InvalidInputError(
                f"'{name}' has several inputs: pass a mapping from name to array ({', '.join(known)})."
            )
        names, inputs = known, {known[0]: inputs}
    if unknown := [one for one in names if one not in known]:
        raise InvalidInputError(f"'{name}' has no input {shown(unknown[0])}. It takes: {', '.join(tensors)}.")
    return {one: tensors[one].sent(inputs[one]) for one in names}


def _answer(kind: str, got: Arrays) -> Any:
    """Return the answer to texts in the form of the task, see :class:`~mlflow_tdeploy.core.tasks.AnswerForm`."""
    if ANSWER not in got:
        return next(iter(got.values()))
    answers = [json.loads(one) for one in got[ANSWER].ravel()]
    if kind == "nested":
        return [None if one is None else np.asarray(one, np.float32) for one in answers]
    return answers
