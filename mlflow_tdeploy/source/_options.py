"""What a caller of ``resolve`` said beside the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Array

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Tell whether a revision is a full commit, which can never change."""
    return bool(revision and _COMMIT.fullmatch(revision))


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`mlflow_tdeploy.source.resolve.resolve`, checked as far as no model is needed.

    Raises:
        InvalidInputError: An unknown task, or remote code without a pinned commit.
    """

    task: str | None = None
    tokenizer: Any = None
    shapes: Mapping[str, object] | None = None
    example: Mapping[str, Array] | None = None
    labels: Sequence[str] | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    image_processor: Any = None

    def __post_init__(self) -> None:
        if self.task is not None:
            TASKS.get(self.task)
        if self.trust_remote_code and not is_commit(self.revision):
            raise InvalidInputError(
                "trust_remote_code=True runs code of the model's repository, so it needs revision= with the full "
                f"commit (40 hex digits) that you have read, got {self.revision!r}. Branches and tags can move. For "
                "a local folder: load the model yourself and pass the object."
            )
        if self.labels is not None and (
            isinstance(self.labels, str) or not all(isinstance(x, str) for x in self.labels)
        ):
            raise InvalidInputError(f"labels must be a list of names in class order, got {self.labels!r}.")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise InvalidInputError(f"labels has a name twice: {shown(list(self.labels), 200)}.")

    def pick_task(self, inferred: str, allowed: Sequence[str], what: str) -> str:
        """Return the task: the one asked for, or the inferred one.

        Raises:
            InvalidInputError: The model cannot do what was asked for.
        """
        task = self.task or inferred
        if task not in allowed:
            hint = ""
            if task == "sentence-embedding":
                hint = (
                    " How its token vectors become one is not part of it: wrap it in a SentenceTransformer, with the "
                    "module Pooling that it was trained for."
                )
            raise InvalidInputError(f"{what} cannot be logged for task '{task}'. Possible: {', '.join(allowed)}.{hint}")
        return task

    def refuse(self, what: str, *names: str, otherwise: str = "") -> None:
        """Refuse arguments that mean nothing for a kind of model, instead of ignoring them.

        Raises:
            InvalidInputError: One of them was given.
        """
        for name in names:
            if getattr(self, name) is not None:
                raise InvalidInputError(f"{name}= means nothing for {what}. Leave it out{otherwise}.")


def plain_name(name: object, otherwise: str) -> str:
    """Return a model's name for the record: a hub id as it is, a path's last part, or ``otherwise``."""
    text = str(name or "")
    if not text:
        return otherwise
    path = Path(text)
    is_path = path.is_absolute() or path.exists() or text.startswith((".", "~")) or "\\" in text or text.count("/") > 1
    return (path.resolve().name or otherwise) if is_path else text
