"""NVIDIA's perf_analyzer as a client of its own making: is our load client's figure one that another client finds?

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/perf_analyzer/docs/README.html. The program
is in the wheel ``tritonclient==2.51.0`` for manylinux1 (later ones want a newer glibc); it needs Debian's ``libb64-0d``
and the CUDA runtime, which the wheel with the server has.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Figure, say

_WHEEL, _LIBRARY = "tritonclient==2.51.0", "libb64-0d"
#: Windows that have to agree, and how far apart they may be in percent: figures are compared in one run.
_TRIALS, _APART = 3, 200


def figures(
    triton: Any, server: Any, asked: Sequence[tuple[str, str, str]], texts: Sequence[str], clients: Sequence[int],
    seconds: float,
) -> tuple[list[Figure], dict[str, Any]]:  # fmt: skip
    """Have it ask models that were asked before; nothing where it cannot be had.

    Args:
        triton: The server that runs.
        server: What that is.
        asked: Protocol, model and input of each; the first two are held against each other.
        texts: What to ask.
        clients: How many requests are under way at once, each in turn.
        seconds: Length of each of its windows.
    """
    on_path, home = shutil.which("perf_analyzer"), Path(os.environ["TDEPLOY_TRITON_HOME"])
    wheel = server.wheel
    program = Path(on_path) if on_path else find(home, wheel / "nvidia_pytriton.libs") if wheel else None
    if program is None:
        return [], {}
    addresses = {"http": f"127.0.0.1:{triton.http}", "grpc": f"127.0.0.1:{triton.grpc}"}
    found: dict[str, dict[int, dict[str, float]]] = {}
    for protocol, model, name in asked:
        say(f"perf_analyzer: {model} over {protocol}")
        found[f"{model}, {protocol}"] = {
            one: measure(program, addresses[protocol], protocol, model, name, texts, one, seconds) for one in clients
        }
    rates = [loads[clients[-1]]["requests_per_s"] for loads in found.values()]
    name = f"{clients[-1]} clients, beside the layout of transformer-deploy, by perf_analyzer"
    made = [Figure(name, rates[0] / rates[1], "x")]
    for place, loads in found.items():
        for many, one in loads.items():
            note = f"p50 {one['p50_ms']:.1f} ms, p99 {one['p99_ms']:.1f} ms"
            name = f"  perf_analyzer, {place}, {many} clients"
            made.append(Figure(name, one["requests_per_s"], "requests/s", note=note))
    return made, found


def find(home: Path, libraries: Path) -> Path | None:
    """Return the program, put together below a folder once; None where its parts cannot be had.

    Args:
        home: The folder.
        libraries: Where the server's wheel has its libraries.
    """
    folder = home / "perf_analyzer"
    program = folder / "perf_analyzer"
    if program.is_file():
        return program
    try:
        with tempfile.TemporaryDirectory() as work:
            _put_together(Path(work), folder, libraries)
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"perf_analyzer cannot be had here: {error!r}", file=sys.stderr)
        return None
    return program


def measure(
    program: Path,
    address: str,
    protocol: str,
    model: str,
    name: str,
    texts: Sequence[str],
    clients: int,
    seconds: float,
) -> dict[str, float]:
    """Have it ask a model for texts, one a request.

    Args:
        program: What :func:`find` returned.
        address: Host and port.
        protocol: ``http`` or ``grpc``.
        model: The model.
        name: Its input.
        texts: What to ask.
        clients: How many requests are under way at once.
        seconds: Length of each of its windows.

    Returns:
        ``requests_per_s``, ``p50_ms`` and ``p99_ms``.
    """
    with tempfile.TemporaryDirectory() as work:
        data, table = Path(work) / "data.json", Path(work) / "out.csv"
        data.write_text(json.dumps({"data": [{name: {"content": [text], "shape": [1]}} for text in texts]}))
        done = subprocess.run(
            [
                str(program), "-m", model, "-u", address, "-i", protocol, "--input-data", str(data), "-f", str(table),
                "--concurrency-range", str(clients), "--measurement-interval", str(int(seconds * 1000)),
                "--max-trials", str(_TRIALS), "-s", str(_APART),
            ],
            env={**os.environ, "LD_LIBRARY_PATH": str(program.parent)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or not table.is_file():
            raise RuntimeError(f"perf_analyzer found nothing: {done.stdout[-500:]}{done.stderr[-500:]}")
        (row,) = csv.DictReader(table.read_text().splitlines())
    return {
        "requests_per_s": float(row["Inferences/Second"]),
        "p50_ms": float(row["p50 latency"]) / 1e3,
        "p99_ms": float(row["p99 latency"]) / 1e3,
    }


def _put_together(work: Path, folder: Path, libraries: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run(
        [*pip, "--platform", "manylinux1_x86_64", "--python-version", "3.11", "--dest", str(work), _WHEEL],
        check=True,
        capture_output=True,
    )
    subprocess.run(["apt-get", "download", _LIBRARY], cwd=work, check=True, capture_output=True)
    subprocess.run(["dpkg", "-x", str(next(work.glob(f"{_LIBRARY}*.deb"))), str(work / "deb")], check=True)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith("/bin/perf_analyzer"))
        wheel.extract(member, work)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(next((work / "deb").rglob("libb64.so.0d")), folder / "libb64.so.0d")
    shutil.copyfile(next(libraries.glob("libcudart-*.so*")), folder / "libcudart.so.12")
    shutil.copyfile(work / member, folder / "perf_analyzer.part")
    os.chmod(folder / "perf_analyzer.part", 0o755)
    os.replace(folder / "perf_analyzer.part", folder / "perf_analyzer")
