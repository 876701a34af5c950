"""Figures with their goals: a table for people, JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlflow_tdeploy.core.hardware import installed_version
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.decision import align

#: Distributions whose versions belong to a result.
_VERSIONS = (
    *("mlflow", "mlflow-tdeploy", "onnxruntime", "onnx", "onnxscript", "torch", "transformers"),
    *("sentence-transformers", "tokenizers", "numpy", "pandas"),
)


@dataclass(frozen=True)
class Figure:
    """One figure and what it should be.

    Attributes:
        name: What was measured.
        value: The figure; NaN where it could not be measured.
        unit: For example ``x``, ``ms``, ``MiB``.
        goal: The limit; None where there is nothing to reach.
        direction: ``at most`` or ``at least`` the goal.
        note: How it came about, where that is not obvious.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    direction: Literal["at most", "at least"] = "at most"
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal. A figure that is no number is missed."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.direction == "at most" else self.value >= self.goal

    def row(self) -> tuple[str, str, str, str, str]:
        """Return the cells of the table."""
        sign = "≤" if self.direction == "at most" else "≥"
        goal = "" if self.goal is None else f"{sign} {number(self.goal)} {self.unit}"
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        return (self.name, f"{number(self.value)} {self.unit}", goal, verdict, self.note)


@dataclass
class Results:
    """Everything a run of the benchmarks found out.

    Attributes:
        sections: Figures and details (medians, ratios, rounds, settings) by section, in the order of the table.
    """

    sections: dict[str, tuple[list[Figure], dict[str, Any]]] = field(default_factory=dict)

    def add(self, section: str, figures: Iterable[Figure], details: Mapping[str, Any]) -> None:
        """Take in a section's figures and details."""
        self.sections[section] = (list(figures), dict(details))

    @property
    def figures(self) -> list[Figure]:
        """All figures, in the order of the table."""
        return [figure for figures, _ in self.sections.values() for figure in figures]

    @property
    def missed(self) -> list[Figure]:
        """Figures whose goal is not reached."""
        return [figure for figure in self.figures if figure.met is False]


def number(value: float) -> str:
    """Return a figure with three significant digits, large ones without a fraction."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    # a cosine of 0.9999997 is not 1.00: digits count from the distance to one
    if 0.9 < value < 1.0:
        return f"{value:.4f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def table(figures: Sequence[Figure]) -> str:
    """Return figures as an aligned table."""
    return align([("figure", "value", "goal", "", "note"), *(figure.row() for figure in figures)])


def summarize(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return rounds, median, fastest and quartiles in ms of each call's samples in seconds."""
    summary = {}
    for name, seconds in samples.items():
        low, median, high = (float(q) for q in np.percentile(np.asarray(seconds) * 1e3, (25, 50, 75)))
        summary[name] = {
            "rounds": len(seconds), "median_ms": median, "min_ms": min(seconds) * 1e3, "p25_ms": low, "p75_ms": high,
        }  # fmt: skip
    return summary


def host_record() -> dict[str, Any]:
    """Return what the figures were measured on: host, versions, load, time."""
    return {
        "host": dataclasses.asdict(probe.host()),
        "python": platform.python_version(),
        "versions": {name: version for name in _VERSIONS if (version := installed_version(name))},
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_json(results: Results, path: Path) -> None:
    """Write every section with what it was measured on, whole or not at all; sections not measured now are kept."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record = {**kept, **{name: _section(*section) for name, section in results.sections.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(record, indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _section(figures: Sequence[Figure], details: Mapping[str, Any]) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(figure), "met": figure.met} for figure in figures]
    for row in rows:
        if not math.isfinite(row["value"]):
            row["value"] = None  # JSON has no NaN
    return {**host_record(), "figures": rows, "details": details}


def finish(results: Results, out: Path, *, quick: bool) -> int:
    """Print the table and what was reached, and write the JSON unless it was a smoke run; return the exit code."""
    print(table(results.figures))
    goals = [figure for figure in results.figures if figure.goal is not None]
    print(f"\n{len(goals) - len(results.missed)} of {len(goals)} goals met on this machine")
    if not quick:
        write_json(results, out)
        say(f"written to {out}")
    return 0


def say(what: str) -> None:
    """Tell whoever waits what is going on; the table alone goes to standard output."""
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)
