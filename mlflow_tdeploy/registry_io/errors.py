"""Our errors as MLflow's: the one place that translates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from mlflow_tdeploy.core.errors import StorageError, TDeployError
from mlflow_tdeploy.store.disk import is_full


@contextlib.contextmanager
def mlflow_errors() -> Iterator[None]:
    """Turn this package's errors into :class:`MlflowException` with the code that each class names.

    A context manager and a decorator. The original error stays as ``__cause__``.
    """
    try:
        yield
    except TDeployError as error:
        raise MlflowException(str(error), error_code=ErrorCode.Value(error.code)) from error
    except OSError as error:
        if not is_full(error):
            raise
        raise MlflowException(
            f"The disk is full ({error.filename or error}). Nothing half written was kept; free some space and try "
            f"again.",
            error_code=ErrorCode.Value(StorageError.code),
        ) from error
