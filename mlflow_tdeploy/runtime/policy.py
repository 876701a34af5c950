"""What the user insists on: said now, in the environment, or saved with the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.runtime.options import parse_value

_log = logging.getLogger("mlflow_tdeploy")
#: Environment variables that force a choice.
ENVIRONMENT = {"variant": "TDEPLOY_VARIANT", "runtime": "TDEPLOY_RUNTIME", "strict": "TDEPLOY_STRICT"}


@dataclass(frozen=True)
class Policy:
    """What the user insists on.

    Attributes:
        variant: Only this variant; None for any.
        runtime: Only this runtime; None for any.
        strict: Never fall back: if the first choice fails, fail.
        origins: Where each of them comes from, if not from who calls: an environment variable or the model.
    """

    variant: str | None = None
    runtime: str | None = None
    strict: bool = False
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] = os.environ,
        saved: Mapping[str, Any] | None = None,
        saved_as: str = "saved with the model",
    ) -> Policy:
        """Read a policy: from what somebody says now, then from the environment, then from what was saved.

        Where the environment overrules what was saved, a warning says so.

        Args:
            config: ``variant``, ``runtime`` and ``strict``, as said now; an empty text lifts what was saved.
            environ: Environment variables.
            saved: The same keys, as whoever logged the model left them.
            saved_as: What to call those in messages.

        Raises:
            InvalidInputError: A value of a wrong type.
        """
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, variable in ENVIRONMENT.items():
            said, default = (config or {}).get(key), (saved or {}).get(key)
            if said is None or (isinstance(said, str) and not said):
                lifted = said is not None
                if said := environ.get(variable):
                    origins[key] = variable
                    if default not in (None, "", said):
                        _log.warning("%s=%s overrules %s=%r, %s.", variable, said, key, default, saved_as)
                elif not lifted and (said := default):
                    origins[key] = saved_as
            values[key] = "" if said is None else said
        variant, runtime = (_parsed(key, values[key], str, origins).strip() or None for key in ("variant", "runtime"))
        return cls(variant, runtime, _parsed("strict", values["strict"], bool, origins), origins)

    def asked(self) -> str:
        """Return what is insisted on, and where that comes from; empty when nothing is."""
        values = {"variant": self.variant, "runtime": self.runtime, "strict": self.strict}
        return ", ".join(f"{key}={value!r}{self.origin(key)}" for key, value in values.items() if value)

    def origin(self, key: str) -> str:
        """Return in parentheses where a value comes from, for a message; empty where the caller said it."""
        return _named(self.origins, key)


def _parsed(key: str, value: Any, kind: type, origins: Mapping[str, str]) -> Any:
    try:
        return parse_value(key, value, kind)
    except InvalidInputError as error:
        raise InvalidInputError(f"{str(error).rstrip('.')}{_named(origins, key)}.") from None


def _named(origins: Mapping[str, str], key: str) -> str:
    return f" ({origins[key]})" if key in origins else ""
