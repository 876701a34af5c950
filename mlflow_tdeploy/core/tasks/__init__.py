"""Tasks: from what a user sends to tensors, and from tensors to what a user gets.

One file each. pyfunc, Triton and the benchmarks use that same file; adding a task is adding a file here.
"""

from __future__ import annotations

from mlflow_tdeploy.core.extension import Registry
from mlflow_tdeploy.core.tasks._base import Encoded, Task
from mlflow_tdeploy.core.tasks._forms import ERRORS, AnswerForm, Field, Param
from mlflow_tdeploy.core.tasks._head import Head, refuse_arguments

TASKS: Registry[type[Task]] = Registry("task", discover="mlflow_tdeploy.core.tasks")

__all__ = ["ERRORS", "TASKS", "AnswerForm", "Encoded", "Field", "Head", "Param", "Task", "heads", "refuse_arguments"]


def heads() -> dict[str, Head]:
    """Return what each task of Hugging Face models needs of them, by task."""
    return {task.name: task.head for task in TASKS if task.head is not None}
