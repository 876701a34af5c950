"""Sources for tests of the build: real torch modules of a few hundred weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.source.base import Source
from mlflow_tdeploy.source.resolve import resolve
from tests.bundles import SIGNATURE

EXAMPLE = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}


class Mlp(torch.nn.Module):
    """Two layers with a layer norm in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.last = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.last(self.norm(torch.nn.functional.gelu(self.first(x))))}


def mlp_source(module: torch.nn.Module | None = None) -> Source:
    """Return the source of a small module: task ``tensors``, nothing that can be kept as a Hugging Face model."""
    return resolve(module or Mlp().eval(), example=EXAMPLE, shapes={"batch": (1, 2, 8)})


def linear_task(config: Mapping[str, Any] | None = None) -> Task:
    """Return the task of the graph y = x @ w of the hand-made bundles."""
    return TASKS.get("tensors")(config or {}, SIGNATURE, Path())


def scaled(factor: float) -> Any:
    """Return an inference function y = factor * (x[:, :3] + 1)."""

    def infer(feeds: Arrays) -> Arrays:
        return {"y": factor * (feeds["x"][:, :3] + 1)}

    return infer
