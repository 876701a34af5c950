"""Named tensors with named dimensions, each with a range: the signature, declared once.

It drives export, the MLflow signature, verification and benchmark shapes, TensorRT profiles and error
messages. Ranges follow TensorRT's optimization profiles (min, opt, max).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError, shown

Array = NDArray[Any]
Arrays = dict[str, Array]
At = Literal["min", "opt", "max"]

DTYPES = (
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "bfloat16", "float32", "float64",
)  # fmt: skip


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype called ``name``; ``bfloat16`` comes from ``ml_dtypes``.

    Raises:
        InvalidInputError: The name is none of :data:`DTYPES`.
        MissingDependencyError: It is ``bfloat16`` and ``ml_dtypes`` is not installed.
    """
    if name not in DTYPES:
        raise InvalidInputError(f"Unknown tensor dtype {name!r}. Available: {', '.join(DTYPES)}.")
    if name == "bfloat16":
        try:
            import ml_dtypes  # only models that use bfloat16 need it
        except ImportError:
            raise MissingDependencyError(
                "ml_dtypes", "A model with bfloat16 tensors", "pip install ml_dtypes"
            ) from None
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


@dataclass(frozen=True)
class Dim:
    """A named dimension and how far it may vary.

    Attributes:
        name: Name shared by every tensor that has this dimension, for example ``"sequence"``.
        min: Smallest allowed size, at least 1.
        opt: The size to be fastest at.
        max: Largest allowed size.
    """

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InvalidInputError(f"A dimension's name must be an identifier, got {self.name!r}.")
        if not 1 <= self.min <= self.opt <= self.max:
            raise InvalidInputError(
                f"Dimension '{self.name}' needs 1 <= min <= opt <= max, "
                f"got min={self.min}, opt={self.opt}, max={self.max}."
            )

    @classmethod
    def of(cls, name: str, value: object) -> Dim:
        """Make a dimension from what a user writes: ``(min, opt, max)``, ``(min, max)``, an int or a Dim.

        Raises:
            InvalidInputError: ``value`` is none of these.
        """
        if isinstance(value, Dim):
            return cls(name, value.min, value.opt, value.max)
        numbers = (value,) * 3 if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
        if len(numbers) == 2:
            numbers = (numbers[0], numbers[0], numbers[1])
        if len(numbers) != 3 or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in numbers):
            raise InvalidInputError(
                f"The range of dimension '{name}' must be (min, opt, max) of integers, (min, max) or one integer, "
                f"got {value!r}."
            )
        return cls(name, *(int(n) for n in numbers))

    def at(self, at: At) -> int:
        """Return the size at ``"min"``, ``"opt"`` or ``"max"``."""
        return {"min": self.min, "opt": self.opt, "max": self.max}[at]

    def __str__(self) -> str:
        return f"{self.name} {self.min}..{self.max} (opt {self.opt})"


def dim_step(dim: Dim) -> int:
    """Return what a dimension's bounds are all multiples of: 8 for a model that halves its input three times."""
    return math.gcd(dim.min, dim.opt, dim.max)


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor.

    Attributes:
        name: Name in the graph.
        dtype: One of :data:`DTYPES`.
        shape: Per axis the name of a :class:`Dim` or a fixed size.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidInputError(
                f"Tensor '{self.name}': unknown dtype {self.dtype!r}. Available: {', '.join(DTYPES)}."
            )
        for size in self.shape:
            if isinstance(size, int) and size < 0:
                raise InvalidInputError(f"Tensor '{self.name}': a fixed size must not be negative, got {size}.")

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """What goes in and out of a graph.

    Attributes:
        dims: Every named dimension, once.
        inputs: Input tensors in the graph's order.
        outputs: Output tensors in the graph's order. An output may have dims that no input has
            (data-dependent sizes); their names need no entry in ``dims``.
    """

    dims: tuple[Dim, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if not self.inputs or not self.outputs:
            raise InvalidInputError("A signature needs at least one input and one output.")
        for kind, names in (
            ("dimension", [d.name for d in self.dims]),
            ("input", [t.name for t in self.inputs]),
            ("output", [t.name for t in self.outputs]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise InvalidInputError(f"The {kind} {min(twice)!r} is declared twice.")
        known = {d.name for d in self.dims}
        for spec in self.inputs:
            for size in spec.shape:
                if isinstance(size, str) and size not in known:
                    raise InvalidInputError(
                        f"Input '{spec.name}' uses dimension '{size}', which has no declared range."
                    )

    def dim(self, name: str) -> Dim:
        """Return the dimension called ``name``.

        Raises:
            InvalidInputError: There is none.
        """
        for dim in self.dims:
            if dim.name == name:
                return dim
        raise InvalidInputError(f"No dimension '{name}'. Declared: {', '.join(d.name for d in self.dims) or 'none'}.")

    @property
    def batch_dim(self) -> str | None:
        """The dimension along which requests may be joined by its form, or None.

        It is the one that every tensor begins with, may be 1 and is no other axis of anything. An output whose size
        depends on values (as many as are found) would depend on the requests beside one's own: then there is none.
        """
        first = {spec.shape[0] if spec.shape else None for spec in (*self.inputs, *self.outputs)}
        name = first.pop()
        if first or not isinstance(name, str) or not self.has_dim(name) or self.dim(name).min != 1:
            return None
        again = any(name in spec.shape[1:] for spec in (*self.inputs, *self.outputs))
        sizes = {size for spec in self.outputs for size in spec.shape if isinstance(size, str)}
        return None if again or not all(map(self.has_dim, sizes)) else name

    def limited(self, name: str, most: int) -> Signature:
        """Return the signature with a dimension that goes no further than ``most``."""
        dims = [
            replace(dim, opt=min(dim.opt, most), max=min(dim.max, most)) if dim.name == name else dim
            for dim in self.dims
        ]
        return replace(self, dims=tuple(dims))

    def has_dim(self, name: str) -> bool:
        """Tell whether a dimension of that name is declared."""
        return any(dim.name == name for dim in self.dims)

    def shape_of(self, spec: TensorSpec, at: At = "opt") -> tuple[int, ...]:
        """Return the concrete shape of an input at the minimum, optimum or maximum of every dimension."""
        return tuple(size if isinstance(size, int) else self.dim(size).at(at) for size in spec.shape)

    def bind(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        """Check input arrays and return the size of every named dimension.

        Raises:
            InvalidInputError: A tensor is missing or unknown, has a wrong dtype or rank, or a size is out
                of range or differs between tensors. The message names tensor, dimension, value and range.
        """
        self._check_names(arrays)
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            array = arrays[spec.name]
            self._check_form(spec, array)
            for axis, (size, got) in enumerate(zip(spec.shape, array.shape, strict=True)):
                self._check_size(spec, axis, size, got, sizes)
        return sizes

    def sizes(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        """Return the size of every named dimension of inputs that need not be within its range."""
        found: dict[str, int] = {}
        for spec in self.inputs:
            for axis, size in zip(spec.shape, arrays[spec.name].shape, strict=True):
                if isinstance(axis, str):
                    found.setdefault(axis, size)
        return found

    def _check_names(self, arrays: Mapping[str, Array]) -> None:
        expected = {spec.name for spec in self.inputs}
        form = f"This model takes: {', '.join(map(str, self.inputs))}."
        if missing := sorted(expected - set(arrays)):
            raise InvalidInputError(f"Input tensor '{missing[0]}' is missing. {form}")
        if unknown := [name for name in arrays if name not in expected]:
            raise InvalidInputError(f"Unknown input tensor {shown(unknown[0])}. {form}")

    def _check_form(self, spec: TensorSpec, array: Array) -> None:
        if not isinstance(array, np.ndarray):
            raise InvalidInputError(f"Input '{spec.name}' must be a numpy array of {spec}, got {type(array).__name__}.")
        if array.dtype != numpy_dtype(spec.dtype):
            raise InvalidInputError(
                f"Input '{spec.name}' must be {spec.dtype}, got {array.dtype}. Convert it with .astype('{spec.dtype}')."
            )
        if array.ndim != len(spec.shape):
            raise InvalidInputError(
                f"Input '{spec.name}' must have {len(spec.shape)} dimensions [{', '.join(map(str, spec.shape))}], "
                f"got shape {tuple(array.shape)}."
            )

    def _check_size(self, spec: TensorSpec, axis: int, size: str | int, got: int, sizes: dict[str, int]) -> None:
        if isinstance(size, int):
            if got != size:
                raise InvalidInputError(f"Input '{spec.name}' axis {axis} must be {size}, got {got}.")
            return
        dim = self.dim(size)
        if not dim.min <= got <= dim.max:
            raise InvalidInputError(
                f"Input '{spec.name}', dimension '{size}' (axis {axis}) is {got}, "
                f"outside its range {dim.min}..{dim.max}."
            )
        if sizes.setdefault(size, got) != got:
            raise InvalidInputError(
                f"Dimension '{size}' is {sizes[size]} in one input and {got} in '{spec.name}': they must be equal."
            )
