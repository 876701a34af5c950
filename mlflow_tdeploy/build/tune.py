"""Which fusions pay on this kind of host, measured.

A fused operator is not always the faster one: ONNX Runtime's CPU kernel for SkipLayerNormalization takes about four
times as long as the Add and LayerNormalization it replaces. So a graph is measured with every fusion and without
each one, interleaved; what does not pay is left out. So is a fusion that makes a graph which cannot be opened: the
fusers' patterns also match in models that they do not fit, such as GPT-2's.

Two kinds of fusion differ in where they are switched: those the builder writes into the graph, and those that ONNX
Runtime does itself whenever a session opens, which the variant's session hints switch off.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.build.graphs import CPU_FUSIONS, SESSION_OPTIMIZERS, fuse_for_ort
from mlflow_tdeploy.build.recipes._base import Graph, Measure, Opens
from mlflow_tdeploy.core.errors import NoVariantError, SessionError
from mlflow_tdeploy.core.measure import ratio

#: A fusion goes when the graph without it is faster by more than this share.
GAIN = 0.02
#: Seconds for all measurements of a graph.
SECONDS = 3.5
#: Fusions that a session does itself and that can be slower than what they replace.
_IN_SESSION = ("skip_layer_norm", "bias_gelu")
#: Fusions in the graph itself that are worth questioning; the others only spell standard operators.
_IN_GRAPH = ("attention", "packed_qkv", "rotary_embedding", "skip_rms_norm")
#: What is left out first of a graph that cannot be opened.
_SUSPECTS = ("packed_qkv", *(kind for kind in _IN_GRAPH if kind != "packed_qkv"))
#: What goes with another one.
_IMPLIED = {"attention": ("packed_qkv",)}
_ALL = "all"

#: A step from one ONNX file to another.
Convert = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Fused:
    """The chosen graph.

    Attributes:
        path: The graph.
        session: Hints that keep ONNX Runtime from fusing again what was left out.
        settings: What was fused, left out and measured, for the precision record.
        fusions: The kinds that were fused in the graph's file, or would have been.
    """

    path: Path
    session: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    fusions: frozenset[str] = frozenset()


def choose_fusions(
    parent: Graph,
    workdir: Path,
    measure: Measure | None,
    *,
    fusions: Collection[str] = CPU_FUSIONS,
    question: Collection[str] = _IN_GRAPH,
    convert: Convert | None = None,
    trial: Opens | None = None,
    seconds: float = SECONDS,
) -> Fused:
    """Fuse a portable graph for ONNX Runtime's CPU provider.

    Args:
        parent: The portable graph.
        workdir: Where graphs are written; only the chosen one is left.
        measure: Times graphs on this host; None leaves out what is known to be slow on CPUs.
        fusions: What to fuse in the graph.
        question: Which of these to hold against the graph without them.
        convert: What is done to each fused graph before it is measured, such as quantization.
        trial: Says why a graph cannot be opened; None trusts every fusion.
        seconds: For the measurements.

    Raises:
        SessionError: A graph cannot be opened, whatever is left out.
    """
    bench = _Bench(parent, workdir, frozenset(fusions) - set(_IN_SESSION), convert)
    counts = bench.counts
    kinds = [*(kind for kind in _IN_GRAPH if kind in question and counts.get(kind)), *_IN_SESSION]
    dropped, settings, broken = _left_out(bench, kinds, measure, trial, seconds)
    if broken:
        settings["cannot_be_opened_with"] = broken
    chosen = bench.without(dropped)
    path = bench.keep(chosen)
    gone = _with_implied(dropped)
    settings |= {"fused": {kind: n for kind, n in counts.items() if kind not in gone}, "left_out": sorted(dropped)}
    return Fused(path, chosen.session, settings, bench.fusions - gone)


def _left_out(
    bench: _Bench, kinds: Sequence[str], measure: Measure | None, trial: Opens | None, seconds: float
) -> tuple[tuple[str, ...], dict[str, Any], dict[str, str]]:
    """Return what to leave out, the ratios that say so, and what cannot be opened and why.

    Graphs are tried only after a measurement failed: nearly always all of them open.
    """
    if measure is None:
        broken = _broken(bench, trial)
        return (*_IN_SESSION, *broken), {"measured": False}, broken
    try:
        return *_measured(bench, kinds, measure, seconds), {}
    except (SessionError, NoVariantError):
        if trial is None:
            raise
    broken = _broken(bench, trial)
    left = [kind for kind in kinds if kind not in _with_implied(broken)]
    left = [kind for kind in left if trial(bench.without((*broken, kind))) is None]
    return *_measured(bench, left, measure, seconds, tuple(broken)), broken


def _broken(bench: _Bench, trial: Opens | None) -> dict[str, str]:
    """Return the fusions without which the graph can be opened, as few as possible, and why it cannot with them."""
    why = None if trial is None else trial(bench.without(()))
    if trial is None or why is None:
        return {}
    suspects = [*(kind for kind in _SUSPECTS if kind in bench.fusions), *sorted(bench.fusions - set(_SUSPECTS))]
    together = [tuple(suspects[: count + 1]) for count in range(1, len(suspects))]
    for kinds in (*((kind,) for kind in suspects), *together):
        if trial(bench.without(kinds)) is None:
            return dict.fromkeys(kinds, why)
    raise SessionError(f"The graph cannot be opened with fused operators nor without: {why}")


def _measured(
    bench: _Bench, kinds: Sequence[str], measure: Measure, seconds: float, broken: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return what to leave out, ``broken`` among it, and the ratios that say so."""
    started = time.perf_counter()
    graphs = {_ALL: bench.without(broken), **{kind: bench.without((*broken, kind)) for kind in kinds}}
    ratios = _ratios(measure(graphs, seconds * 2 / 3), kinds)
    slow = sorted((kind for kind in kinds if _overall(ratios[kind]) < 1 - GAIN), key=lambda k: _overall(ratios[k]))
    dropped = tuple(slow)
    if len(slow) > 1:  # each alone pays; whether both do is another question
        pair = {_ALL: bench.without((*broken, slow[0])), "+".join(slow): bench.without((*broken, *slow))}
        both = _ratios(measure(pair, seconds / 3), ["+".join(slow)])
        name = f"{'+'.join(slow)} against {slow[0]}"
        ratios[name] = both["+".join(slow)]
        if _overall(ratios[name]) > 1:
            dropped = (slow[0],)
    took = round(time.perf_counter() - started, 1)
    rounded = {kind: {shape: round(x, 3) for shape, x in shapes.items()} for kind, shapes in ratios.items()}
    return (*broken, *dropped), {"measured": True, "time_without_over_with": rounded, "seconds": took}


def _ratios(samples: Mapping[str, Mapping[str, list[float]]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: {shape: ratio(by_name, name, _ALL) for shape, by_name in samples.items()} for name in names}


def _overall(ratios: Mapping[str, float]) -> float:
    """Return one figure for all shapes, each of the same weight."""
    return float(np.exp(np.mean(np.log(list(ratios.values())))))


class _Bench:
    """Graphs with and without fusions, each file written once."""

    def __init__(self, parent: Graph, workdir: Path, fusions: frozenset[str], convert: Convert | None) -> None:
        self._parent = parent
        self._workdir = workdir
        self._convert = convert
        self._files: dict[frozenset[str], Path] = {}
        # What sessions fuse themselves stays out of the file: one file serves both choices.
        self.fusions = fusions
        self.counts = self._fuse(fusions)

    def without(self, left_out: Sequence[str]) -> Graph:
        """Return the graph without some fusions."""
        fusions = self.fusions - _with_implied(left_out)
        if fusions not in self._files:
            self._fuse(fusions)
        disabled = [SESSION_OPTIMIZERS[kind] for kind in sorted(left_out) if kind in SESSION_OPTIMIZERS]
        return Graph(
            self._files[fusions], self._parent.precision, {"disabled_optimizers": disabled} if disabled else {}
        )

    def keep(self, chosen: Graph) -> Path:
        """Remove every other file and return the chosen one's path."""
        for path in self._files.values():
            if path != chosen.path:
                shutil.rmtree(path.parent)
        return chosen.path

    def _fuse(self, fusions: frozenset[str]) -> dict[str, int]:
        path = self._workdir / f"fused-{len(self._files)}" / "model.onnx"
        path.parent.mkdir(parents=True)
        counts = fuse_for_ort(self._parent.path, path, fusions=fusions)
        if self._convert is not None:
            converted = self._workdir / f"converted-{len(self._files)}" / "model.onnx"
            converted.parent.mkdir(parents=True)
            self._convert(path, converted)
            shutil.rmtree(path.parent)
            path = converted
        self._files[fusions] = path
        return counts


def _with_implied(kinds: Collection[str]) -> set[str]:
    return {*kinds, *(implied for kind in kinds for implied in _IMPLIED.get(kind, ()))}
