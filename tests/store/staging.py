"""Variants made apart from the bundle they will join."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.hashing import record_tree
from tests.bundles import WEIGHTS, linear_graph, make_bundle


def stage(folder: Path, variant_id: str, weights: np.ndarray = WEIGHTS) -> Variant:
    """Return a new variant whose files lie below ``folder``."""
    linear_graph(folder / "files" / variant_id / "model.onnx", weights)
    base = next(iter(Bundle.open(make_bundle(folder / "base")).variants.values()))
    files = record_tree(folder, f"files/{variant_id}")
    return dataclasses.replace(base, id=variant_id, entry=f"files/{variant_id}/model.onnx", files=files)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file's content by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
