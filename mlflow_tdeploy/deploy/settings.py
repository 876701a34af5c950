"""What a user may say about a deployment: keys of ``-C``, of ``config=`` and of a YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError, NotFoundError, shown
from mlflow_tdeploy.core.hardware import Fingerprint, Gpu
from mlflow_tdeploy.flavor.config import policy_of
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.options import parse_value
from mlflow_tdeploy.runtime.policy import Policy
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.triton.options import TritonOptions

#: Key under which a file with more of them can be named.
FILE = "config_file"
#: Key of ranges, by dimension.
SHAPES = "shapes"
#: What is said for one call, and not for those that come after it.
_OF_ONE_CALL = ("version", "strict")
_DEVICES = ("", "cpu", "cuda")


@dataclass(frozen=True)
class DeploySettings:
    """What is said about a deployment, besides how Triton serves it.

    Attributes:
        version: The number to deploy under, instead of the registered version's.
        keep: Versions that stay for going back to.
        keep_loaded: Whether they stay loaded; else their files do, and going back loads them.
        grace: Seconds that a version which is not kept stays after the switch.
        device: What the server has: ``cpu`` or ``cuda``; what it says itself otherwise.
        compute_capability: Of the server's GPU, for example ``9.0``.
        tensorrt: Version of TensorRT in the server, for engines.
        cores: Processors of the server.
        variant: Only this variant.
        runtime: Only what stands for this runtime.
        strict: Fail rather than serve another variant than the first choice.
        budget: What a variant's evidence has to keep here, besides the model's own budget: ``worst_cosine >= 0.999``.
        shapes: Ranges of the dimensions of a plain ONNX graph, which says none.
        now: Keys that are said in this call; the others are remembered, and count where they mean something.
        options: How Triton serves the model.
    """

    version: int = 0
    keep: int = 1
    keep_loaded: bool = True
    grace: float = 1.0
    device: str = ""
    compute_capability: str = ""
    tensorrt: str = ""
    cores: int = 0
    variant: str = ""
    runtime: str = ""
    strict: bool = False
    budget: str = ""
    shapes: Mapping[str, Any] = field(default_factory=dict)
    now: frozenset[str] = frozenset()
    options: TritonOptions = field(default_factory=TritonOptions)

    def __post_init__(self) -> None:
        for name in ("version", "keep", "cores"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"'{name}' must not be negative, got {getattr(self, name)}.")
        if self.budget:
            Budget.of(self.budget)
        if not 0 <= self.grace <= 3600:
            raise InvalidInputError(f"'grace' is from 0 to 3600 seconds, got {self.grace}.")
        if self.device not in _DEVICES:
            raise InvalidInputError(f"'device' must be cpu or cuda, got {shown(self.device)}.")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, remembered: Mapping[str, Any] | None = None) -> DeploySettings:
        """Read settings; those in a file come after those that are said directly, those that are remembered last.

        Raises:
            InvalidInputError: An unknown key or a value of a wrong type.
            NotFoundError: There is no such file.
        """
        current = said(config)
        values = {key: value for key, value in {**(remembered or {}), **current}.items() if value != ""}
        if isinstance(values.get("budget"), Mapping):
            values["budget"] = str(Budget.of(values["budget"]))
        own = {one.name: one for one in dataclasses.fields(cls) if one.name not in ("options", "now", SHAPES)}
        found: dict[str, Any] = {SHAPES: _shapes(values.pop(SHAPES, None))}
        for name in [key for key in values if key in own]:
            value, kind = values.pop(name), type(own[name].default)
            found[name] = as_seconds(name, value) if kind is float else parse_value(name, _text(value, kind), kind)
        if unknown := [key for key in values if not TritonOptions.knows(key)]:
            known = ", ".join(
                [*own, SHAPES, FILE, *(one.name for one in dataclasses.fields(TritonOptions)), "parameters.NAME"]
            )
            raise InvalidInputError(f"Unknown key {shown(unknown[0])}. Known: {known}.")
        return cls(**found, now=frozenset(current), options=TritonOptions.of(values))

    def options_said(self) -> bool:
        """Tell whether this call says how Triton serves the model."""
        return any(TritonOptions.knows(key) for key in self.now)

    def host(self, reported: Fingerprint | None = None) -> Fingerprint:
        """Return what a server's host is: as it was said, the rest as reported, or as this host is.

        Args:
            reported: What the server says.
        """
        found = reported or probe.host()
        software = {**found.software, **({"tensorrt": self.tensorrt} if self.tensorrt else {})}
        gpu = {"": found.gpu, "cpu": None, "cuda": Gpu("declared", self.compute_capability or "0.0")}[self.device]
        return dataclasses.replace(found, gpu=gpu, software=software, cores=self.cores or found.cores)

    def policy(self, bundle: Bundle) -> Policy:
        """Return what is insisted on for a model: here, in the environment, or saved with it."""
        said = {"variant": self.variant or None, "runtime": self.runtime or None, "strict": self.strict or None}
        return policy_of(bundle, said)


def said(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what somebody says, with what is in a file that is named there.

    Raises:
        InvalidInputError: The file cannot be read.
        NotFoundError: There is no such file.
    """
    given = dict(config or {})
    file = given.pop(FILE, None)
    return {**(_read(file) if file else {}), **given}


def as_record(config: Mapping[str, Any]) -> str:
    """Return what was said about a deployment, but for what is of one call only, as JSON."""
    lasting = {key: value for key, value in sorted(config.items()) if key not in _OF_ONE_CALL and value != ""}
    return json.dumps(lasting, default=str)


def _shapes(value: Any) -> dict[str, Any]:
    """Return ranges by dimension, also from JSON.

    Raises:
        InvalidInputError: They are none.
    """
    found = value or {}
    if isinstance(found, str):
        with contextlib.suppress(ValueError):
            found = json.loads(found)
    if not isinstance(found, Mapping):
        raise InvalidInputError(
            f"'{SHAPES}' is a mapping from dimension to range, such as {{\"batch\": [1, 8, 64]}}, got {shown(value)}."
        )
    return {str(name): range_ for name, range_ in found.items()}


def _text(value: Any, kind: type) -> Any:
    return str(value) if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool) else value


def as_seconds(name: str, value: Any) -> float:
    """Return a number of seconds, also from text.

    Raises:
        InvalidInputError: It is none.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise InvalidInputError(f"'{name}' is a number of seconds, got {shown(value)}.") from None


def _read(file: Any) -> dict[str, Any]:
    path = Path(str(file))
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file '{path}'.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidInputError(f"'{path}' cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"'{path}' must hold keys and values, got {type(found).__name__}.")
    return {str(key): value for key, value in found.items()}
