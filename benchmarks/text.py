"""All figures of the issue, measured here: ``python -m benchmarks.text`` prints a table and writes JSON.

Everything about latency runs in one process, in turn; only ratios between calls of the same round mean something on a
machine that others use, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# Before anything imports them: no calls home, no progress bars through the table.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from benchmarks import floor, footprint, latency, ours, peers, startup
from benchmarks.report import Figure, Results, say, table, write_json

RESULTS = Path(__file__).parent / "results" / "text.json"
PARTS = ("logging", "text", "startup")
_MODEL_NOTE = "model.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 0 whether or not goals are met: a missed one is in the table."""
    options = _options(arguments)
    parts = options.only or PARTS
    results = Results()
    with _workplace(options.work) as work:
        model = _model(work, results, fresh="logging" in parts)
        if {"text", "startup"} & set(parts):
            say("peers and floor: saving and exporting")
            peers.prepare(work)
            floor.prepare(work)
        if "text" in parts:
            say("latency: ours, peers and floor in turn")
            results.add("latency", *latency.measure(work, model, quick=options.quick))
        if "startup" in parts:
            say("process start: children in turn")
            results.add("startup", *startup.measure(work, model, rounds=1 if options.quick else 5))
            results.add("environment", *footprint.measure(startup.serving_folder(work)))
    print(table(results.figures))
    print(_verdict(results))
    if path := options.out or (None if options.quick or options.only else RESULTS):
        write_json(results, path)
        say(f"written to {path}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: few rounds and texts; writes no JSON without --out"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=PARTS,
        help="run this part only (may be repeated); writes no JSON without --out, where other parts are kept",
    )
    parser.add_argument(
        "--out", type=Path, help=f"JSON file to write (default: {RESULTS.relative_to(Path(__file__).parents[1])})"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for models that is kept and used again (default: a temporary one)"
    )
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _workplace(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="tdeploy-bench-") as folder:
        yield Path(folder)


def _model(work: Path, results: Results, *, fresh: bool) -> Path:
    """Return the logged model; logged anew where logging is measured or none is there."""
    note = work / _MODEL_NOTE
    if not fresh and note.exists():
        return Path(note.read_text())
    say("log_model: export, fuse, quantize, verify")
    folder, times = ours.log(work / "ours")
    note.write_text(str(folder))
    results.add("logging", ours.logging_figures(times), times)
    return folder


def _verdict(results: Results) -> str:
    goals = [figure for figure in results.figures if figure.goal is not None]
    missed: list[Figure] = results.missed
    names = "".join(f"\n  missed: {figure.name}" for figure in missed)
    return f"\n{len(goals) - len(missed)} of {len(goals)} goals met on this machine{names}"


if __name__ == "__main__":
    raise SystemExit(main())
