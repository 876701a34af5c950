"""What a search has found is found again in a process of its own: the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import mlflow_tdeploy
from mlflow_tdeploy.store.bundle import Bundle
from tests.build.test_fake_quant import Block, arrays
from tests.build.test_int8_mixed import WIDTH
from tests.build.test_onnx_int8 import Delicate, requests

folder, recipe = sys.argv[1:]
module, given = (Block(), arrays(4, 6, WIDTH)) if recipe == "ort-cpu-int4" else (Delicate(), requests())
mlflow_tdeploy.save_model(
    module, folder, example=given[0], shapes={"batch": (1, 8, 16)}, precisions=["fp32", recipe],
    verify_with=given, budget="worst_cosine >= 0.8",
)
print(Bundle.open(folder).variants[recipe].digest)
"""


def found(folder, recipe, seed):
    environment = {**os.environ, "PYTHONHASHSEED": seed, "TDEPLOY_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "model"), recipe],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        *("ort-cpu-int8-mixed", "ort-cpu-int4", "onnx-int8", "onnx-int8-torch", "onnx-int8-modelopt"),
        *("onnx-int4-modelopt", "onnx-int8-smoothquant-modelopt"),
    ],
)
def test_the_same_data_gives_the_same_bytes_in_another_process(tmp_path, recipe):
    digests = set()
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        digests.add(found(tmp_path / seed, recipe, seed))
    assert len(digests) == 1
