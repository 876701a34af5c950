"""From process start to the first prediction: seconds and peak memory, in child processes, in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import SHORT_TEXT
from benchmarks.ours import VARIANTS
from benchmarks.report import Figure

IMPORT_GOAL = 0.5
MEMORY_GOAL = 280.0
BARE_GOAL = 0.6

_ROOT = Path(__file__).parents[1]
_BASE = "import mlflow.pyfunc"
_BARE = "ours without MLflow"
#: VmHWM belongs to this process alone; getrusage's peak would be the parent's where that one is larger.
_REPORT = """
import time; ended = time.monotonic()
import json
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"ended": ended, "peak_mib": int(peak) / 1024}))
"""


def programs(work: Path, model: Path) -> dict[str, str]:
    """Return what each child runs, by name.

    Args:
        work: Where the peers were prepared.
        model: The logged model.
    """
    text = repr([SHORT_TEXT])
    opened = f"import mlflow.pyfunc; model = mlflow.pyfunc.load_model({str(model)!r}, model_config={{}})"
    peer = "from benchmarks.peers import open_peer; open_peer({name!r}, __import__('pathlib').Path({work!r}))({text})"
    cases = {_BASE: _BASE}
    for precision, variant in VARIANTS.items():
        config = repr({"variant": variant})
        cases[f"ours {precision}"] = f"{opened.replace('{}', config)}; model.predict({text})"
    # MLflow compares requirements with every installed package at each load; the more there are, the longer it takes.
    unchecked = opened.replace(", model_config={}", ", suppress_warnings=True")
    cases["ours, MLflow's check of requirements off"] = f"{unchecked}; model.predict({text})"
    cases[_BARE] = (
        "from mlflow_tdeploy.runtime.model import Policy, open_model; "
        f"open_model({str(model)!r}, policy=Policy(variant={VARIANTS['fp32']!r})).predict({text})"
    )
    for name in ("onnx", "sentence_transformers"):
        cases[f"mlflow.{name}"] = peer.format(name=name, work=str(work), text=text)
    return cases


def run_child(code: str) -> tuple[float, float]:
    """Run Python code in a new process.

    Returns:
        Seconds from before the start until after the last statement, and peak memory in MiB.

    Raises:
        RuntimeError: The child failed; holds what it wrote to stderr.
    """
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()  # one clock for all processes of a host
    done = subprocess.run(
        [sys.executable, "-c", code + _REPORT], capture_output=True, text=True, env=environment, cwd=_ROOT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"A child process failed.\n{code}\n{done.stderr[-2000:]}")
    record = json.loads(done.stdout.splitlines()[-1])
    return record["ended"] - started, record["peak_mib"]


def measure(work: Path, model: Path, *, rounds: int = 5) -> tuple[list[Figure], dict[str, Any]]:
    """Start every program in turn; the first round, which fills disk and hash caches, does not count."""
    cases = programs(work, model)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    memory: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, code in cases.items():
            took, peak = run_child(code)
            if turn:
                seconds[name].append(took)
                memory[name].append(peak)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    peaks = {name: float(np.median(values)) for name, values in memory.items()}
    # Pair by pair: both processes of a round saw the same machine.
    beyond = {
        name: float(np.median(np.subtract(values, seconds[_BASE]))) for name, values in seconds.items() if name != _BASE
    }
    details = {"seconds": seconds, "peak_mib": memory, "beyond_import_s": beyond, "rounds": rounds}
    return figures(medians, peaks, beyond), details


def figures(medians: Mapping[str, float], peaks: Mapping[str, float], beyond: Mapping[str, float]) -> list[Figure]:
    """Return the figures with their goals."""
    found = []
    for precision in VARIANTS:
        name = f"ours {precision}"
        found.append(Figure(f"start to first prediction beyond '{_BASE}', {precision}", beyond[name], "s", IMPORT_GOAL))
        found.append(Figure(f"start to first prediction, peak memory, {precision}", peaks[name], "MiB", MEMORY_GOAL))
    found.append(Figure("start to first prediction without MLflow, fp32", medians[_BARE], "s", BARE_GOAL))
    for name, median in medians.items():
        found.append(Figure(f"  start: {name}", median, "s", note=f"{peaks[name]:.0f} MiB"))
    return found
