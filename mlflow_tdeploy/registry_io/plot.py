"""Accuracy against speed, as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlflow_tdeploy.core.budget import Limit

#: So many names find room beside their points; more are listed, by number.
_BESIDE = 5
_GOOD, _BAD, _CHOSEN = "#2a7f9e", "#b9bec6", "#d1495b"


@dataclass(frozen=True)
class Point:
    """One graph, or one variant.

    Attributes:
        name: What it is.
        x: How long it takes.
        y: How close, or how good, it is.
        good: Whether it is within the budget.
        chosen: Whether it is the one that was taken.
    """

    name: str
    x: float
    y: float
    good: bool = True
    chosen: bool = False


def can_draw() -> bool:
    """Tell whether matplotlib is here: mlflow needs it, mlflow-skinny does not."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(points: Sequence[Point], *, x: str, y: str, limit: Limit | None = None, named: bool = False) -> Figure:
    """Return the picture.

    Args:
        points: What to show, at least one.
        x: What their x is.
        y: What their y is.
        limit: Of the budget, drawn as a line.
        named: Whether each has its name beside it, or, of many, its number; else the chosen one alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    named_points = [one for one in points if named or one.chosen]
    numbered = len(named_points) > _BESIDE
    numbers = {id(one): number for number, one in enumerate(named_points, start=1)}
    for one in points:
        label = f"{numbers[id(one)]}  {one.name}" if numbered and id(one) in numbers else None
        color = _CHOSEN if one.chosen else _GOOD if one.good else _BAD
        axis.plot([one.x], [one.y], "o", color=color, markersize=8 if one.chosen else 6, label=label)
    for number, (one, lines) in enumerate(zip(named_points, _stacked(named_points), strict=True), start=1):
        name = str(number) if numbered else one.name
        axis.annotate(name, (one.x, one.y), (6, 5 + 10 * lines), textcoords="offset points", fontsize=8)
    if numbered:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if limit is not None:
        axis.axhline(limit.bound, color="#555555", linewidth=0.8, linestyle="--")
        axis.annotate(
            f"budget: {limit}", (0, limit.bound), (4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=8, color="#555555",
        )  # fmt: skip
    axis.margins(y=0.2)
    axis.set_xlim(0, 1.2 * max(one.x for one in points) or None)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _stacked(points: Sequence[Point]) -> list[int]:
    """Return by how many lines each name is lifted, so that those of points side by side are not on each other."""
    wide = max(one.x for one in points) if points else 0.0
    high = max(one.y for one in points) - min(one.y for one in points) if points else 0.0
    lifted: list[int] = []
    for index, one in enumerate(points):
        near = (
            lines
            for other, lines in zip(points[:index], lifted, strict=True)
            if abs(one.x - other.x) < wide / 3 and abs(one.y - other.y) <= high / 12
        )
        lifted.append(1 + max(near, default=-1))
    return lifted
