"""The results as a picture for the README: ``python -m benchmarks.picture`` draws what the JSON holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from benchmarks.startup import DEVELOPMENT

_FOLDER = Path(__file__).parent
RESULTS = _FOLDER / "results" / "text.json"
PICTURE = _FOLDER.parent / "docs" / "images" / "text.png"
_OURS, _FLOOR, _PEER = "#2a7f9e", "#8a8f98", "#c9ccd1"
_ORDER = (
    *("mlflow.sentence_transformers", "mlflow.transformers", "mlflow.onnx"),
    *("floor fp32", "ours fp32", "floor int8", "ours int8"),
)
_PANELS = (("short", "one text of 8 words", "ms", 1e3), ("mixed", "256 texts of mixed length", "s", 1.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON of python -m benchmarks.text")
    parser.add_argument("--out", type=Path, default=PICTURE, help="PNG or SVG file to write")
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text(encoding="utf-8")), options.out)
    return 0


def bars(results: Mapping[str, Any], workload: str) -> dict[str, float]:
    """Return the median seconds of every call of a workload, by name.

    Ours are those measured in turn with the floor: there the machine's speed drifted least.
    """
    groups = results["latency"]["details"][workload]["calls"]
    medians = {name: call["median_ms"] / 1e3 for group in ("peers", "floor") for name, call in groups[group].items()}
    return {name: medians[name] for name in _ORDER if name in medians}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        results: What ``python -m benchmarks.text`` wrote.
        path: The file; its ending decides the format.

    Raises:
        KeyError: The results lack the latency or the startup part.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.1), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (workload, title, unit, scale) in zip(axes, _PANELS, strict=False):
        found = {name: seconds * scale for name, seconds in bars(results, workload).items()}
        _panel(axis, found, f"{title}, {unit}")
    _panel(axes[2], started(results), "start to first answer, s")
    host = results["latency"]["host"]
    close = results["latency"]["details"]["worst_cosine_to_sentence_transformers"]
    caption = (
        f"text in, vectors out, all-MiniLM-L6-v2, medians; {host['cores']} cores, {host['cpu']}; "
        "grey: MLflow's own flavors through pyfunc, dark grey: a bare ONNX Runtime loop;\n"
        f"worst cosine to the original: ours int8 {close['ours int8']:.4f}, the loop's {close['floor int8']:.4f}"
    )
    figure.supxlabel(caption, fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def started(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the median seconds from process start to the first answer, all in one environment."""
    found = results["startup"]["details"][DEVELOPMENT]["seconds"]
    return {name: _median(found[name]) for name in _ORDER if name in found}


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _panel(axis: Axes, found: Mapping[str, float], title: str) -> None:
    names = list(found)[::-1]
    colors = [_OURS if name.startswith("ours") else _FLOOR if name.startswith("floor") else _PEER for name in names]
    labels = [name.removeprefix("mlflow.") for name in names]
    drawn = axis.barh(labels, [found[name] for name in names], color=colors)
    axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8, left=False)
    axis.set_xticks([])
    axis.margins(x=0.18)
    axis.spines[:].set_visible(False)


if __name__ == "__main__":
    raise SystemExit(main())
