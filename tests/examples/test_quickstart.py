from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quickstart_does_what_the_readme_says(tmp_path):
    """The command that a new user runs first; `make quickstart` only makes the environment around it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", "--out", tmp_path / "out"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PATH": path}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    out = done.stdout
    assert "Registered as minilm version 1, alias champion" in out
    assert "predict(3 texts) -> (3, 384) float32" in out
    difference = re.search(r"over HTTP; largest difference to step 3: (\S+)", out)
    assert difference is not None
    assert float(difference.group(1)) < 1e-5
    (serving,) = re.findall(r"(\S+) +ort-cpu +serves", out)
    assert serving in ("onnx-fp32", "ort-cpu-fp32", "ort-cpu-int8")  # the fastest of this run within the budget
    close = re.search(r"^ort-cpu-int8 +\S+(?: kept)? +(0\.99\d+|0\.98\d+) +(yes|no, never serves)$", out, re.MULTILINE)
    assert close is not None
    assert (close.group(2) == "yes") is (float(close.group(1)) >= 0.99)
    assert f"version 1, variant {serving}, golden requests answered, ready" in out
    assert len(re.findall(r"plain tritonclient: (?:http|grpc) sentence_embedding \(3, 384\)", out)) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]  # everything it writes is below
