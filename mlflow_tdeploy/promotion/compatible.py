"""Is who asks the version that serves answered by another one, too?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec


@dataclass(frozen=True)
class Difference:
    """Something that another version takes or answers otherwise.

    Attributes:
        what: What, for people.
        breaking: Whether somebody who asks the version before may not be answered, or not understand the answer.
    """

    what: str
    breaking: bool

    def __str__(self) -> str:
        return f"{self.what} (breaking)" if self.breaking else self.what


@dataclass(frozen=True)
class Asked:
    """What a version is asked and answers.

    Attributes:
        task: Its task.
        config: The task's settings.
        signature: Of its graph.
    """

    task: str
    config: Mapping[str, Any]
    signature: Signature


def differences(before: Asked, after: Asked) -> tuple[Difference, ...]:
    """Return what a version takes or answers otherwise than another one; names of dimensions are nobody's business.

    Of a task that takes texts or images those are what is asked: its graph may take other tensors.

    Args:
        before: The version that serves.
        after: The one to serve.
    """
    if before.task != after.task:
        return (Difference(f"the task is {after.task}, it was {before.task}", breaking=True),)
    found = [*_labels(before.config, after.config)]
    items = bool(TASKS.get(before.task).columns)
    found += [Difference(one.what, one.breaking and not items) for one in _inputs(before.signature, after.signature)]
    return (*found, *_outputs(before.signature, after.signature))


def _labels(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    old, new = ([str(one) for one in config.get("labels") or ()] for config in (before, after))
    if gone := [one for one in old if one not in new]:
        yield Difference(f"the label {', '.join(gone)} is gone", breaking=True)
    if more := [one for one in new if one not in old]:
        yield Difference(f"the label {', '.join(more)} is new", breaking=False)


def _inputs(before: Signature, after: Signature) -> Iterator[Difference]:
    yield from _names("input", before.inputs, after.inputs, new_breaks=True)
    for one, other in _same_form(before.inputs, after.inputs):
        for axis, (size, now) in enumerate(zip(one.shape, other.shape, strict=True)):
            yield from _range(f"axis {axis} of input '{one.name}'", _limits(before, size), _limits(after, now))
    yield from _tied(before, after)


def _outputs(before: Signature, after: Signature) -> Iterator[Difference]:
    yield from _names("output", before.outputs, after.outputs, new_breaks=False)
    for one, other in _same_form(before.outputs, after.outputs):
        for axis, (size, now) in enumerate(zip(one.shape, other.shape, strict=True)):
            where = f"axis {axis} of output '{one.name}'"
            if isinstance(size, int) and size != now:
                shown = "of any size" if isinstance(now, str) else now
                yield Difference(f"{where} is {shown}, it was {size}", breaking=True)
            elif isinstance(now, int) and size != now:
                yield Difference(f"{where} is {now} always", breaking=False)


def _names(
    kind: str, before: Sequence[TensorSpec], after: Sequence[TensorSpec], *, new_breaks: bool
) -> Iterator[Difference]:
    """Tell which tensors come and go, and which are of another form."""
    old, new = _by_name(before), _by_name(after)
    yield from (Difference(f"{kind} '{name}' is new", new_breaks) for name in new if name not in old)
    yield from (Difference(f"{kind} '{name}' is gone", breaking=True) for name in old if name not in new)
    for name in (name for name in old if name in new):
        one, other = old[name], new[name]
        if one.dtype != other.dtype:
            yield Difference(f"{kind} '{name}' is {other.dtype}, it was {one.dtype}", breaking=True)
        elif len(one.shape) != len(other.shape):
            told = f"{kind} '{name}' has {len(other.shape)} axes, it had {len(one.shape)}"
            yield Difference(told, breaking=True)


def _same_form(before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    """Yield the tensors of one name, type and number of axes, whose sizes can be held against each other."""
    new = _by_name(after)
    pairs = ((one, new[one.name]) for one in before if one.name in new)
    return ((one, other) for one, other in pairs if (one.dtype, len(one.shape)) == (other.dtype, len(other.shape)))


def _range(where: str, before: Dim, after: Dim) -> Iterator[Difference]:
    if after.min > before.min or after.max < before.max:
        yield Difference(f"{where} is {_span(after)}, it was {_span(before)}", breaking=True)
    elif (after.min, after.max) != (before.min, before.max):
        yield Difference(f"{where} is {_span(after)}, it was {_span(before)}", breaking=False)


def _tied(before: Signature, after: Signature) -> Iterator[Difference]:
    """Tell which axes have to be of one size now, and had not before."""
    old, new = _axes(before), _axes(after)
    for one, other in itertools.combinations((place for place in old if place in new), 2):
        free = old[one] != old[other] or not isinstance(old[one], str)
        varies = any(_limits(before, old[place]).min < _limits(before, old[place]).max for place in (one, other))
        if free and varies and isinstance(new[one], str) and new[one] == new[other]:
            told = " and ".join(f"axis {axis} of input '{name}'" for name, axis in (one, other))
            yield Difference(f"{told} have to be of one size", breaking=True)


def _axes(signature: Signature) -> dict[tuple[str, int], str | int]:
    return {(spec.name, axis): size for spec in signature.inputs for axis, size in enumerate(spec.shape)}


def _limits(signature: Signature, size: str | int) -> Dim:
    """Return how far an input's axis goes; a size that is fixed goes nowhere."""
    return signature.dim(size) if isinstance(size, str) else Dim("fixed", *(max(1, size),) * 3)


def _by_name(specs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def _span(dim: Dim) -> str:
    return str(dim.min) if dim.min == dim.max else f"{dim.min}..{dim.max}"
