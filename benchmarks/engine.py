"""TensorRT engines built on this machine: ``python -m benchmarks.engine`` prints a table and writes JSON.

They are built for real by TensorRT-RTX, which needs no GPU to build, through the builder of this package; on a machine
without a GPU none is run, so nothing here says how fast they are or whether they answer rightly. Each build has a
process of its own, whose peak memory counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Figure, Results, say, table, write_json
from mlflow_tdeploy.core.records import to_json
from mlflow_tdeploy.runtime import probe

RESULTS = Path(__file__).parent / "results" / "engine.json"

_BUILD = """
import json, sys, time
from pathlib import Path
import tensorrt_rtx
from mlflow_tdeploy.build.engine import build_engine
from mlflow_tdeploy.build.engine_options import EngineOptions
from mlflow_tdeploy.core.records import from_json
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.runtime import probe
graph, plan, host = Path(sys.argv[1]), Path(sys.argv[2]), probe.host()
signature = from_json(Signature, sys.argv[3], "argument")
def peak():  # ru_maxrss would count the parent's memory, too
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
before, begin = peak(), time.perf_counter()
record = build_engine(tensorrt_rtx, graph, plan, signature, host, EngineOptions(module="tensorrt_rtx"))
print(json.dumps({"seconds": time.perf_counter() - begin, "before_mib": before, "peak_mib": peak(),
                  "plan_mb": plan.stat().st_size / 1e6, "version": record.version}))
"""


def main(arguments: list[str] | None = None) -> int:
    """Build every graph, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="builds of each engine; the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args(arguments)
    results = Results()
    with tempfile.TemporaryDirectory(prefix="tdeploy-engines-") as work:
        figures, details = measure(Path(work), options.rounds)
    results.add("engines", figures, details)
    print(table(results.figures))
    where = f"on {gpu.name}" if (gpu := probe.gpu()[0]) else f"without a GPU ({probe.gpu()[1]}): none was run"
    print(f"\nTensorRT-RTX {details['version']}, built {where}")
    write_json(results, options.out)
    say(f"written to {options.out}")
    return 0


def measure(work: Path, rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """Build every graph ``rounds`` times, in turn."""
    from benchmarks.engine_graphs import make_graphs, sources

    figures: list[Figure] = []
    details: dict[str, Any] = {"version": "", "builds": {}}
    for index, (name, model, arguments) in enumerate(sources()):
        say(f"{name}: export, half precision, calibration")
        signature, graphs = make_graphs(model, arguments, work / str(index))
        builds: dict[str, list[dict[str, Any]]] = {precision: [] for precision in graphs}
        say(f"{name}: {rounds} builds of {len(graphs)} engines")
        for _ in range(rounds):
            for precision, graph in graphs.items():
                builds[precision].append(_build(graph, graph.with_suffix(".plan"), to_json(signature)))
        for precision, runs in builds.items():
            figures += _figures(f"{name}, {precision}", runs, graphs[precision])
            details["builds"][f"{name}, {precision}"] = runs
            details["version"] = runs[0]["version"]
    return figures, details


def _build(graph: Path, plan: Path, signature: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(graph), str(plan), signature], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"building {graph} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _figures(name: str, runs: list[dict[str, Any]], graph: Path) -> list[Figure]:
    size = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*")) / 1e6
    return [
        Figure(f"{name}: time to build", median(run["seconds"] for run in runs), "s"),
        Figure(
            f"{name}: peak memory", median(run["peak_mib"] for run in runs), "MiB",
            note=f"{median(run['before_mib'] for run in runs):.0f} MiB before the build",
        ),
        Figure(
            f"{name}: plan", runs[0]["plan_mb"], "MB", note=f"of a graph of {size:.0f} MB"
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
