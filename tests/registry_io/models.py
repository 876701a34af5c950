"""Models in MLflow's stores, as the tests of the seam need them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import mlflow_tdeploy
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import record_tree
from tests.bundles import WEIGHTS, linear_graph


def log(model, name="linear", **arguments):
    return mlflow_tdeploy.log_model(model, name=name, registered_model_name=name, **arguments)


def stage(folder: Path, model: Path, variant_id: str = "onnx-fp16", weights: np.ndarray = WEIGHTS):
    """Return the record of a new variant whose files lie in ``folder``."""
    linear_graph(folder / "files" / variant_id / "model.onnx", weights)
    old = Bundle.open(model).variants["onnx-fp32"]
    entry = f"files/{variant_id}/model.onnx"
    return replace(old, id=variant_id, entry=entry, files=record_tree(folder, f"files/{variant_id}"))


def tree(location) -> set[str]:
    """Every file of a model in its store."""
    return {entry.path for entry in location.repository._iter_artifacts_recursive(None) if not entry.is_dir}
