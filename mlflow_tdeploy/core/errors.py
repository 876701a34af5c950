"""Every failure a user can see, as plain exceptions.

``core`` knows no MLflow: each class names the MLflow error code it becomes, and the one place that
translates (:func:`mlflow_tdeploy.registry_io.mlflow_errors`) reads it. A message says what failed,
why, and what to do about it.
"""

from __future__ import annotations

import re

_USER = re.compile(r"://[^/@\s'\"]+@")


class TDeployError(Exception):
    """Base of every error raised on purpose by this package."""

    #: Name of the MLflow error code (``mlflow.protos.databricks_pb2``) this error becomes at the seam.
    code: str = "INTERNAL_ERROR"


class InvalidInputError(TDeployError):
    """A value that the caller passed cannot be used; nothing was changed."""

    code = "INVALID_PARAMETER_VALUE"


class NotFoundError(TDeployError):
    """Something named by the caller does not exist."""

    code = "RESOURCE_DOES_NOT_EXIST"


class ConflictError(TDeployError):
    """Something of that name exists already and is never overwritten."""

    code = "RESOURCE_ALREADY_EXISTS"


class IntegrityError(TDeployError):
    """A file is missing, truncated, changed or outside the bundle."""

    code = "INVALID_STATE"


class StorageError(TDeployError):
    """The file system refused: the disk is full, read-only, or access is not permitted."""

    code = "IO_ERROR"


class SchemaVersionError(TDeployError):
    """The bundle, or a record in it, was written by a newer version of this package.

    Attributes:
        version: The schema version found; 0 where it is not known.
    """

    code = "FEATURE_DISABLED"

    def __init__(self, message: str, version: int = 0) -> None:
        super().__init__(message)
        self.version = version


class ManifestError(TDeployError):
    """A JSON record of a bundle does not have the documented form."""

    code = "INVALID_STATE"


class BudgetError(TDeployError):
    """A variant is further from its reference than the model's budget allows."""

    code = "INVALID_STATE"


class NoVariantError(TDeployError):
    """No variant of the bundle can serve on this host under the given policy."""

    code = "INVALID_STATE"


class RefusedChoiceError(NoVariantError):
    """A call insists on what cannot serve here; the model still answers other calls."""

    code = "INVALID_PARAMETER_VALUE"


class SessionError(TDeployError):
    """A runtime could not open or run a variant."""

    code = "INTERNAL_ERROR"


class RefusedInputError(SessionError):
    """A runtime refused the values of a request, such as an index beyond a table; the model answers others."""

    code = "INVALID_PARAMETER_VALUE"


class ServerError(TDeployError):
    """A Triton server refuses, or cannot do what it is asked."""

    code = "INTERNAL_ERROR"


class UnreachableError(ServerError):
    """Nobody answers, or not as a Triton server does."""

    code = "TEMPORARILY_UNAVAILABLE"


class LateError(UnreachableError):
    """Nobody has answered in time: who is asked may be slow, or gone."""


class VerificationError(TDeployError):
    """A version on a server answers otherwise than it did where it was logged."""

    code = "INVALID_STATE"


class TryoutError(VerificationError):
    """A version that was tried out on everybody's requests did worse than the one that serves."""


class PromotionError(TDeployError):
    """A version may not serve, or could not be brought everywhere: everything is as it was."""

    code = "INVALID_STATE"


class BuildError(TDeployError):
    """A build step (export, fusion, quantization, verification) failed."""

    code = "INTERNAL_ERROR"


class ExportError(BuildError):
    """A module could not be exported to ONNX, or the graph is not the module.

    Args:
        message: What happened.
        said: What each exporter said that was tried, ``dynamo: …``.
    """

    def __init__(self, message: str, said: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.said = said


class MissingDependencyError(TDeployError):
    """An optional package is needed and not installed; the message holds the install line."""

    code = "INVALID_STATE"

    def __init__(self, package: str, purpose: str, install: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}', which is not installed. Install it with: {install}")
        self.package = package
        self.install = install


class BrokenDependencyError(TDeployError):
    """A package cannot be imported; the message says what it raised, and whether it is there at all."""

    code = "INVALID_STATE"

    def __init__(self, purpose: str, error: BaseException) -> None:
        mend = "A package is installed and broken: reinstall it (pip install --force-reinstall …)."
        if isinstance(error, ModuleNotFoundError) and error.name:
            mend = f"Install it: pip install {error.name.partition('.')[0]}"
        super().__init__(
            f"{purpose} is not possible: importing what it needs failed with {type(error).__name__}: {error}. {mend}"
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none; no user or password of a URL."""
    text = str(error).strip()
    return _USER.sub("://", text.splitlines()[0]) if text else type(error).__name__


def shown(value: object, width: int = 60) -> str:
    """Return how a value looks in a message: never long, never an error, whatever somebody sent."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except Exception:  # an integer of too many digits, a broken __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= width else f"{text[:width]}…"
