"""How a session runs: what every runtime understands, and what each runtime adds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlflow_tdeploy.core.errors import ConflictError, InvalidInputError, shown

#: Key under which options can be given that were unknown when a model was logged.
SESSION_KEY = "session"
S = TypeVar("S")


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs; every field but the last two is a ``model_config`` key of its name.

    Attributes:
        threads: Batches run at once in bulk work; 0 means one per usable core.
        intra_op_threads: Threads inside one operator; 0 means one for each batch of bulk work, and for a lone
            request one or one per core, whichever is faster at the moment.
        token_budget: Most padded tokens in a batch; 0 means the default.
        own: Options that a runtime adds, by name; each is a ``model_config`` key, too.
        lone: Whether the session serves one request at a time and may have the host to itself; no key, see
            :meth:`mlflow_tdeploy.runtime.base.Runtime.lone_options`.
    """

    threads: int = 0
    intra_op_threads: int = 0
    token_budget: int = 0
    own: Mapping[str, Any] = field(default_factory=dict)
    lone: bool = False

    def __post_init__(self) -> None:
        for name in common_options():
            if getattr(self, name) < 0:
                raise InvalidInputError(f"The session option '{name}' must not be negative, got {getattr(self, name)}.")

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, settings: Iterable[type]) -> SessionOptions:
        """Make options from configuration keys; values may be text (environment, command line).

        Args:
            config: Value by name. Under ``session`` lie more of them, which come before the others.
            settings: What runtimes add: a dataclass each.

        Raises:
            InvalidInputError: An unknown key or a value of a wrong type.
        """
        kinds, common = tuple(settings), common_options()
        known = {**common, **added_options(kinds)}
        values: dict[str, Any] = {}
        for key, value in _flat(config).items():
            if key not in known:
                raise InvalidInputError(f"Unknown session option {shown(key)}. Known: {', '.join(known)}.")
            if value is not None:
                values[key] = parse_value(key, value, type(known[key]))
        own = {key: values.pop(key) for key in list(values) if key not in common}
        options = cls(**values, own=own)
        for kind in kinds:
            options.settings(kind)  # raises
        return options

    def settings(self, kind: type[S]) -> S:
        """Return what a runtime adds, as its own dataclass.

        Raises:
            InvalidInputError: A value that the runtime does not know.
        """
        names = added_options([kind])
        return kind(**{key: value for key, value in self.own.items() if key in names})

    def with_own(self, **values: Any) -> SessionOptions:
        """Return the options with some of a runtime's own replaced."""
        return dataclasses.replace(self, own={**self.own, **values})


def common_options() -> dict[str, Any]:
    """Return the options that every runtime understands, with their defaults."""
    return {one.name: one.default for one in dataclasses.fields(SessionOptions) if one.name not in ("own", "lone")}


def added_options(settings: Iterable[type]) -> dict[str, Any]:
    """Return the options in dataclasses of runtimes, with their defaults.

    They are keys of one ``model_config``: runtimes may share a name, then with one default, so with one meaning.

    Raises:
        ConflictError: Two of them give a name different defaults, or one takes a name that every runtime has.
    """
    found: dict[str, Any] = {}
    for kind in settings:
        for one in dataclasses.fields(kind):
            if one.name in common_options() or found.setdefault(one.name, one.default) != one.default:
                raise ConflictError(f"The session option '{one.name}' of {kind.__name__} exists with another meaning.")
    return found


def _flat(config: Mapping[str, Any] | None) -> dict[str, Any]:
    values = dict(config or {})
    more = values.pop(SESSION_KEY, None)
    if more is None or more == "":
        return values
    if not isinstance(more, Mapping):
        raise InvalidInputError(f"'{SESSION_KEY}' must be a mapping from option to value, got {shown(more)}.")
    return {**values, **more}


def parse_value(key: str, value: Any, kind: type) -> Any:
    """Return a configuration value as ``kind`` (bool, int or str), reading text as people write it.

    Raises:
        InvalidInputError: The value cannot be read as that type.
    """
    if (
        kind is bool
        and isinstance(value, str)
        and value.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off", "")
    ):
        return value.lower() in ("true", "1", "yes", "on")
    if kind is int and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise InvalidInputError(f"The option '{key}' must be of type {kind.__name__}, got {shown(value)}.")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Make sure that an option has one of its values.

    Raises:
        InvalidInputError: It has another.
    """
    if value not in (choices := tuple(allowed)):
        raise InvalidInputError(f"The session option '{name}' must be one of {', '.join(choices)}, got {shown(value)}.")
