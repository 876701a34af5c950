"""Any graph: takes and returns name → array."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from mlflow_tdeploy.core.budget import MEAN, PART, SPREAD, TIED, VECTOR_BUDGET, Budget
from mlflow_tdeploy.core.compare import EXACT_SHARE, MEAN_SPREAD, VALUE_SHARE, Choices, Comparison, Parts, Rows, merged
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.made_up import is_mask, make_up, within
from mlflow_tdeploy.core.masks import without_answer
from mlflow_tdeploy.core.spread import Spread
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Encoded, Task
from mlflow_tdeploy.core.tensors import Array, Arrays, At, Signature, numpy_dtype

#: So many times one and the same whole number is no accident.
_SEVERAL = 8


@dataclass(frozen=True)
class TensorsConfig:
    """Settings of a model of any graph.

    Attributes:
        integer_ranges: For inputs of whole numbers: how many rows the table has that the graph looks them up in.
        positions: For inputs of whole numbers: the dimension in which they are positions, such as the ends of edges.
        lengths: The dimension of which they are lengths.
        ordered: Inputs of whole numbers that never fall, such as the offsets of bags, and what each begins with.
        repeated: Inputs of whole numbers that rise in the example, of which the model takes no others (hours of a day).
        missing: Inputs of floats that may be NaN, as they are in the example: the model knows what to do about it.
        independent_rows: Whether a row's answer is the same whichever rows are beside it: a score that is normalised
            over the rows of a request is not, and no server may join such requests.
    """

    integer_ranges: Mapping[str, int] = field(default_factory=dict)
    positions: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[str, str] = field(default_factory=dict)
    ordered: Mapping[str, int] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    independent_rows: bool = True


@TASKS.register("tensors")
class Tensors(Task):
    """One request is one batch of arrays; sizes out of range are refused before inference."""

    name: ClassVar[str] = "tensors"
    settings: ClassVar[type] = TensorsConfig
    input_kind: ClassVar[Literal["text", "image", "tensors"]] = "tensors"
    default_budget: ClassVar[Budget] = Budget((*VECTOR_BUDGET.limits, MEAN, PART))

    @property
    def independent_rows(self) -> bool:
        """Whether a row's answer is the same whichever rows are beside it, as was found by trying."""
        return bool(self.config.independent_rows)

    def items(self, inputs: Any) -> list[Any]:
        """Return the request's arrays, checked against the signature, as the only item."""
        arrays = self._arrays(inputs)
        for name, array in arrays.items():
            if array.size == 0:
                raise InvalidInputError(f"Input '{name}' is empty (shape {array.shape}).")
        self.signature.bind(arrays)
        for name, array in arrays.items():
            if name in self.config.missing or array.dtype.kind in "biu":  # bfloat16 is of a kind of its own
                continue
            if np.isnan(array).any():
                raise InvalidInputError(
                    f"Input '{name}' has NaN values. Fill them first (a model that knows missing values is logged with "
                    f"an example that has some)."
                )
        return [arrays]

    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> Encoded:
        """Pass the arrays on."""
        return _Whole(items)

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the outputs by name."""
        return [outputs]

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> Arrays:
        """Return the only answer."""
        arrays: Arrays = answers[0]
        return arrays

    def answer_form(self) -> AnswerForm:
        """Return tensors as the signature's outputs say."""
        return AnswerForm("tensors")

    def comparison(self) -> Comparison:
        """Compare every output by itself, one row per first axis."""
        return _TensorComparison(self.signature)

    def example_feeds(
        self,
        at: At,
        *,
        ragged: bool,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        items: Sequence[Any] | None = None,
    ) -> Arrays:
        """Return arrays like ``items``, see :mod:`mlflow_tdeploy.core.made_up`."""
        shapes = {
            spec.name: tuple(
                size if isinstance(size, int) else (sizes or {}).get(size) or self.signature.dim(size).at(at)
                for size in spec.shape
            )
            for spec in self.signature.inputs
        }
        feeds = make_up(
            self.signature.inputs,
            shapes,
            items or (),
            self.config.integer_ranges,
            ragged=ragged,
            random=np.random.default_rng(seed),
            repeated=self.config.repeated,
        )
        return within(feeds, self.signature, self.config.positions, self.config.lengths, self.config.ordered)

    def made_up_blindly(self, items: Sequence[Any] = ()) -> list[str]:
        """Return the inputs of whole numbers of which nothing is known: masks are ones and zeros."""
        whole = [spec.name for spec in self.signature.inputs if numpy_dtype(spec.dtype).kind in "iu"]
        told = {name for name in whole if any(item[name].any() for item in items)}
        known = {*self.config.integer_ranges, *self.config.positions, *self.config.lengths, *told}
        return [name for name in whole if name not in known and not is_mask(name)]

    def _arrays(self, inputs: Any) -> Arrays:
        if hasattr(inputs, "columns") and hasattr(inputs, "to_numpy"):  # a DataFrame
            inputs = self._of_table(inputs)
        if not isinstance(inputs, Mapping):
            if len(self.signature.inputs) != 1:
                names = ", ".join(spec.name for spec in self.signature.inputs)
                raise InvalidInputError(f"This model has several inputs: pass a mapping from name to array ({names}).")
            inputs = {self.signature.inputs[0].name: inputs}
        dtypes = {spec.name: spec.dtype for spec in self.signature.inputs}
        if unknown := [name for name in inputs if name not in dtypes]:
            raise InvalidInputError(
                f"Unknown input tensor {shown(unknown[0])}. "
                f"This model takes: {', '.join(map(str, self.signature.inputs))}."
            )
        return {name: _as_array(name, value, dtypes[name]) for name, value in inputs.items()}

    def _of_table(self, table: Any) -> Any:
        """Return the columns of a table: one for each input, or, of a lone input of rows, a number of it each."""
        columns = list(table.columns)
        if len(set(columns)) < len(columns):
            raise InvalidInputError(f"The table has two columns of one name: {shown(columns, 200)}.")
        (first, *others) = self.signature.inputs
        named = {name for name in columns if isinstance(name, str)}  # pandas.NA compares with nothing
        if not others and len(first.shape) == 2 and first.name not in named:
            return table.to_numpy().tolist()
        found = {name: table[name].tolist() for name in columns}
        for spec in self.signature.inputs:
            values = found.get(spec.name, ())
            narrow = len(spec.shape) == 2 and spec.shape[1] == 1  # some graphs take a column with a second axis
            if values and narrow and not any(hasattr(one, "__len__") for one in values):
                found[spec.name] = [[one] for one in values]
        return found


class _Whole(Encoded):
    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        self.lengths = [1] * len(items)

    def collate(self, indices: Sequence[int]) -> Arrays:
        arrays: Arrays = self._items[indices[0]]
        return arrays


class _TensorComparison(Comparison):
    """Floats by rows; whole numbers and truth values one by one: an index that is nearly right is wrong.

    Outputs have scales of their own (boxes, scores), so each is compared by itself. All of an item's values in one
    output are one row. Of an output with more axes the rows along the last one (the classes of a token, a box) are
    parts that count by themselves, and each axis once has the columns of the spread error: channels come first or last.
    Of an output with fewer axes whose rows are no items, or are of any length (a number an edge, a series), the numbers
    along the axis that varies are one column: without that nothing would be told apart. Where several axes have a fixed
    size, or the first one (heads that are stacked), each place in them is a column: it may be of a kind of its own.
    """

    def __init__(self, signature: Signature) -> None:
        items = {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)}
        self._one_per_item = {
            spec.name for spec in signature.outputs if len(spec.shape) == 1 and spec.shape[0] in items
        }
        # with sizes that vary every width of rows has columns of its own, and few rows: its axes have them, too
        self._vary = {
            spec.name for spec in signature.outputs if len(spec.shape) > 2 and any(map(_named, spec.shape[1:]))
        }
        self._shapes = {spec.name: spec.shape for spec in signature.outputs}
        firsts = {spec.shape[0] for spec in signature.inputs if spec.shape}  # one for all: items, in a fixed number
        self._stacked = {spec.name for spec in signature.outputs if _is_stacked(spec.shape, firsts)}
        floats = [spec for spec in signature.outputs if numpy_dtype(spec.dtype).kind not in "biu" and spec.shape]
        self._scores = {
            spec.name: [one.name for one in floats if one.shape == spec.shape] for spec in signature.outputs
        }
        self._rows: dict[str, Rows] = {}
        self._parts: defaultdict[str, Parts] = defaultdict(Parts)
        self._axes: defaultdict[tuple[str, int], Spread] = defaultdict(Spread)
        self._places: defaultdict[str, Spread] = defaultdict(Spread)
        self._choices: defaultdict[str, Choices] = defaultdict(Choices)
        self._tied = 0
        self._behind: defaultdict[str, _Behind] = defaultdict(_Behind)

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        for name, array in reference.items():
            if array.dtype.kind in "biu":
                told = self._told(name, reference)
                self._tied += self._behind_ties(name, reference, array != got[name])
                self._choices[name].add(array[told], got[name][told])
                self._behind[name].add(array[~told], got[name][~told])
                continue
            if array.size == 0:
                continue
            rows = len(array) if array.ndim > 1 or name in self._one_per_item or _has_items(array, inputs) else 1
            compared = self._rows.setdefault(name, Rows(spread=name not in self._vary))
            compared.add(array.reshape(rows, -1), got[name].reshape(rows, -1))
            if fixed := _apart(self._shapes.get(name, ()), stacked=name in self._stacked):
                self._add_places(name, array, got[name], fixed)
            if array.ndim > 2 or (name in self._stacked and array.ndim > 1):
                self._add_parts(name, array, got[name])
            elif array.ndim and (rows == 1 or _named(self._shapes.get(name, (0,))[-1])):
                self._add_numbers(name, array, got[name])

    def _told(self, name: str, reference: Arrays) -> Array:
        """Return which whole numbers say something: behind a masked score of the same place a choice may be any."""
        found = np.ones(reference[name].shape, bool)
        for other in self._scores.get(name, ()):
            scores = reference[other]
            if scores.shape == found.shape and scores.size:
                rows = scores.astype(np.float64).reshape(len(scores), -1)
                found &= ~without_answer(rows, scores.dtype).reshape(found.shape)
        return found

    def _behind_ties(self, name: str, reference: Arrays, differ: Array) -> int:
        """Count the whole numbers that differ behind scores that others of their row equal: any order is right."""
        found = np.zeros(differ.shape, bool)
        for other in self._scores.get(name, ()) if differ.any() and differ.ndim else ():
            scores = reference[other]
            if scores.shape == differ.shape:
                row = np.sort(scores, axis=-1)
                found |= (row[..., 1:] == row[..., :-1]).any(axis=-1, keepdims=True)
        return int((found & differ).sum())

    def _add_places(self, name: str, ref: Array, got: Array, fixed: tuple[int, ...]) -> None:
        ends, width = range(-len(fixed), 0), math.prod(ref.shape[axis] for axis in fixed)
        self._places[name].add(*(np.moveaxis(one, fixed, ends).reshape(-1, width) for one in _answers(ref, got)))

    def _add_parts(self, name: str, ref: Array, got: Array) -> None:
        *both, known = _answers(ref, got)
        if ref.ndim > 2:
            self._parts[name].add(*(one.reshape(-1, ref.shape[-1]) for one in both))
        for axis in range(0 if name in self._stacked else 1, ref.ndim):
            columns = [np.moveaxis(one, axis, -1).reshape(-1, ref.shape[axis]) for one in (*both, known)]
            self._axes[name, axis].add(*columns)

    def _add_numbers(self, name: str, ref: Array, got: Array) -> None:
        """Add the numbers of an output as the rows of few columns: one for each place of an axis of fixed size."""
        flat = ref.astype(np.float64).reshape(-1, ref.shape[-1])
        known = ~without_answer(flat, ref.dtype) & np.isfinite(flat) & np.isfinite(got.reshape(flat.shape))
        both = [np.where(known, one.reshape(flat.shape), 0.0).astype(np.float64) for one in (ref, got)]
        fixed = not all(map(_named, self._shapes.get(name, ())))  # (quantiles, batch): each quantile by itself
        columns = [one.T if fixed else one.reshape(-1, 1) for one in (*both, known)]
        self._axes[name, 0].add(*columns)

    def metrics(self) -> dict[str, float]:
        found = merged(self._rows.values())
        own = [*(one.spread for one in self._rows.values()), *self._places.values()]
        spreads = [*own, *self._axes.values()]
        found[SPREAD.metric] = max((one.error() for one in spreads), default=0.0)
        means = [*(one.mean() for one in spreads), *(one.worst_of_few() for one in own)]
        found[MEAN_SPREAD] = max(means, default=0.0)
        found[PART.metric] = max((one.error() for one in self._parts.values()), default=0.0)
        choices = [*self._choices.values(), *(one.choices for one in self._behind.values() if one.is_marker)]
        shares = (
            min((one.share() for one in choices), default=1.0),
            min((one.least() for one in choices), default=1.0),
        )
        tied = {TIED: float(self._tied)} if self._tied else {}
        return {**found, EXACT_SHARE: shares[0], VALUE_SHARE: shares[1], **tied}


class _Behind:
    """Whole numbers behind masked scores: the same one throughout is no choice, it says that there is none (-1)."""

    def __init__(self) -> None:
        self.choices = Choices()
        self._values: set[int] = set()
        self._count = 0

    def add(self, ref: Array, got: Array) -> None:
        """Take in values of the reference and of the variant."""
        self.choices.add(ref, got)
        self._count += ref.size
        if len(self._values) < 2:
            self._values.update(np.unique(ref).tolist())

    @property
    def is_marker(self) -> bool:
        return len(self._values) == 1 and self._count >= _SEVERAL


def _named(size: str | int) -> bool:
    return isinstance(size, str)


def _answers(ref: Array, got: Array) -> tuple[Array, Array, Array]:
    """Return both with 0 where there is no answer (whether masks are there still, the rows tell), and where one is."""
    rows = ref.astype(np.float64).reshape(len(ref) if ref.ndim > 1 else 1, -1)  # a mask is one beside its item's rest
    known = ~without_answer(rows, ref.dtype).reshape(ref.shape) & np.isfinite(ref) & np.isfinite(got)
    return *(np.where(known, one, 0.0).astype(np.float64) for one in (ref, got)), known  # type: ignore[return-value]


def _is_stacked(shape: Sequence[str | int], firsts: AbstractSet[str | int]) -> bool:
    """Tell whether what an output has along its first axis is no items: of a fixed size that is not the inputs' own."""
    return bool(shape) and not _named(shape[0]) and firsts != {shape[0]}


def _apart(shape: Sequence[str | int], *, stacked: bool) -> tuple[int, ...]:
    """Return the axes of fixed size where columns of one axis alone, or of whole items, tell their places not apart."""
    fixed = tuple(axis for axis, size in enumerate(shape) if not _named(size) and (axis or stacked))
    return fixed if 0 in fixed or 1 < len(fixed) < len(shape) - 1 else ()


def _has_items(array: Array, inputs: Arrays) -> bool:
    """Tell whether an output has a number per item, whatever its axis is called: as many as each input has rows."""
    return array.ndim > 0 and {len(one) for one in inputs.values() if one.ndim} == {len(array)}


def _as_array(name: str, value: Any, dtype: str) -> Array:
    """Return ``value`` as an array; only plain lists take the signature's dtype, arrays keep theirs."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    if value is None:
        raise InvalidInputError(f"Input '{name}' is None.")
    try:
        array = np.asarray(value)
        if array.dtype == object:
            array = np.asarray(np.stack(list(array)))
        if array.dtype == object:  # of plain numbers, as a table of several types gives it
            array = np.asarray(array.tolist())
        if array.dtype.kind == "f" and numpy_dtype(dtype).kind in "iu":
            array = _exact(value, array)
    except Exception as error:  # whatever a caller's own type raises when it is made an array
        why = "rows of different lengths" if "inhomogeneous" in str(error) else shown(str(error), 200)
        raise InvalidInputError(f"Input '{name}' is not a regular array of numbers: {why}.") from error
    whole = array.dtype == object and all(type(one) is int for one in array.flat)
    if whole and not all(-(2**63) <= one < 2**64 for one in array.flat):  # may have too many digits to be shown
        raise InvalidInputError(f"Input '{name}' has a whole number of more than 64 bits. Pass it as a float.")
    if array.dtype.kind not in "biuf" and not whole:
        raise InvalidInputError(f"Input '{name}' is not a regular array of numbers: it has {_what_else(array)}.")
    return _cast(name, array, dtype)


def _exact(value: Any, rounded: Array) -> Array:
    """Return whole numbers as they came: numpy makes floats of a list with one that int64 does not hold."""
    array = np.asarray(value, dtype=object)
    return array if array.shape == rounded.shape and all(type(one) is int for one in array.flat) else rounded


def _what_else(array: Array) -> str:
    """Say what an array holds that is no number."""
    if array.dtype.kind in "US":
        return "texts"
    other = next((one for one in array.flat if not isinstance(one, (int, float, np.number))), None)
    return shown(other)


def _cast(name: str, array: Array, dtype: str) -> Array:
    """Return numbers in the signature's dtype, where every one of them fits it: nothing wraps, overflows or is cut.

    Raises:
        InvalidInputError: One does not fit.
    """
    target = numpy_dtype(dtype)
    if array.size == 0 or array.dtype == target:
        return array.astype(target)
    if target.kind not in "biu":
        return _cast_to_float(name, array, target)
    if array.dtype.kind == "f":
        raise InvalidInputError(
            f"Input '{name}' must be {dtype}, got numbers with a fraction or exponent, such as "
            f"{array.reshape(-1)[0]}. Round them first."
        )
    low, high = (0, 1) if target.kind == "b" else (int(np.iinfo(target).min), int(np.iinfo(target).max))
    for found in (int(array.min()), int(array.max())):
        if not low <= found <= high:
            raise InvalidInputError(f"Input '{name}' has the value {found}, outside {dtype}'s range {low}..{high}.")
    return array.astype(target)


def _cast_to_float(name: str, array: Array, target: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        array = array.astype(np.float64) if array.dtype == object else array
        cast: Array = array.astype(target)
    if (lost := np.isfinite(array) & ~np.isfinite(cast)).any():
        raise InvalidInputError(f"Input '{name}' has the value {array[lost][0]}, which is too large for {target.name}.")
    return cast
