"""A Triton model that counts what is seen of a version which is tried out, and says so to who asks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlflow_tdeploy.core.errors import ServerError, TDeployError, shown
from mlflow_tdeploy.core.records import from_json
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.triton.config import OWN, messages, to_text
from mlflow_tdeploy.triton.names import CONFIG

#: Its only version, its input and its output.
VERSION, _INPUT, _OUTPUT = 1, "seen", "tally"
_MODEL = Path(__file__).parent / "tally" / "model.py"


@dataclass(frozen=True)
class Tally:
    """What was seen of requests that the version which serves has answered.

    Attributes:
        requests: How many.
        failed: To how many of them the version that is tried out had no answer.
        alike: To how many both have said the same, see :func:`mlflow_tdeploy.core.rollout.alike`.
        before: Seconds within which the version that serves answered 95 % of those that both answered, of the newest
            10,000.
        after: The other one's.
        why: Why the last one failed.
    """

    requests: int = 0
    failed: int = 0
    alike: int = 0
    before: float = 0.0
    after: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        p95 = f"p95 {self.after * 1000:.1f} ms beside {self.before * 1000:.1f} ms"
        return f"{self.requests} requests, {self.failed} failed, {self.alike} answered alike, {p95}"


def write_tally_model(folder: Path) -> None:
    """Write the model to a new folder, which has its name."""
    pb = messages()
    config = pb.ModelConfig(name=folder.name, backend="python")
    config.input.add(name=_INPUT, data_type="TYPE_STRING", dims=[-1])
    config.output.add(name=_OUTPUT, data_type="TYPE_STRING", dims=[1])
    config.parameters[f"{OWN}about"].string_value = "tally"  # it is ours, whoever finds it
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    files = folder / str(VERSION)
    files.mkdir(parents=True)
    shutil.copyfile(_MODEL, files / _MODEL.name)
    (folder / CONFIG).write_text(to_text(config))


def question() -> Arrays:
    """Return what the model is asked by who wants to know."""
    return {_INPUT: np.array([b""], dtype=object)}


def tally_of(answer: Arrays, where: str) -> Tally:
    """Return what the model has said.

    Args:
        answer: Its answer.
        where: The server, for messages.

    Raises:
        ServerError: That is nothing this package understands.
    """
    try:
        return from_json(Tally, bytes(answer[_OUTPUT].reshape(-1)[0]), f"what {where} has counted")
    except (TDeployError, LookupError, TypeError) as error:
        raise ServerError(
            f"The server at {where} does not say what it has counted: {shown(str(error), 200)}"
        ) from error
