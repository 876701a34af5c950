"""Any ``torch.nn.Module`` with example inputs: task ``tensors``."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from mlflow_tdeploy.core.errors import InvalidInputError, first_line
from mlflow_tdeploy.core.manifest import SourceRecord
from mlflow_tdeploy.core.tensors import DTYPES, Array, Arrays, Dim, Signature, TensorSpec, dim_step
from mlflow_tdeploy.runtime.backends._torch_modules import run_module, serving_copy, set_attention
from mlflow_tdeploy.source._options import Options
from mlflow_tdeploy.source._own_state import StateKept, with_own
from mlflow_tdeploy.source._positions import integer_positions, missing_values, resized
from mlflow_tdeploy.source._shaken import Shaken
from mlflow_tdeploy.source._shapes import BATCH, Shapes, check_shapes, identifier, make_dims
from mlflow_tdeploy.source._tables import integer_ranges
from mlflow_tdeploy.source._transformer_layers import one_path
from mlflow_tdeploy.source.base import Source

TASK = "tensors"


class TorchModuleSource(Source):
    """A module whose signature was found by running it on its example at several sizes."""

    def __init__(self, record: SourceRecord, signature: Signature, module: torch.nn.Module, example: Arrays) -> None:
        self.record = record
        self.task = TASK
        self.examples = (example,)
        self.signature = signature
        self._module = module
        ranges = integer_ranges(module, example, [spec.name for spec in signature.outputs])
        self.task_config = {"integer_ranges": ranges} if ranges else {}
        self.task_config |= integer_positions(signature, example, self.reference, ranges)
        self.task_config |= missing_values(example)

    def reference(self, feeds: Arrays) -> Arrays:
        """Run the module on the CPU; half-precision weights in fp32."""
        with one_path():
            return run_module(self._module, feeds, [spec.name for spec in self.signature.outputs])

    def shaken(self, feeds: Arrays, seed: int) -> Arrays:
        """Run the module with every operator's result off by as much as rounding might be."""
        with _eagerly(), StateKept(self._module), Shaken(seed):
            return self.reference(feeds)

    @property
    def module(self) -> torch.nn.Module:
        """The wrapper that returns a tuple."""
        return self._module

    def module_for(self, attn_implementation: str) -> torch.nn.Module:
        """Return the wrapper with another attention implementation of the transformers models inside, if any."""
        module, _ = serving_copy(self._module)
        set_attention(module, attn_implementation)
        return module


class TensorsModule(torch.nn.Module):
    """A module that is called by keywords and returns a tuple of tensors.

    Args:
        module: The user's module.
        half: Whether it was in half precision: floats that come in are then made fp32, as its weights are now.
    """

    def __init__(self, module: torch.nn.Module, *, half: bool = False) -> None:
        super().__init__()
        self.inner = module
        self._half = half

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs in their order."""
        return tuple(self.outputs(**inputs).values())

    def outputs(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs by name."""
        if self._half:
            inputs = {n: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for n, t in inputs.items()}
        return named_outputs(self.inner(**inputs))


def from_module(module: torch.nn.Module, options: Options) -> Source:
    """Read a module and its example inputs.

    Raises:
        InvalidInputError: The example is missing, or the module does not run on it at every size allowed.
    """
    what = type(module).__name__
    options.pick_task(TASK, (TASK,), f"The torch module {what}")
    options.refuse("a torch module", "tokenizer", "labels", "image_processor")
    example = check_example(named_example(module, options.example), what)
    axes = name_axes(example, options.shapes)
    inputs = tuple(TensorSpec(name, str(array.dtype), axes.specs[name]) for name, array in example.items())
    served, note = serving_copy(module)
    wrapper = TensorsModule(served, half=bool(note)).eval()
    set_attention(wrapper, "sdpa")
    kept = _kept_state(wrapper, example)
    wrapper = with_own(wrapper, kept.written) if kept.written else wrapper
    outputs = _probe_outputs(wrapper, example, inputs, axes.dims)
    if clash := {spec.name for spec in outputs} & set(example):
        raise InvalidInputError(f"'{min(clash)}' is both an input and an output of {what}: a graph needs two names.")
    source = TorchModuleSource(
        SourceRecord("torch", what, None, what), Signature(axes.dims, inputs, outputs), wrapper, example
    )
    source.notes = (note,) if note else ()
    source.unnoticed_writes = kept.unnoticed
    return source


def _kept_state(wrapper: TensorsModule, example: Arrays) -> StateKept:
    """Run a module on its example for what it writes to of its own; where it fails, the next run tells why."""
    kept = StateKept(wrapper)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in example.items()}
    with contextlib.suppress(Exception), torch.no_grad(), one_path(), _eagerly(), kept:
        wrapper.outputs(**tensors)
    return kept


def _eagerly() -> Any:
    """Have nothing compiled in a block that dispatches itself.

    What ``torch.cond`` compiles there fails in all later calls of the process (torch 2.13).
    """
    return torch.compiler.set_stance("force_eager")


@dataclasses.dataclass(frozen=True)
class Axes:
    """Named dimensions, and per input the name or size of each axis."""

    dims: tuple[Dim, ...]
    specs: Mapping[str, tuple[str | int, ...]]


def name_axes(example: Mapping[str, Array], shapes: Shapes | None) -> Axes:
    """Name the axes that vary; :func:`mlflow_tdeploy.source.resolve.resolve` describes the convention.

    Raises:
        InvalidInputError: ``shapes`` names an unknown input, axis or dimension, or an example is out of its range.
    """
    given = dict(check_shapes(shapes))
    batch = next((array.shape[0] for array in example.values() if array.ndim), None)
    names: dict[tuple[str, int], str | int] = {(n, 0): "batch" for n, array in example.items() if array.ndim}
    ranges: dict[str, object] = {}
    for key in [key for key in given if "." in str(key)]:
        place = _place(key, example)
        value = given.pop(key)
        if isinstance(value, int) and not isinstance(value, bool):
            names[place] = value
        else:
            names[place] = value if isinstance(value, str) else identifier(f"{place[0]}_{place[1]}")
            if not isinstance(value, str):
                ranges[str(names[place])] = value
    used = list(dict.fromkeys(name for name in names.values() if isinstance(name, str)))
    if missing := [name for name in used if name != "batch" and name not in ranges and name not in given]:
        raise InvalidInputError(
            f"shapes names an axis '{missing[0]}' and gives it no range. Add '{missing[0]}': (min, opt, max)."
        )
    defaults = [_default(name, batch or 1, ranges) for name in used]
    dims = make_dims(defaults, given)
    specs = {
        name: tuple(names.get((name, axis), size) for axis, size in enumerate(array.shape))
        for name, array in example.items()
    }
    _check_sizes(example, specs, dims)
    return Axes(dims, specs)


def named_example(module: torch.nn.Module, example: Any) -> Any:
    """Return positional examples, as ``torch.onnx.export`` takes them, under the names of forward's parameters."""
    if isinstance(example, (torch.Tensor, np.ndarray)):
        example = (example,)
    if not isinstance(example, (tuple, list)):
        return example
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [one.name for one in inspect.signature(module.forward).parameters.values() if one.kind in kinds]
    if len(example) > len(names):
        raise InvalidInputError(
            f"{len(example)} example inputs for a forward with {len(names)} named parameters. Pass a mapping from "
            f"parameter to array."
        )
    return dict(zip(names, example, strict=False))


def check_example(example: Any, what: str) -> Arrays:
    """Return the example inputs as arrays.

    Raises:
        InvalidInputError: There are none, or one is no array of a supported dtype.
    """
    if not isinstance(example, Mapping) or not example:
        raise InvalidInputError(
            f"{what} needs example inputs: example={{'x': np.zeros((2, 16), np.float32)}}, named as the parameters of "
            f"its forward, got {type(example).__name__}. (MLflow's input_example is only stored with the model.)"
        )
    arrays: Arrays = {}
    for name, value in example.items():
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        if not isinstance(array, np.ndarray) or array.dtype.name not in DTYPES or array.dtype.name == "bfloat16":
            kind = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(value).__name__
            raise InvalidInputError(f"The example input '{name}' must be an array of numbers, got {kind}.")
        if array.size == 0:
            raise InvalidInputError(f"The example input '{name}' is empty (shape {array.shape}).")
        arrays[str(name)] = array
    return arrays


def named_outputs(result: Any) -> dict[str, torch.Tensor]:
    """Return what a module returned, by name: a mapping's keys, ``output_0`` … otherwise.

    Raises:
        InvalidInputError: Something in it is no tensor.
    """
    if isinstance(result, torch.Tensor):
        found: Iterable[tuple[str, Any]] = [("output_0", result)]
    elif isinstance(result, Mapping):
        found = [(str(name), value) for name, value in result.items() if value is not None]
    elif isinstance(result, (tuple, list)):
        found = [(f"output_{index}", value) for index, value in enumerate(result)]
    else:
        found = [("output_0", result)]
    outputs = dict(found)
    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidInputError(
                f"The module returns {type(value).__name__} as '{name}': a graph returns tensors. {_instead(name)}"
            )
    return outputs


def _instead(name: str) -> str:
    if name == "past_key_values":
        return (
            "Set its config.use_cache = False, and that of its decoder where it has one (model.decoder.config), or "
            "wrap it in a module that returns the other tensors."
        )
    return "Wrap the module in one that returns a tensor, a tuple or a dict of tensors."


def _place(key: object, example: Mapping[str, Array]) -> tuple[str, int]:
    name, _, axis = str(key).rpartition(".")
    if name in example and axis.isdigit() and int(axis) < example[name].ndim:
        return name, int(axis)
    known = ", ".join(f"{name}.0..{array.ndim - 1}" for name, array in example.items() if array.ndim)
    raise InvalidInputError(f"shapes names the axis {key!r}, which no example input has. There are: {known}.")


def _default(name: str, batch: int, ranges: Mapping[str, object]) -> Dim:
    if name in ranges:
        return Dim.of(name, ranges[name])
    smallest, opt, largest = BATCH
    return Dim(name, smallest, max(opt, 1), max(largest, batch))


def _check_sizes(example: Mapping[str, Array], specs: Mapping[str, tuple[str | int, ...]], dims: Iterable[Dim]) -> None:
    ranges = {dim.name: dim for dim in dims}
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in example.items():
        for axis, (size, got) in enumerate(zip(specs[name], array.shape, strict=True)):
            if isinstance(size, int):
                if size != got:
                    raise InvalidInputError(f"shapes fixes '{name}.{axis}' to {size}, its example has {got}.")
                continue
            dim = ranges[size]
            if not dim.min <= got <= dim.max:
                raise InvalidInputError(
                    f"The example '{name}' has {got} in dimension '{size}' (axis {axis}), outside its range "
                    f"{dim.min}..{dim.max}. Widen the range, or give another example."
                )
            first, where = sizes.setdefault(size, (got, name))
            if first != got:
                raise InvalidInputError(
                    f"Dimension '{size}' is {first} in the example '{where}' and {got} in '{name}'. If axis {axis} of "
                    f"'{name}' is another dimension, say so: shapes={{'{name}.{axis}': {got}}} fixes it."
                )


def _probe_outputs(
    wrapper: TensorsModule, example: Arrays, inputs: tuple[TensorSpec, ...], dims: tuple[Dim, ...]
) -> tuple[TensorSpec, ...]:
    """Run the module at the example's sizes and with each dimension changed: what changes with it has its name."""
    first = _run(wrapper, example)
    shapes: dict[str, list[str | int]] = {name: list(array.shape) for name, array in first.items()}
    for dim in dims:
        size = next(
            example[spec.name].shape[axis]
            for spec in inputs
            for axis, name in enumerate(spec.shape)
            if name == dim.name
        )
        if dim.min == dim.max:
            continue  # one size only
        other, changed = _at_another_size(wrapper, example, inputs, dim, size)
        for name, array in first.items():
            _name_changed(shapes[name], name, array.shape, changed[name].shape, dim.name, (size, other))
    return tuple(TensorSpec(name, str(array.dtype), tuple(shapes[name])) for name, array in first.items())


def _at_another_size(
    wrapper: TensorsModule, example: Arrays, inputs: tuple[TensorSpec, ...], dim: Dim, size: int
) -> tuple[int, Arrays]:
    """Run the module with a dimension of the next size, or of the next multiple of what its bounds are multiples of."""
    steps = [step * (1 if size + step <= dim.max else -1) for step in sorted({1, dim_step(dim)})]
    for step in steps:
        other = size + step
        try:
            return other, _run(wrapper, resized(example, inputs, dim.name, other), f"{dim.name}={other}")
        except InvalidInputError:
            if step == steps[-1]:
                raise
    raise AssertionError("there is a step")


def _name_changed(
    shape: list[str | int],
    output: str,
    before: tuple[int, ...],
    after: tuple[int, ...],
    dim: str,
    sizes: tuple[int, int],
) -> None:
    if len(before) != len(after):
        raise InvalidInputError(f"The output '{output}' has {len(before)} or {len(after)} axes, depending on {dim}.")
    for axis, pair in enumerate(zip(before, after, strict=True)):
        if pair[0] != pair[1]:
            same = pair == sizes and isinstance(shape[axis], int)
            shape[axis] = dim if same else identifier(f"{output}_{axis}")


def _run(wrapper: TensorsModule, feeds: Arrays, size: str = "") -> Arrays:
    """Return the answers to the example, or to one of another size."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    try:
        with torch.inference_mode(), one_path():
            outputs = wrapper.outputs(**tensors)
        if other := [name for name, tensor in outputs.items() if tensor.dtype == torch.bfloat16]:
            raise InvalidInputError(
                f"{type(wrapper.inner).__name__} returns '{other[0]}' in bfloat16, which no caller can read: wrap it "
                f"in a module that returns {other[0]}.float()."
            )
        return {name: tensor.numpy() for name, tensor in outputs.items()}
    except InvalidInputError:
        raise
    except Exception as error:  # whatever a user's code meets
        when = f"with {size}" if size else "on its example inputs"
        raise InvalidInputError(
            f"{type(wrapper.inner).__name__} fails {when}: {type(error).__name__}: {first_line(error).rstrip('.')}. It "
            f"is called with keywords ({', '.join(f'{name}: {array.dtype}' for name, array in feeds.items())}). "
            f"{_OF_SIZES if size else _parameters_of(wrapper.inner)}"
        ) from error


_OF_SIZES = (
    "Use shapes={'<input>.<axis>': size} to fix a size that must not vary, a name instead of a size for one that does, "
    "bounds that are multiples of what it needs."
)


def _parameters_of(module: torch.nn.Module) -> str:
    """Say what a module's forward takes."""
    try:
        names = ", ".join(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # of a compiled one, say
        return "Pass example={name: array} with the names and dtypes that its forward takes."
    return f"Its forward takes ({names}): pass example={{name: array}} with these names and the dtypes it is used with."
