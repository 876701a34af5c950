"""Our errors as MLflow's."""

from __future__ import annotations

import errno

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from mlflow_tdeploy.core import errors
from mlflow_tdeploy.core.errors import NotFoundError, TDeployError
from mlflow_tdeploy.registry_io import (
    mlflow_errors,
)

OUR_ERRORS = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, TDeployError)]


@pytest.mark.parametrize("cls", OUR_ERRORS)
def test_mlflow_errors_keeps_code_message_and_cause_of_each_error(cls):
    given = {errors.MissingDependencyError: ("p", "x", "y"), errors.BrokenDependencyError: ("x", OSError("lib.so"))}
    error = cls(*given.get(cls, ("what, why, what to do",)))
    with pytest.raises(MlflowException) as caught, mlflow_errors():
        raise error
    assert caught.value.error_code == cls.code
    assert cls.code in set(ErrorCode.keys())
    assert caught.value.message == str(error)
    assert caught.value.__cause__ is error


def test_mlflow_errors_explains_a_full_disk():
    with pytest.raises(MlflowException, match="disk is full") as caught, mlflow_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/model.onnx")
    assert "/somewhere/model.onnx" in caught.value.message


@pytest.mark.parametrize("error", [ValueError("theirs"), OSError(errno.ENOENT, "gone"), MlflowException("own")])
def test_mlflow_errors_passes_other_errors_on(error):
    with pytest.raises(type(error)) as caught, mlflow_errors():
        raise error
    assert caught.value is error


def test_mlflow_errors_works_as_a_decorator_more_than_once():
    @mlflow_errors()
    def fail():
        raise NotFoundError("nothing")

    for _ in range(2):
        with pytest.raises(MlflowException, match="nothing"):
            fail()
