"""Tasks: from what a user sends to tensors, and from tensors to what a user gets.

One file each. pyfunc, Triton and the benchmarks use that same file; adding a task is adding a file here.
"""

from __future__ import annotations

from mlflow_tdeploy.core.extension import Registry
from mlflow_tdeploy.core.tasks._base import AnswerForm, Encoded, Field, Param, Task

TASKS: Registry[type[Task]] = Registry("task", discover="mlflow_tdeploy.core.tasks")

__all__ = ["TASKS", "AnswerForm", "Encoded", "Field", "Param", "Task"]
