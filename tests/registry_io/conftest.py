from __future__ import annotations

import pytest

from tests.bundles import WEIGHTS, make_bundle


@pytest.fixture
def model(tmp_path):
    """A model directory with two variants."""
    return make_bundle(tmp_path / "made", {"onnx-fp32": WEIGHTS, "ort-cpu-fp32": WEIGHTS})


@pytest.fixture(params=["tracking", "remote"])
def store(request):
    """SQLite with a local folder, and a server that keeps artifacts behind HTTP."""
    return request.getfixturevalue(request.param)
