"""The report's pictures: how close variants are, how good at which speed, and how long over sizes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlflow_tdeploy.core.budget import higher_is_better, is_metric
from mlflow_tdeploy.core.evidence import SWEEP, Evidence, latest_accuracy
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.registry_io.plot import Point, can_draw, draw
from mlflow_tdeploy.store.bundle import Bundle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORST, _MEAN = "#d1495b", "#2a7f9e"
#: Told apart by everybody, on paper too (https://jfly.uni-koeln.de/color/).
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: 1 - cosine below this is rounding.
_NOTHING = 1e-9
#: Panels beside each other, and lines in each.
_PANELS = 3


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        name: Of its file, without an ending.
        title: What it shows.
        told: The same in words, for who does not see it.
        figure: The picture.
    """

    name: str
    title: str
    told: str
    figure: Figure

    def png(self) -> bytes:
        """Return it as PNG."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """Return it as an ``svg`` element whose text is text."""
        import matplotlib as mpl

        buffer = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]


def plots(bundle: Bundle) -> list[Plot]:
    """Return the pictures that the model's evidence is enough for; none without matplotlib."""
    if not can_draw():
        return []
    found = (_closeness(bundle), _trade(bundle), _sizes(bundle))
    return [one for one in found if one is not None]


def _closeness(bundle: Bundle) -> Plot | None:
    known: dict[str, Mapping[str, float]] = {}
    for name in bundle.variants:
        record = latest_accuracy(bundle.evidence(name))
        if record is not None and {"worst_cosine", "mean_cosine"} <= set(record.metrics):
            known[name] = record.metrics
    if not known:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.42 * len(known)), layout="constrained")
    axis = figure.subplots()
    for row, metrics in enumerate(known.values()):
        worst, mean = (max(1.0 - metrics[one], _NOTHING) for one in ("worst_cosine", "mean_cosine"))
        axis.plot([mean, worst], [row, row], color="#c8ccd2", linewidth=2, zorder=1)
        axis.plot([mean], [row], "o", color=_MEAN, label="mean" if row == 0 else None)
        axis.plot([worst], [row], "o", color=_WORST, label="worst" if row == 0 else None)
    for limit in bundle.manifest.budget.limits:
        if limit.metric == "worst_cosine":
            axis.axvline(
                max(1.0 - limit.bound, _NOTHING), color="#555555", linewidth=0.8, linestyle="--", label="budget"
            )
    axis.set_xscale("log")
    axis.set_yticks(range(len(known)), list(known), fontsize=8)
    axis.set_ylim(len(known) - 0.5, -0.5)
    axis.margins(x=0.1)
    axis.set_xlabel("1 − cosine to the original's answer, over all that was asked (left is closer)", fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="best")
    axis.spines[["top", "right"]].set_visible(False)
    told = "; ".join(
        f"{name}: worst {one['worst_cosine']:.6f}, mean {one['mean_cosine']:.6f}" for name, one in known.items()
    )
    return Plot("closeness", "How close each variant is to the original", f"Cosines. {told}.", figure)


def _trade(bundle: Bundle) -> Plot | None:
    """Draw accuracy, or what the budget limits first, against the time of a batch at the usual sizes."""
    manifest = bundle.manifest
    quality = TASKS.get(manifest.task).quality if manifest.task in TASKS else ()
    wanted = [*quality, *(limit.metric for limit in manifest.budget.limits), "worst_cosine"]
    accuracy = {name: latest_accuracy(bundle.evidence(name)) for name in bundle.variants}
    metric = next(
        (one for one in wanted if any(record and one in record.metrics for record in accuracy.values())), None
    )
    latencies = {name: [one for one in bundle.evidence(name) if _is_timed(one)] for name in bundle.variants}
    newest = max((one for some in latencies.values() for one in some), key=lambda one: one.created, default=None)
    if metric is None or newest is None or newest.host is None:
        return None
    host, points = newest.host.kind, []
    for name, record in accuracy.items():
        times = [one for one in latencies[name] if one.host is not None and one.host.kind == host]
        if times and record is not None and metric in record.metrics:
            time = max(times, key=lambda one: one.created).metrics["p50_ms"]
            points.append(Point(name, time, record.metrics[metric], good=record.passed is True))
    if not points:
        return None
    better = "" if not is_metric(metric) else " (up is better)" if higher_is_better(metric) else " (down is better)"
    limit = next((one for one in manifest.budget.limits if one.metric == metric), None)
    figure = draw(points, x="ms for a batch of the usual size, median", y=f"{metric}{better}",
                  limit=limit, named=True)  # fmt: skip
    told = "; ".join(f"{one.name}: {one.x:.2f} ms, {one.y:.6g}" for one in points)
    return Plot("speed", f"{metric} against speed, on {host}", f"{told}.", figure)


def _is_timed(record: Evidence) -> bool:
    return record.kind == "latency" and "p50_ms" in record.metrics


def _sizes(bundle: Bundle) -> Plot | None:
    """Draw the newest medians of each variant over length, a panel for each batch; over the batch where that is all.

    Of one host: that of the newest measurement.
    """
    every = [one for name in bundle.variants for one in bundle.evidence(name) if _is_sweep(one)]
    if not every:
        return None
    host = max(every, key=lambda one: one.created).host
    mine = sorted(
        (one for one in every if one.host and host and one.host.kind == host.kind), key=lambda one: one.created
    )
    newest = {(one.variant, str(one.settings.get("runtime", ""))): one for one in mine}
    runtimes = Counter(variant for variant, _ in newest)
    names = {key: key[0] if runtimes[key[0]] == 1 else " on ".join(key) for key in newest}
    rows = [
        (names[key], row["shape"], float(row["p50_ms"])) for key, one in newest.items() for row in one.settings["rows"]
    ]
    over = "sequence" if any("sequence" in shape for _, shape, _ in rows) else "batch"
    panels = sorted({shape.get("batch", 0) for _, shape, _ in rows})[:_PANELS] if over == "sequence" else [None]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, batch in zip(axes, panels, strict=True):
        _panel(axis, [row for row in rows if batch is None or row[1].get("batch", 0) == batch], over)
        axis.set_title("" if batch is None else f"batch {batch}", fontsize=9)
        axis.set_xlabel("tokens" if over == "sequence" else "batch", fontsize=8)
    axes[0].set_ylabel("ms, median", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False, loc="best")
    told = "; ".join(f"{name} at {_said(shape)}: {ms:.2f} ms" for name, shape, ms in rows)
    return Plot("sizes", f"Time over sizes, on {host.kind if host else 'a host'}", f"{told}.", figure)


def _panel(axis: Any, rows: Sequence[tuple[str, Mapping[str, int], float]], over: str) -> None:
    names = list(dict.fromkeys(name for name, _, _ in rows))
    for index, name in enumerate(names):
        points = sorted((shape.get(over, 1), ms) for one, shape, ms in rows if one == name)
        axis.plot(*zip(*points, strict=True), "o-", color=_LINES[index % len(_LINES)], markersize=4, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({shape.get(over, 1) for _, shape, _ in rows})
    axis.set_xticks(ticks, [str(one) for one in ticks], fontsize=8)
    axis.minorticks_off()
    axis.grid(visible=True, color="#e6e8eb", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _is_sweep(record: Evidence) -> bool:
    return record.kind == SWEEP and bool(record.settings.get("rows"))


def _said(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in shape.items()) or "its only size"
