"""A Triton model that says what its server's host is: which variant suits it is decided before one is sent there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from mlflow_tdeploy.core import gpu_driver, hardware
from mlflow_tdeploy.core.errors import ServerError, TDeployError, shown
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.records import from_json
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.triton.config import OWN, messages, to_text
from mlflow_tdeploy.triton.names import CONFIG

#: Its only version, its input that says nothing, and its output.
VERSION, _INPUT, _OUTPUT = 1, "ask", "host"
_MODEL = Path(__file__).parent / "probe" / "model.py"


def write_host_model(folder: Path) -> None:
    """Write the model to a new folder, which has its name."""
    pb = messages()
    config = pb.ModelConfig(name=folder.name, backend="python")
    config.input.add(name=_INPUT, data_type="TYPE_INT32", dims=[1])
    config.output.add(name=_OUTPUT, data_type="TYPE_STRING", dims=[1])
    config.parameters[f"{OWN}about"].string_value = "host"  # it is ours, whoever finds it
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    files = folder / str(VERSION)
    files.mkdir(parents=True)
    for source in (_MODEL, Path(hardware.__file__), Path(gpu_driver.__file__)):
        shutil.copyfile(source, files / source.name)
    (folder / CONFIG).write_text(to_text(config))


def question() -> Arrays:
    """Return what the model is asked."""
    return {_INPUT: np.zeros(1, np.int32)}


def fingerprint_of(answer: Arrays, where: str) -> Fingerprint:
    """Return what the model has said.

    Args:
        answer: Its answer.
        where: The server, for messages.

    Raises:
        ServerError: That is nothing this package understands.
    """
    try:
        return from_json(Fingerprint, bytes(answer[_OUTPUT].reshape(-1)[0]), f"what {where} says of its host")
    except (TDeployError, LookupError, TypeError) as error:
        raise ServerError(f"The server at {where} does not say what its host is: {shown(str(error), 200)}") from error
