"""From process start to the first prediction: seconds and peak memory, in child processes, in turn."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import SHORT_TEXT
from benchmarks.ours import VARIANTS
from benchmarks.report import Figure, say

IMPORT_GOAL = 0.5
MEMORY_GOAL = 280.0
BARE_GOAL = 0.6

_ROOT = Path(__file__).parents[1]
_BASE = "import mlflow.pyfunc"
_BARE = "ours without MLflow"
_STEADY = "ours fp32, after 20 requests"
#: VmHWM belongs to this process alone; getrusage's peak would be the parent's where that one is larger.
_REPORT = """
import time; ended = time.monotonic()
import json
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"ended": ended, "peak_mib": int(peak) / 1024}))
"""


@dataclass(frozen=True)
class Place:
    """An environment that children start in.

    Attributes:
        name: For the table.
        python: Its interpreter.
        folder: Where they start; ``python -c`` imports from there first.
    """

    name: str
    python: str = sys.executable
    folder: Path = _ROOT


SERVING, DEVELOPMENT = "serving environment", "development environment"


def serving_folder(work: Path) -> Path:
    """Return where :func:`serving_environment` is."""
    return work / "serving"


def serving_environment(work: Path) -> Place:
    """Make an environment that holds what serving takes and nothing else; one that is there already stays.

    The package is installed from this checkout as it is now, with its ``cpu`` extra.
    """
    folder = serving_folder(work)
    place = Place(SERVING, str(folder / "bin" / "python"), work)
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [place.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(_ROOT / "constraints.txt"), f"{_ROOT}[cpu]"], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(_ROOT)], check=True)
    return place


def programs(model: Path) -> dict[str, str]:
    """Return what children run in every environment, by name; the first is what the others are compared with.

    Args:
        model: The logged model.
    """
    text = repr([SHORT_TEXT])
    cases = {_BASE: _BASE}
    for precision, variant in VARIANTS.items():
        opened = f"import mlflow.pyfunc; model = mlflow.pyfunc.load_model({str(model)!r}, model_config={{!r}})"
        cases[f"ours {precision}"] = f"{opened.format({'variant': variant})}; model.predict({text})"
    # By then a second session for lone requests is open, see runtime.threads.
    more = f"import time; [(model.predict({text}), time.sleep(0.05)) for _ in range(20)]"
    cases[_STEADY] = f"{cases['ours fp32']}; {more}"
    # MLflow compares requirements with every installed package at each load; the more there are, the longer it takes.
    unchecked = cases["ours fp32"].replace("model_config=", "suppress_warnings=True, model_config=")
    cases["ours fp32, MLflow's check of requirements off"] = unchecked
    return cases


def more_programs(work: Path, model: Path) -> dict[str, str]:
    """Return what only the development environment runs: without MLflow, and the peers."""
    text = repr([SHORT_TEXT])
    cases = {
        _BARE: (
            "from mlflow_tdeploy.runtime.model import open_model; from mlflow_tdeploy.runtime.policy import Policy; "
            f"open_model({str(model)!r}, policy=Policy(variant={VARIANTS['fp32']!r})).predict({text})"
        ),
    }
    peer = "from benchmarks.peers import open_peer; open_peer({name!r}, __import__('pathlib').Path({work!r}))({text})"
    for name in ("onnx", "sentence_transformers"):
        cases[f"mlflow.{name}"] = peer.format(name=name, work=str(work), text=text)
    return cases


def run_child(code: str, place: Place | None = None) -> tuple[float, float]:
    """Run Python code in a new process.

    Args:
        code: The statements.
        place: Which environment runs them; this one when None.

    Returns:
        Seconds from before the start until after the last statement, and peak memory in MiB.

    Raises:
        RuntimeError: The child failed; holds what it wrote to stderr.
    """
    place = place or Place(DEVELOPMENT)
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
    # With it every start compiles the modules anew: what is measured would be the compiler.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [place.python, "-c", code + _REPORT]
    started = time.monotonic()  # one clock for all processes of a host
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place.folder, check=False)
    if done.returncode:
        raise RuntimeError(f"A child process failed.\n{code}\n{done.stderr[-2000:]}")
    record = json.loads(done.stdout.splitlines()[-1])
    return record["ended"] - started, record["peak_mib"]


def measure(work: Path, model: Path, *, rounds: int = 5) -> tuple[list[Figure], dict[str, Any]]:
    """Start every program in turn; the first round, which fills disk and hash caches, does not count."""
    say(f"{SERVING}: pip install")
    places = [serving_environment(work), Place(DEVELOPMENT)]
    cases = [(place, name, code) for place in places for name, code in programs(model).items()]
    cases += [(places[-1], name, code) for name, code in more_programs(work, model).items()]
    found: dict[str, Samples] = {place.name: Samples() for place in places}
    say(f"{rounds} rounds of {len(cases)} programs")
    for turn in range(rounds + 1):
        for place, name, code in cases:
            taken = run_child(code, place)
            if turn:
                found[place.name].add(name, *taken)
    figures = [figure for place, samples in found.items() for figure in samples.figures(place)]
    details = {
        place: dataclasses.asdict(samples) | {"beyond_import_s": samples.beyond()} for place, samples in found.items()
    }
    return figures, {**details, "rounds": rounds}


@dataclass(frozen=True)
class Samples:
    """What the children of one environment took.

    Attributes:
        seconds: From process start to the end, by program.
        peak_mib: Peak memory, by program.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float, peak_mib: float) -> None:
        """Remember one run."""
        self.seconds.setdefault(name, []).append(seconds)
        self.peak_mib.setdefault(name, []).append(peak_mib)

    def beyond(self) -> dict[str, float]:
        """Return what each program takes beyond MLflow's import, pair by pair: a round saw one state of the machine."""
        base = self.seconds[_BASE]
        return {name: float(np.median(np.subtract(values, base))) for name, values in self.seconds.items()}

    def figures(self, place: str) -> list[Figure]:
        """Return the figures with their goals."""
        found = []
        beyond = self.beyond()
        for precision in VARIANTS:
            name = f"ours {precision}"
            title = f"start to first prediction, {precision}, {place}"
            found.append(Figure(f"{title}: beyond '{_BASE}'", beyond[name], "s", IMPORT_GOAL))
            found.append(Figure(f"{title}: peak memory", float(np.median(self.peak_mib[name])), "MiB", MEMORY_GOAL))
        if _STEADY in self.seconds:
            steady = float(np.median(self.peak_mib[_STEADY]))
            found.append(Figure(f"peak memory after 20 lone requests, fp32, {place}", steady, "MiB"))
        if _BARE in self.seconds:
            bare = float(np.median(self.seconds[_BARE]))
            found.append(Figure(f"start to first prediction, fp32, without MLflow, {place}", bare, "s", BARE_GOAL))
        for name, values in self.seconds.items():
            if name == _STEADY:
                continue  # most of its time it sleeps
            note = f"{np.median(self.peak_mib[name]):.0f} MiB"
            found.append(Figure(f"  start, {place}: {name}", float(np.median(values)), "s", note=note))
        return found
