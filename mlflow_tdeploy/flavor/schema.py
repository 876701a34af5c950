"""Our signature and task as an MLflow ``ModelSignature``.

MLflow's schema has no ranges and no dimension names: every ranged dimension becomes -1 there, and the ranges
are checked by the task.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array, Object, Property

from mlflow_tdeploy.core.columns import Column
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import Field, Task
from mlflow_tdeploy.core.tensors import Signature, numpy_dtype
from mlflow_tdeploy.core.tensors import TensorSpec as OurSpec

_log = logging.getLogger("mlflow_tdeploy")

#: Parameters that every model takes, beside its task's own.
HOST_PARAMS = (("variant", DataType.string, ""), ("runtime", DataType.string, ""), ("strict", DataType.boolean, False))


def mlflow_signature(task: Task) -> ModelSignature:
    """Return the MLflow signature of a model of this task."""
    return ModelSignature(inputs=_inputs(task), outputs=_outputs(task), params=_params(task))


def merge_signature(task: Task, given: ModelSignature | None) -> ModelSignature:
    """Return the user's signature if the model can serve it, with the model's parameters if it names none.

    Args:
        task: The task.
        given: The user's signature.

    Raises:
        InvalidInputError: The user's signature does not fit the model.
    """
    own = mlflow_signature(task)
    if given is None:
        return own
    if given.inputs is not None:
        _check_inputs(task, given.inputs)
        if task.columns and not given.inputs.has_input_names():
            _log.warning(
                "With the signature %s MLflow hands on nothing but the first column of a table, whatever its name.",
                given.inputs,
            )
    known = {spec.name: spec for spec in own.params.params}
    for spec in given.params.params if given.params else ():
        if spec.name not in known:
            raise InvalidInputError(
                f"The signature has the parameter '{spec.name}', which task '{task.name}' does not take. "
                f"Known: {', '.join(known)}."
            )
    return ModelSignature(
        inputs=given.inputs or own.inputs, outputs=given.outputs or own.outputs, params=given.params or own.params
    )


def _inputs(task: Task) -> Schema | None:
    """Return what goes in; None for texts and images, so that the task itself sees and checks the whole request.

    MLflow has no schema that fits texts: an unnamed column makes it drop every column but the first, whatever
    their names, before the model sees the table; a named one makes it refuse lists, strings and Series. So inputs are
    stated only where the user's own signature says what will come; an example does not say what else will.
    """
    if task.columns:
        return None
    return _tensor_inputs(task)


def _tensor_inputs(task: Task) -> Schema:
    return Schema([_tensor(task.signature, spec) for spec in task.signature.inputs])


def _outputs(task: Task) -> Schema:
    form = task.answer_form()
    if form.kind == "array":
        return Schema([TensorSpec(np.dtype(np.float32), (-1, form.width))])
    if form.kind == "records":
        return Schema([ColSpec(_column(field), field.name) for field in form.fields])
    if form.kind == "lists":
        row = Object([Property(field.name, _column(field)) for field in form.fields])
        return Schema([ColSpec(Array(row))])
    if form.kind == "nested":
        return Schema([ColSpec(Array(Array(Array(DataType.double))))])
    return Schema([_tensor(task.signature, spec) for spec in task.signature.outputs])


def _column(field: Field) -> DataType | Array:
    return Array(DataType[field.dtype]) if field.many else DataType[field.dtype]


def _params(task: Task) -> ParamSchema:
    own = [
        ParamSpec(param.name, DataType[param.dtype], param.default, shape=(-1,) if param.many else None)
        for param in task.params
    ]
    return ParamSchema([*own, *(ParamSpec(*param) for param in HOST_PARAMS)])


def _tensor(signature: Signature, spec: OurSpec) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else _size(signature, size) for size in spec.shape)
    return TensorSpec(numpy_dtype(spec.dtype), shape, spec.name)


def _size(signature: Signature, name: str) -> int:
    if not signature.has_dim(name):
        return -1
    dim = signature.dim(name)
    return dim.max if dim.min == dim.max else -1


def _check_inputs(task: Task, schema: Schema) -> None:
    if task.columns:
        _check_columns(task, schema)
        return
    if not schema.is_tensor_spec():
        raise InvalidInputError(f"The signature does not fit task '{task.name}', which takes tensors; got {schema}.")
    _check_tensors(task, schema)


def _check_columns(task: Task, schema: Schema) -> None:
    """Make sure that a schema is of a lone column of texts, or of the task's columns by their names."""
    needed = [column.name for column in task.columns if not column.optional]
    lone = len(needed) == 1 and len(schema.inputs) == 1 and _holds(schema.input_types()[0], task.columns[0])
    others = {key for column in task.columns[1:] for key in column.keys}
    if (lone and not others & set(schema.input_names())) or _names(task, schema):
        return
    wanted = " and ".join(f"'{name}'" for name in needed) if len(needed) > 1 else "one column"
    what = "strings" if task.input_kind == "text" else "binary (or of strings in base64)"
    hint = ", or pass ModelSignature(inputs=Schema([ColSpec('string')]))" if len(needed) == 1 else ""
    raise InvalidInputError(
        f"The signature does not fit task '{task.name}', which takes {wanted} of {what}; got {schema}. Leave the "
        f"signature out{hint}."
    )


def _names(task: Task, schema: Schema) -> bool:
    """Tell whether a schema names the columns of a task, those that are needed at least, and no others."""
    if not schema.has_input_names():
        return False
    kinds = dict(zip(schema.input_names(), schema.input_types(), strict=True))
    own = {key: column for column in task.columns for key in column.keys}
    good = all(name in own and _holds(kind, own[name]) for name, kind in kinds.items())
    named = [own[name].name for name in kinds if name in own]
    return good and len(set(named)) == len(named) and all(one.optional or one.name in named for one in task.columns)


def _holds(kind: Any, column: Column) -> bool:
    if column.kind == "image" and kind == DataType.binary:
        return True
    return bool(kind == Array(DataType.string)) if column.many else _is_text(kind)


def _is_text(kind: Any) -> bool:
    return bool(kind == DataType.string) or (isinstance(kind, np.dtype) and kind.kind in "OUT")


def _check_tensors(task: Task, schema: Schema) -> None:
    own = _tensor_inputs(task)
    expected: dict[Any, Any] = {spec.name: spec for spec in own.inputs}
    got: dict[Any, Any] = {spec.name: spec for spec in schema.inputs}
    if len(expected) == 1 and set(got) == {None}:
        got = {next(iter(expected)): schema.inputs[0]}  # a lone tensor may go without its name
    for name, spec in expected.items():
        other = got.get(name)
        if other is None or other.type != spec.type or not _shapes_fit(other.shape, spec.shape):
            raise InvalidInputError(
                f"The signature does not fit the model at input '{name}': expected {spec}, got {other}. "
                f"Leave the signature out to use the model's own."
            )
    if extra := set(got) - set(expected):
        raise InvalidInputError(f"The signature has an input the model does not take: {min(map(str, extra))!r}.")


def _shapes_fit(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in zip(a, b, strict=True))
