"""A small model of every registered task, ready to be rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import mlflow_tdeploy
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.triton.bundle_version import BundleVersion, triton_runtime
from tests.flavor.text_bundles import make_text_bundle

#: Requests of each task, in the forms that ``predict`` takes; each longer than a batch of the graph.
TEXTS = ["cat", "a dog and a cat", "the", "dog dog dog", "cat dog", "and", "a", "the cat and the dog"] * 2


class Scale(torch.nn.Module):
    """Outputs of several kinds, one of a number per row."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * weight[:, None]
        return {"y": y, "best": y.argmax(dim=1), "total": y.sum(dim=1)}


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a request for :class:`Scale`."""
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((count, 3)).astype(np.float32),
        "weight": random.random(count).astype(np.float32),
    }


def bundle_of(task: str, target: Path) -> Bundle:
    """Log a model of a task."""
    if task == "tensors":
        mlflow_tdeploy.save_model(Scale(), target, example=rows(8), shapes={"batch": (1, 2, 8)}, precisions=["fp32"])
    else:
        make_text_bundle(target, task)
    return Bundle.open(target)


def deployable(
    bundle: Bundle, *, name: str = "m", version: int = 7, variant_id: str = "onnx-fp32", **about: Any
) -> BundleVersion:
    """Return a version of it."""
    variant = bundle.variants[variant_id]
    return BundleVersion(name, version, about, bundle, variant, triton_runtime(variant))
