"""What a user may say about how Triton serves a model; everything else follows from the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.runtime.options import parse_value

#: Triton's numbers for the levels of ONNX Runtime, by the names that ONNX Runtime gives them.
#: https://github.com/triton-inference-server/onnxruntime_backend#model-config-options
GRAPH_LEVELS = {"basic": -1, "extended": 1, "disabled": 2}
_ACTIONS = ("reject", "delay")


@dataclass(frozen=True)
class TritonOptions:
    """How a model is served: keys of a YAML file or of ``-C``. Zero and empty mean the default, or the model's own.

    Attributes:
        instances: Copies of the graph on each device; one by default, and where the server's processors are known
            (:func:`mlflow_tdeploy.deploy.choose.served`) two on a CPU of several.
        front_instances: Processes that tokenize and post-process; of two, one can while the other waits for the graph.
        gpus: Which GPUs, by number.
        batching: Join requests where the model allows it.
        max_batch_size: Most rows in one run of the graph; the signature's largest batch otherwise.
        front_batch_size: Most rows of requests that are answered together; 1024 by default, or the signature's largest
            batch where that is more.
        preferred_batch_sizes: Batch sizes that are run at once when they are reached.
        max_queue_delay_microseconds: How long a request waits for others to join it; a lone client waits in full.
        max_queue_size: Requests that may wait before more are refused.
        queue_timeout_microseconds: How long a request may wait.
        queue_timeout_action: ``reject`` or ``delay`` what has waited longer.
        priority_levels: How many priorities there are.
        default_priority_level: That of a request which names none.
        response_cache: Answer repeated requests from the server's cache (which has to be on there).
        warmup: Run golden requests before the graph is ready.
        intra_op_threads: Threads inside an operator of ONNX Runtime; by default on a CPU as many as all copies together
            have processors, where the server's are known, else 1.
        inter_op_threads: Operators at once in ONNX Runtime.
        graph_level: ``basic``, ``extended``, ``all`` or ``disabled``: what ONNX Runtime may still change.
        cuda_graphs: Let TensorRT record CUDA graphs.
        profiles: TensorRT's optimization profiles to use, by number.
        token_budget: Most padded tokens in a batch that the front makes; the variant's own otherwise.
        parameters: Other parameters of the backend, by Triton's names.
    """

    instances: int = 0
    front_instances: int = 2
    gpus: tuple[int, ...] = ()
    batching: bool = True
    max_batch_size: int = 0
    front_batch_size: int = 0
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    max_queue_size: int = 0
    queue_timeout_microseconds: int = 0
    queue_timeout_action: str = "reject"
    priority_levels: int = 0
    default_priority_level: int = 0
    response_cache: bool = False
    warmup: bool = True
    intra_op_threads: int = 0
    inter_op_threads: int = 0
    graph_level: str = ""
    cuda_graphs: bool = False
    profiles: tuple[int, ...] = ()
    token_budget: int = 0
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            numbers = value if isinstance(value, tuple) else (value,) if type(value) is int else ()
            least = 1 if one.name in ("front_instances", "preferred_batch_sizes") else 0
            if any(number < least for number in numbers):
                raise InvalidInputError(f"The Triton option '{one.name}' must be at least {least}, got {shown(value)}.")
        for name, known in (("graph_level", ("", "all", *GRAPH_LEVELS)), ("queue_timeout_action", _ACTIONS)):
            if getattr(self, name) not in known:
                allowed = ", ".join(filter(None, known))
                raise InvalidInputError(
                    f"The Triton option '{name}' must be one of {allowed}, got {shown(getattr(self, name))}."
                )
        if self.default_priority_level and not 1 <= self.default_priority_level <= self.priority_levels:
            raise InvalidInputError(
                f"default_priority_level must be from 1 to priority_levels ({self.priority_levels}), got "
                f"{self.default_priority_level}."
            )
        if self.priority_levels and not self.default_priority_level:
            raise InvalidInputError("priority_levels needs default_priority_level: that of a request which names none.")

    @classmethod
    def knows(cls, key: str) -> bool:
        """Tell whether :meth:`of` takes a key."""
        return key.startswith("parameters.") or key in {one.name for one in dataclasses.fields(cls)}

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> TritonOptions:
        """Make options from a mapping; values may be text, as on a command line, and lists ``"1,2"``.

        Raises:
            InvalidInputError: An unknown key, or a value of a wrong type.
        """
        known = {one.name: getattr(cls(), one.name) for one in dataclasses.fields(cls)}  # with their defaults
        found: dict[str, Any] = {}
        for key, value in (values or {}).items():
            name, _, below = str(key).partition(".")
            if name == "parameters" and below:
                found["parameters"] = {**found.get("parameters", {}), below: str(value)}
            elif key not in known:
                raise InvalidInputError(
                    f"Unknown Triton option {shown(key)}. Known: {', '.join(known)}, parameters.NAME."
                )
            elif key == "parameters":
                found[key] = {**found.get(key, {}), **_mapping(value)}
            else:
                default = known[key]
                found[key] = (
                    _numbers(key, value) if isinstance(default, tuple) else parse_value(key, value, type(default))
                )
        return cls(**found)


def _numbers(key: str, value: Any) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return tuple(parse_value(key, part.strip() if isinstance(part, str) else part, int) for part in parts if part != "")


def _mapping(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"The Triton option 'parameters' is a mapping from name to value, got {shown(value)}.")
    return {str(name): str(one) for name, one in value.items()}
