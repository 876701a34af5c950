"""Encoders on a GPU: ``python -m benchmarks.gpu`` prints a table and writes JSON.

PyTorch, ONNX Runtime's CUDA provider and TensorRT, each in a process of its own, on the same fresh inputs, first
compared with full precision on the CPU. What cannot be had on a machine is listed as not measured, with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_contestants import CONTESTANTS, PREFIX, told
from benchmarks.gpu_models import ENCODERS, SHAPES, TINY, Encoder, Shape, make_graphs, reference
from benchmarks.report import Figure, Results, say, table, write_json
from mlflow_tdeploy.core.errors import first_line
from mlflow_tdeploy.runtime import probe

RESULTS = Path(__file__).parent / "results" / "gpu.json"
#: Goals: how many times faster than PyTorch in full precision, by contestant and shape.
_GOALS: dict[tuple[str, Shape], float] = {
    ("TensorRT", (1, 16)): 10,
    ("TensorRT", (16, 384)): 5,
    ("ORT-CUDA fp16", (1, 16)): 4,
    ("ORT-CUDA fp16", (16, 384)): 4,
}
_BASE = "PyTorch fp32"
#: What a session may add to a bare call, in microseconds.
_SESSION_GOAL = 20.0

_CEILINGS = """
import json, sys, time, torch
device, size = sys.argv[1], int(sys.argv[2])
def wait():
    torch.cuda.synchronize() if device == "cuda" else None
def best(call):
    call(); wait(); times = []
    for _ in range(10):
        begin = time.perf_counter(); call(); wait(); times.append(time.perf_counter() - begin)
    return min(times)
found = {}
for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
    a = torch.randn(size, size, device=device, dtype=dtype)
    found[name] = 2 * size ** 3 / best(lambda: a @ a)
a = torch.empty(size * size * 16, dtype=torch.uint8, device=device); b = torch.empty_like(a)
found["bytes"] = 2 * a.numel() / best(lambda: b.copy_(a))
print(json.dumps(found))
"""


class Bench:
    """One run of the benchmark.

    Args:
        folder: Where graphs, references and engines are made.
        device: ``cuda``, or ``cpu`` for a smoke run.
        shapes: Batch and tokens of the calls.
        minutes: When this time has passed, what is left is not measured.
    """

    def __init__(self, folder: Path, device: str, shapes: Iterable[Shape], minutes: float) -> None:
        self._folder = folder
        self._device = device
        self._shapes = list(shapes)
        self._end = time.monotonic() + 60 * minutes
        self.rows: dict[tuple[str, str, Shape], dict[str, Any]] = {}
        self.missing: dict[tuple[str, str], str] = {}

    def run(self, encoder: Encoder) -> None:
        """Measure every contestant on one encoder."""
        folder = self._folder / encoder.name.replace(" ", "-")
        if time.monotonic() >= self._end:
            self.missing |= {(encoder.name, contestant): "the time was over" for contestant in CONTESTANTS}
            return
        folder.mkdir(parents=True)
        say(f"{encoder.name}: answers in full precision on the CPU")
        self._references(encoder, folder)
        graphs = self._graphs(encoder, folder)
        for contestant in CONTESTANTS:
            if graphs and not contestant.startswith(("PyTorch", "torch")):
                self.missing[encoder.name, contestant] = graphs
                continue
            say(f"{encoder.name}: {contestant}")
            self._contestant(contestant, encoder, folder)

    def _references(self, encoder: Encoder, folder: Path) -> None:
        module, seed = encoder.module(), time.time_ns() % 2**32  # fresh inputs every time
        for index, shape in enumerate(self._shapes):
            feeds = encoder.feeds(shape, seed + index)
            arrays: dict[str, Any] = {"answer": reference(module, feeds), **feeds}
            np.savez(folder / f"reference-{shape[0]}x{shape[1]}.npz", **arrays)

    def _graphs(self, encoder: Encoder, folder: Path) -> str:
        """Make the graphs; returns why there are none."""
        try:
            make_graphs(encoder, folder)
        except Exception as error:  # one package less costs the rows that need it
            return f"no graph: {type(error).__name__}: {first_line(error)}"
        return ""

    def _contestant(self, contestant: str, encoder: Encoder, folder: Path) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            self.missing[encoder.name, contestant] = "the time was over"
            return
        argument = told(contestant, encoder, folder, self._device, self._shapes)
        command = [sys.executable, "-m", "benchmarks.gpu_contestants", argument]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            try:
                code = subprocess.run(command, stdout=out, stderr=err, timeout=left, check=False).returncode
            except subprocess.TimeoutExpired:
                code, why = 0, "the time was over"
            else:
                err.seek(0)
                why = _why(code, err.read())
            out.seek(0)
            for line in out.read().splitlines():
                if line.startswith(PREFIX):  # libraries print, too
                    row = json.loads(line.removeprefix(PREFIX))
                    self.rows[encoder.name, contestant, tuple(row.pop("shape"))] = row
        if why:
            self.missing[encoder.name, contestant] = why


def _why(code: int, stderr: str) -> str:
    if code == 0:
        return ""
    lines = stderr.strip().splitlines()
    return f"signal {-code}" if code < 0 else lines[-1] if lines else f"exit status {code}"


def main(arguments: list[str] | None = None) -> int:
    """Measure everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.5, help="when they are over, the rest is not measured")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU; writes no JSON without --out")
    parser.add_argument("--out", type=Path, help=f"JSON file to write (default: {RESULTS.name} below results/)")
    options = parser.parse_args(arguments)
    gpu, why = probe.gpu()
    device = "cpu" if options.smoke else "cuda"
    if gpu is None and not options.smoke:
        print(f"not measured: {why}. --smoke runs what a CPU can on a tiny model.")
        return 0
    with tempfile.TemporaryDirectory(prefix="tdeploy-gpu-") as folder:
        bench = Bench(Path(folder), device, [(1, 16), (2, 24)] if options.smoke else SHAPES, options.minutes)
        ceilings = _ceilings(device, 512 if options.smoke else 8192)
        encoders = (TINY,) if options.smoke else ENCODERS
        path = options.out or (None if options.smoke else RESULTS)
        for encoder in encoders:
            bench.run(encoder)
            figures = figures_of(encoders, bench, ceilings)
            results = Results()
            results.add("gpu" if device == "cuda" else "smoke", figures, details_of(bench, ceilings))
            if path:  # after each: whoever ends this process early keeps what there is
                write_json(results, path)
    print(table(figures))
    if options.smoke:
        print("A smoke run on the CPU, whatever the names say: its figures mean nothing.")
    for (encoder_name, contestant), reason in bench.missing.items():
        print(f"not measured: {encoder_name}, {contestant}: {reason}")
    if path:
        say(f"written to {path}")
    return 0


def _ceilings(device: str, size: int) -> dict[str, float]:
    """Return operations per second by precision and bytes per second that this device reaches; empty where unknown."""
    child = probe.run_child(_CEILINGS, device, str(size), timeout=120)
    if not child.ok:
        say(f"no ceilings: {child.reason}")
        return {}
    found: dict[str, float] = json.loads(child.output.splitlines()[-1])
    return found


def figures_of(encoders: Iterable[Encoder], bench: Bench, ceilings: Mapping[str, float]) -> list[Figure]:
    """Return the rows of the table: time, ratio to PyTorch, share of the roofline, distance to the reference."""
    found = []
    for encoder in encoders:
        for (name, contestant, shape), row in bench.rows.items():
            if name == encoder.name:
                found += _row_figures(encoder, contestant, shape, row, bench, ceilings)
    return found


def _row_figures(
    encoder: Encoder, contestant: str, shape: Shape, row: Mapping[str, Any], bench: Bench, ceilings: Mapping[str, float]
) -> list[Figure]:
    title = f"{encoder.name}, {shape[0]} x {shape[1]}, {contestant}"
    note = f"worst cosine {row['worst_cosine']:.6f}"
    if limit := _roofline(encoder, contestant, shape, ceilings):
        note += f"; roofline {limit:.3f} ms, {100 * limit / row['p50_ms']:.0f} % of it reached"
    figures = [Figure(title, row["p50_ms"], "ms", note=note)]
    base = bench.rows.get((encoder.name, _BASE, shape))
    if base is not None and contestant != _BASE:
        goal = _goal(contestant, shape)
        figures.append(Figure(f"{title}: faster than {_BASE}", base["p50_ms"] / row["p50_ms"], "x", goal, "at least"))
    if (bare := row.get("bare_p50_ms")) is not None:
        goal = _SESSION_GOAL if shape == SHAPES[0] else None
        figures.append(Figure(f"{title}: our session adds", (row["p50_ms"] - bare) * 1e3, "us", goal))
    return figures


def _goal(contestant: str, shape: Shape) -> float | None:
    family = "TensorRT" if contestant in ("TensorRT fp16", "TensorRT-RTX fp16") else contestant
    return _GOALS.get((family, shape))


def _roofline(encoder: Encoder, contestant: str, shape: Shape, ceilings: Mapping[str, float]) -> float | None:
    """Return the milliseconds below which no kernel can be: operations and bytes over what this device reaches."""
    width = CONTESTANTS[contestant][2]
    peak, bandwidth = ceilings.get("fp16" if width == 2 else "fp32"), ceilings.get("bytes")
    if not peak or not bandwidth or not math.isfinite(peak):
        return None
    return 1e3 * max(encoder.operations(shape) / peak, encoder.traffic(shape, width) / bandwidth)


def details_of(bench: Bench, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Return everything that was measured, as plain values."""
    return {
        "ceilings": dict(ceilings),
        "rows": [
            {"model": model, "contestant": contestant, "batch": shape[0], "tokens": shape[1], **row}
            for (model, contestant, shape), row in bench.rows.items()
        ],
        "not_measured": [{"model": m, "contestant": c, "why": why} for (m, c), why in bench.missing.items()],
    }


if __name__ == "__main__":
    raise SystemExit(main())
