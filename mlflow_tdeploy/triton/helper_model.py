"""Small Python models of ours that are on a server for a while, and answer in JSON."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlflow_tdeploy.core.errors import ServerError, TDeployError, shown
from mlflow_tdeploy.core.records import from_json
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.triton.config import OWN, messages, to_text
from mlflow_tdeploy.triton.names import CONFIG

T = TypeVar("T")
#: Their only version.
VERSION = 1


@dataclass(frozen=True)
class HelperModel:
    """What such a model is.

    Attributes:
        about: In one word, for who finds it in a repository.
        sources: Its ``model.py`` and what that needs beside it.
        takes: Name, type and size (-1 for any) of its input.
        answers: Name of its output.
    """

    about: str
    sources: tuple[Path, ...]
    takes: tuple[str, str, int]
    answers: str

    def write(self, folder: Path) -> None:
        """Write the model to a new folder, which has its name."""
        pb = messages()
        config = pb.ModelConfig(name=folder.name, backend="python")
        name, kind, size = self.takes
        config.input.add(name=name, data_type=kind, dims=[size])
        config.output.add(name=self.answers, data_type="TYPE_STRING", dims=[1])
        config.parameters[f"{OWN}about"].string_value = self.about  # it is ours, whoever finds it
        config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
        files = folder / str(VERSION)
        files.mkdir(parents=True)
        for source in self.sources:
            shutil.copyfile(source, files / source.name)
        (folder / CONFIG).write_text(to_text(config))

    def said(self, kind: type[T], answer: Arrays, where: str, what: str) -> T:
        """Return what the model has said.

        Args:
            kind: As what.
            answer: Its answer.
            where: The server, for messages.
            what: What it says, for messages.

        Raises:
            ServerError: That is nothing this package understands.
        """
        try:
            return from_json(kind, bytes(answer[self.answers].reshape(-1)[0]), f"what {where} says")
        except (TDeployError, LookupError, TypeError) as error:
            why = shown(str(error), 200)
            raise ServerError(f"The server at {where} does not say {what}: {why}") from error
