from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_tdeploy.core.variant import Variant
from tests.bundles import make_bundle
from tests.store.staging import stage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bundle with one variant."""
    return make_bundle(tmp_path / "model") / "tdeploy"


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """Where files of a new variant lie."""
    return tmp_path / "staged"


@pytest.fixture
def variant(staged: Path) -> Variant:
    """A new variant, staged."""
    return stage(staged, "ort-cpu-fp32")
