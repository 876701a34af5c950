"""From a signature to Triton's ``ModelConfig`` message, and to the text that a repository holds.

https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, MissingDependencyError
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Signature, TensorSpec
from mlflow_tdeploy.core.variant import LAYOUT_OPTIMIZERS, Variant
from mlflow_tdeploy.core.wire import STRING, Part, answer_parts, request_parts
from mlflow_tdeploy.runtime.base import TritonBackend
from mlflow_tdeploy.triton.options import GRAPH_LEVELS, TritonOptions

#: Begins the names of our own parameters in a configuration.
OWN = "tdeploy."
_TYPES = {
    "bool": "TYPE_BOOL", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8", "int16": "TYPE_INT16", "uint16": "TYPE_UINT16",
    "int32": "TYPE_INT32", "uint32": "TYPE_UINT32", "int64": "TYPE_INT64", "uint64": "TYPE_UINT64",
    "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    STRING: "TYPE_STRING",
}  # fmt: skip
#: Rows that the stable name takes at least: texts are many where nothing else limits them.
_FRONT_ROWS = 1024
#: The other way round: numpy's name of each type.
DTYPE_OF = {theirs: ours for ours, theirs in _TYPES.items()}


def messages() -> Any:
    """Return the module of Triton's configuration messages.

    Raises:
        MissingDependencyError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingDependencyError(
            "tritonclient", "Triton's configuration", "pip install 'mlflow-tdeploy[triton]'"
        ) from error
    return model_config_pb2


def rows_dim(signature: Signature, options: TritonOptions, *, joins: bool = True) -> str | None:
    """Return the dimension along which Triton joins requests of a graph, or None.

    Args:
        signature: Of the graph.
        options: What the user says.
        joins: Whether its rows are independent.
    """
    return signature.batch_dim if joins and options.batching else None


@dataclass(frozen=True)
class Warmup:
    """A request to run before a graph is ready.

    Attributes:
        name: Its name.
        rows: Rows of it; 0 for a graph that is not batched.
        inputs: For each input its dtype, its shape without the rows, and the file of raw values.
    """

    name: str
    rows: int
    inputs: Mapping[str, tuple[str, tuple[int, ...], str]]


def graph_config(
    name: str,
    version: int,
    signature: Signature,
    variant: Variant,
    backend: TritonBackend,
    options: TritonOptions,
    *,
    joins: bool = True,
    gpu: bool = False,
    cores: int = 0,
    warmup: Sequence[Warmup] = (),
    about: Mapping[str, str] | None = None,
) -> Any:
    """Return the configuration of one version's graph.

    Args:
        name: Name of the model.
        version: Its only version.
        signature: Tensors of the model; those of the graph where its dtypes differ.
        variant: What is served.
        backend: What opens it.
        options: What the user says.
        joins: Whether its rows are independent, so that Triton may join requests.
        gpu: Whether it runs on one.
        cores: Processors of the server; 0 where they are not known.
        warmup: Requests to run first.
        about: Parameters of ours, by name: what this is and where it is from.

    Raises:
        InvalidInputError: An option does not fit the model.
        MissingDependencyError: tritonclient is not installed.
    """
    pb = messages()
    rows = rows_dim(signature, options, joins=joins)
    config = pb.ModelConfig(name=name, backend=backend.name, default_model_filename=variant.entry.rpartition("/")[2])
    config.version_policy.specific.versions.append(version)
    config.max_batch_size = most_rows(signature, rows, options)
    config.input.extend(_tensor(pb.ModelInput, signature, spec, variant, rows) for spec in signature.inputs)
    config.output.extend(_tensor(pb.ModelOutput, signature, spec, variant, rows) for spec in signature.outputs)
    _instances(pb, config, gpu, options)
    if rows:
        _batching(pb, config, options)
    _optimization(config, variant, backend, options, gpu)
    for name_, value in sorted(_parameters(backend, options, gpu, cores).items()):
        config.parameters[name_].string_value = value
    for name_, value in sorted((about or {}).items()):
        config.parameters[f"{OWN}{name_}"].string_value = value
    if options.response_cache:
        config.response_cache.enable = True
    for sample in warmup if options.warmup else ():
        _warmup(config.model_warmup.add(), sample)
    return config


def front_config(
    name: str, task: Task, versions: Sequence[int], options: TritonOptions, about: Mapping[str, str] | None = None
) -> Any:
    """Return the configuration of the stable name in front of all versions.

    Args:
        name: Name of the model.
        task: Its task, as the newest of the versions says.
        versions: Those that are loaded; requests without a version go to the newest of them.
        options: What the user says.
        about: Parameters of ours, by name.

    Raises:
        InvalidInputError: A tensor's type is none that Triton's Python backend has.
        MissingDependencyError: tritonclient is not installed.
    """
    pb = messages()
    rows, asks = task.batch_dim, request_parts(task)
    joins = front_rows(task, options) > 0  # texts are joined by the front itself, whatever batches its graph takes
    raw = task.signature if rows or not asks else None  # rows of a number that is fixed are no requests of anybody
    config = pb.ModelConfig(name=name, backend="python")
    config.version_policy.specific.versions.extend(sorted(versions))
    config.max_batch_size = front_rows(task, options)
    for part in (*asks, *(_raw_parts(raw, raw.inputs, rows) if raw else ())):
        _add(config.input, part, optional=bool(asks), allow_ragged_batch=joins)
    for part in _once((*answer_parts(task), *(_raw_parts(raw, raw.outputs, rows) if raw else ()))):
        _add(config.output, part)
    config.instance_group.add(count=options.front_instances, kind=pb.ModelInstanceGroup.KIND_CPU)
    if joins:
        _batching(pb, config, TritonOptions())
    for name_, value in sorted((about or {}).items()):
        config.parameters[f"{OWN}{name_}"].string_value = value
    return config


def front_rows(task: Task, options: TritonOptions) -> int:
    """Return how many rows a request to the stable name has at most; 0 where its requests have no rows."""
    rows = task.batch_dim
    if not rows and not request_parts(task):
        return 0
    return options.front_batch_size or max(_FRONT_ROWS, task.signature.dim(rows).max if rows else 0)


def to_text(config: Any) -> str:
    """Return a configuration as the text of a ``config.pbtxt``."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    # the text form leaves out what is zero, and Triton takes a missing one for "find out yourself"
    return text if config.max_batch_size else f"max_batch_size: 0\n{text}"


def parse(text: str) -> Any:
    """Return the configuration in the text of a ``config.pbtxt``.

    Raises:
        InvalidInputError: It is none.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, messages().ModelConfig())
    except text_format.ParseError as error:
        raise InvalidInputError(f"This is no configuration of Triton: {error}.") from error


def own_parameters(config: Any) -> dict[str, str]:
    """Return the parameters of ours in a configuration, by name without :data:`OWN`."""
    return ours({name: value.string_value for name, value in config.parameters.items()})


def ours(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return those of some parameters that are ours, by name without :data:`OWN`."""
    return {name.removeprefix(OWN): value for name, value in parameters.items() if name.startswith(OWN)}


def _add(tensors: Any, part: Part, **more: Any) -> None:
    """Add a tensor; one of a number a row is sent as a column, which the model does not see."""
    tensors.add(name=part.name, data_type=_triton_type(part), dims=part.shape or (1,), **more)
    if not part.shape and part.dtype != STRING:
        tensors[-1].reshape.SetInParent()


def most_rows(signature: Signature, rows: str | None, options: TritonOptions) -> int:
    """Return how many rows a run of the graph has at most; 0 where Triton joins no requests.

    Raises:
        InvalidInputError: ``max_batch_size`` is beyond the signature, or means nothing.
    """
    if rows is None:
        if options.max_batch_size and options.batching:
            raise InvalidInputError(
                "max_batch_size needs requests that can be joined: every tensor begins with one dimension that may be "
                "1, no row's answer depends on the others (as with dynamic int8, whose ranges are of all rows), and "
                "batching is not switched off. Leave it out."
            )
        return 0
    most = signature.dim(rows).max
    if options.max_batch_size > most:
        raise InvalidInputError(
            f"max_batch_size {options.max_batch_size} is beyond the signature: {signature.dim(rows)}."
        )
    return options.max_batch_size or most


def _tensor(kind: Any, signature: Signature, spec: TensorSpec, variant: Variant, rows: str | None) -> Any:
    dims = _dims(signature, spec, rows)
    tensor = kind(name=spec.name, data_type=_TYPES[variant.dtypes.get(spec.name, spec.dtype)], dims=dims or (1,))
    if not dims and rows is None:
        raise InvalidInputError(
            f"'{spec.name}' is a single number of a whole request, and Triton has no tensors without an axis where "
            f"requests are not joined. Give it one in the model, such as y.reshape(1)."
        )
    if not dims:  # it is sent with one that the graph does not see
        tensor.reshape.SetInParent()
    return tensor


def _dims(signature: Signature, spec: TensorSpec, rows: str | None) -> tuple[int, ...]:
    sizes = spec.shape[1:] if rows else spec.shape
    return tuple(size if isinstance(size, int) else _size(signature, size) for size in sizes)


def _size(signature: Signature, name: str) -> int:
    """Return a named dimension's size, or -1 where it varies; an output's own may have no range."""
    dim = signature.dim(name) if signature.has_dim(name) else None
    return dim.max if dim is not None and dim.min == dim.max else -1


def _instances(pb: Any, config: Any, gpu: bool, options: TritonOptions) -> None:
    kind = pb.ModelInstanceGroup.KIND_GPU if gpu else pb.ModelInstanceGroup.KIND_CPU
    group = config.instance_group.add(count=max(1, options.instances), kind=kind)
    if options.gpus:
        if not gpu:
            raise InvalidInputError("gpus means nothing for a variant that runs on the CPU. Leave it out.")
        group.gpus.extend(options.gpus)
    group.profile.extend(map(str, options.profiles))


def _batching(pb: Any, config: Any, options: TritonOptions) -> None:
    batching = config.dynamic_batching
    batching.SetInParent()
    if beyond := [size for size in options.preferred_batch_sizes if size > config.max_batch_size]:
        raise InvalidInputError(
            f"preferred_batch_sizes has {beyond[0]}, beyond the {config.max_batch_size} rows of a run of the graph."
        )
    batching.preferred_batch_size.extend(options.preferred_batch_sizes)
    batching.max_queue_delay_microseconds = options.max_queue_delay_microseconds
    batching.priority_levels = options.priority_levels
    batching.default_priority_level = options.default_priority_level
    if options.max_queue_size or options.queue_timeout_microseconds:
        policy = batching.default_queue_policy
        policy.max_queue_size = options.max_queue_size
        policy.default_timeout_microseconds = options.queue_timeout_microseconds
        policy.timeout_action = getattr(pb.ModelQueuePolicy, options.queue_timeout_action.upper())


def _optimization(config: Any, variant: Variant, backend: TritonBackend, options: TritonOptions, gpu: bool) -> None:
    level = options.graph_level
    if not level and (disabled := set(variant.session.get("disabled_optimizers", ()))):
        # Triton cannot switch one off: the graph is fused already, and what is left beyond that level is not needed
        level = "basic" if disabled - set(LAYOUT_OPTIMIZERS) else "" if gpu else "extended"
    if level in GRAPH_LEVELS and backend.name == "onnxruntime":
        config.optimization.graph.level = GRAPH_LEVELS[level]
    if options.cuda_graphs:
        if backend.name != "tensorrt":
            raise InvalidInputError("cuda_graphs is for TensorRT engines. Leave it out for this variant.")
        config.optimization.cuda.graphs = True
    if options.profiles and backend.name != "tensorrt":
        raise InvalidInputError("profiles is for TensorRT engines. Leave it out for this variant.")


def _parameters(backend: TritonBackend, options: TritonOptions, gpu: bool, cores: int) -> dict[str, str]:
    if backend.name != "onnxruntime":
        return dict(options.parameters)
    shared = max(1, -(-cores // max(1, options.instances)))  # so that all copies together use all processors
    threads = options.intra_op_threads or (0 if gpu else shared)
    own = {"intra_op_thread_count": threads, "inter_op_thread_count": options.inter_op_threads}
    return {**{name: str(value) for name, value in own.items() if value}, **options.parameters}


def _warmup(message: Any, sample: Warmup) -> None:
    message.name = sample.name
    message.batch_size = sample.rows
    for name, (dtype, shape, file) in sample.inputs.items():
        message.inputs[name].data_type = _TYPES[dtype]
        message.inputs[name].dims.extend(shape or (1,))
        message.inputs[name].input_data_file = file


def _raw_parts(signature: Signature, specs: Sequence[TensorSpec], rows: str | None) -> tuple[Part, ...]:
    return tuple(Part(spec.name, spec.dtype, _dims(signature, spec, rows)) for spec in specs)


def _once(parts: Sequence[Part]) -> list[Part]:
    """Return each part once; an answer may be one of the graph's own outputs, of the same form.

    Raises:
        InvalidInputError: Two of one name differ.
    """
    found: dict[str, Part] = {}
    for part in parts:
        if found.setdefault(part.name, part) != part:
            raise InvalidInputError(f"The graph's output '{part.name}' has the name of an answer of another form.")
    return list(found.values())


def _triton_type(part: Part) -> str:
    if part.dtype == "bfloat16":
        raise InvalidInputError(
            f"'{part.name}' is bfloat16, which Triton's Python backend does not have. Log the model with float32 "
            f"inputs and outputs; its weights may stay bfloat16."
        )
    return _TYPES[part.dtype]
