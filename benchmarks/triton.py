"""The same model on one Triton in several layouts, and behind ``mlflow models serve``: ``python -m benchmarks.triton``.

Text in, vector out, all-MiniLM-L6-v2; clients that ask as fast as they are answered, in a process beside the server. On
a machine without NVIDIA's image the server is that of the wheel, with this project's Python-based backend for graphs:
then the figures compare layouts on that, and say nothing about NVIDIA's backend.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from benchmarks import ours, peers, perf_analyzer
from benchmarks.data import SHORT_TEXT, digest, mixed_texts
from benchmarks.report import Figure, Results, finish, say
from benchmarks.triton_layouts import write_empty, write_transformer_deploy
from benchmarks.triton_switching import switching

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "triton.json"
CLIENTS = (1, 8, 32)
#: The same graph for all, and what a budget of 0.97 leaves to choose.
VARIANT, INT8 = "ort-cpu-fp32", "ort-cpu-int8"
_TEXTS, _ROUNDS = 256, 3
#: Goals: beside the layout of transformer-deploy, beside MLflow's own server, beside the floor, seconds.
LAYOUT_GOAL, SERVE_GOAL, FLOOR_GOAL, DEPLOY_GOAL, UNCHANGED_GOAL = 2.0, 5.0, 1.3, 5.0, 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load, in three rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a smoke run: short loads; writes no JSON")
    options = parser.parse_args(arguments)
    seconds = 1.0 if options.quick else options.seconds
    with tempfile.TemporaryDirectory(prefix="tdeploy-triton-") as folder:
        results = measure(Path(folder), seconds, quick=options.quick)
    return finish(results, options.out, quick=options.quick)


def measure(work: Path, seconds: float, *, quick: bool) -> Results:
    """Run everything below a folder."""
    from mlflow_tdeploy.triton.home import find_server, install
    from mlflow_tdeploy.triton.local import local_triton

    os.environ.setdefault("TDEPLOY_TRITON_HOME", str(ROOT / ".triton"))
    with contextlib.suppress(Exception):
        find_server() if os.environ.get("TRITON_HOME") else install()
    server = find_server()
    say("log_model: export, fuse, quantize, verify")
    model, _ = ours.log(work / "ours")
    say("peers: saving")
    with peers.quiet():
        peers._save_sentence_transformers(work / "sentence_transformers")
    results, repository = Results(), work / "repository"
    repository.mkdir()
    with local_triton(repository, server=server) as triton:
        results.add("deployment", *deployment(triton, repository, model))
        results.add("load", *load(triton, repository, model, work, seconds))
        asked = (("http", "minilm", "text"), ("http", "td_inference", "TEXT"), ("grpc", "minilm", "text"))
        client = perf_analyzer.figures(triton, server, asked, mixed_texts(_TEXTS), CLIENTS, seconds / _ROUNDS)
        results.add("perf_analyzer", *client)
        target = _target(triton, repository)
        results.add("switching", *switching(target, work, 60.0 if not quick else 3.0, quick=quick))
        results.sections["load"][1]["server"] = (
            server.description.removeprefix(f"{server.binary}").strip(", ") or "tritonserver"
        )
    return results


def deployment(triton: Any, repository: Path, model: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Time a first version, one more, the same again, and going back, through MLflow's deployments client."""
    from mlflow.deployments import get_deploy_client

    client, uri = get_deploy_client(f"tdeploy://127.0.0.1:{triton.http}?repository={repository}"), str(model)
    with _sent() as sizes:
        done = {
            "first version": _timed(
                lambda: client.create_deployment("minilm", uri, config={"grace": 0, "variant": VARIANT})
            ),
            "another version": _timed(lambda: client.update_deployment("minilm", uri, config={"version": 2})),
            "the same again": _timed(lambda: client.update_deployment("minilm", uri, config={"version": 2})),
            "rollback": _timed(lambda: client.rollback_deployment("minilm")),
        }
    sent = dict(zip(done, sizes, strict=True))
    goals = {"first version": DEPLOY_GOAL, "another version": DEPLOY_GOAL, "the same again": UNCHANGED_GOAL}
    figures = [
        Figure(
            f"publish, load, verify, switch: {name}", seconds, "s", goals.get(name), note=f"{sent[name]:.1f} MB sent"
        )
        for name, (seconds, _) in done.items()
    ]
    figures.append(Figure("bytes moved by an update that changes nothing", sent["the same again"], "MB", 0.0))
    return figures, {"seconds": {name: seconds for name, (seconds, _) in done.items()}, "sent_mb": sent}


def load(triton: Any, repository: Path, model: Path, work: Path, seconds: float) -> tuple[list[Figure], dict[str, Any]]:
    """Put every contestant under the same load, one after the other, several times."""
    texts = mixed_texts(_TEXTS)
    graph = model / "tdeploy" / "files" / VARIANT / "model.onnx"
    for name in write_transformer_deploy(repository, graph, model / "tdeploy" / "assets" / "tokenizer.json"):
        triton.load(name)
    triton.load(write_empty(repository))
    contestants: dict[str, dict[str, Any]] = {
        "ours on Triton": _triton(triton, "minilm", "text", "sentence_embedding", texts, column=True),
        "layout of transformer-deploy": _triton(triton, "td_inference", "TEXT", "sentence_embedding", texts),
    }
    _same_vectors(contestants)
    _target(triton, repository).deploy(*_version(model, 1, INT8, "minilm-int8"))
    contestants["ours on Triton, int8"] = _triton(
        triton, "minilm-int8", "text", "sentence_embedding", texts, column=True
    )
    served = {"ours": model, "sentence_transformers": work / "sentence_transformers"}
    with contextlib.ExitStack() as stack:
        for name, folder in served.items():
            contestants[f"mlflow models serve, {name}"] = _mlflow(stack.enter_context(_serving(folder)), texts)
        found = _in_turn(contestants, seconds)
    floor = _floor(triton, graph, model, seconds)
    return _load_figures(found, floor), {"texts": digest(texts), "loads": found, "floor": floor}


@contextlib.contextmanager
def _sent() -> Iterator[list[float]]:
    """Collect how many MB each call tells to have sent."""
    found: list[float] = []
    handler, log = logging.Handler(logging.INFO), logging.getLogger("mlflow_tdeploy")

    def note(record: logging.LogRecord) -> None:
        if "were sent" in record.msg:
            found.append(float(record.args[-1]))
        elif record.msg.startswith("Nothing to do"):
            found.append(0.0)

    handler.emit = note
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _in_turn(contestants: Mapping[str, Mapping[str, Any]], seconds: float) -> dict[str, dict[int, dict[str, Any]]]:
    """Put each under each load in turn, several times over; the round of the median rate counts."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in contestants}
    for clients in CLIENTS:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
        for number in range(_ROUNDS):
            say(f"{clients} clients, round {number + 1} of {_ROUNDS}")
            for name, one in contestants.items():
                rounds[name].append(_load(one, clients, seconds / _ROUNDS))
        for name, some in rounds.items():
            found[name][clients] = sorted(some, key=lambda one: one["requests_per_s"])[_ROUNDS // 2]
            found[name][clients]["failures"] = sum(one["failures"] for one in some)
    return found


def _load_figures(found: Mapping[str, Mapping[int, Mapping[str, Any]]], floor: Mapping[str, float]) -> list[Figure]:
    most = CLIENTS[-1]
    ours_, layout, served = (
        found[name]
        for name in ("ours on Triton", "layout of transformer-deploy", "mlflow models serve, sentence_transformers")
    )
    rate = "requests_per_s"
    figures = [
        Figure(
            f"{most} clients, beside the layout of transformer-deploy",
            ours_[most][rate] / layout[most][rate],
            "x",
            LAYOUT_GOAL,
            "at least",
        ),
        Figure(
            f"{most} clients, beside mlflow models serve of sentence_transformers",
            ours_[most][rate] / served[most][rate],
            "x",
            SERVE_GOAL,
            "at least",
        ),
        Figure(
            "one client, 8 words, beside bare ORT + tokenizers + two empty hops",
            floor["ours_p50_ms"] / floor["floor_ms"],
            "x",
            FLOOR_GOAL,
            note=f"{floor['ours_p50_ms']:.2f} ms against {floor['bare_ms']:.2f} + 2 x {floor['hop_ms']:.2f}",
        ),
    ]
    int8 = found["ours on Triton, int8"]
    for name, other in (
        ("the layout of transformer-deploy", layout),
        ("mlflow models serve of sentence_transformers", served),
    ):
        figures.append(Figure(f"  the same with int8, beside {name}", int8[most][rate] / other[most][rate], "x"))
    failures = sum(one["failures"] for loads in found.values() for one in loads.values())
    figures.append(Figure("requests that failed under load", failures, "", 0.0))
    for name, loads in found.items():
        for clients, one in loads.items():
            note = f"p50 {one['p50_ms']:.1f} ms, p99 {one['p99_ms']:.1f} ms"
            figures.append(Figure(f"  {name}, {clients} clients", one[rate], "requests/s", note=note))
    return figures


def _floor(triton: Any, graph: Path, model: Path, seconds: float) -> dict[str, float]:
    """Time a lone short text: bare, through an empty model, and through ours, in turn."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tdeploy" / "assets" / "tokenizer.json"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def bare() -> None:
        row = tokenizer.encode(SHORT_TEXT)
        values = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
        session.run(None, {name: np.array([values[name]], np.int64) for name in names})

    asked = _triton(triton, "minilm", "text", "sentence_embedding", [SHORT_TEXT], column=True)
    empty = _triton(triton, "empty", "TEXT", "y", [SHORT_TEXT])
    rounds: dict[str, list[float]] = {"bare_ms": [], "hop_ms": [], "ours_p50_ms": []}
    for _ in range(3):
        times = []
        end = time.perf_counter() + seconds / 4
        while time.perf_counter() < end:
            started = time.perf_counter()
            bare()
            times.append((time.perf_counter() - started) * 1e3)
        rounds["bare_ms"].append(float(np.median(times)))
        rounds["hop_ms"].append(_load(empty, 1, seconds / 4)["p50_ms"])
        rounds["ours_p50_ms"].append(_load(asked, 1, seconds / 4)["p50_ms"])
    found = {name: float(np.median(values)) for name, values in rounds.items()}
    return {**found, "floor_ms": found["bare_ms"] + 2 * found["hop_ms"]}


def _target(triton: Any, repository: Path) -> Any:
    from mlflow_tdeploy.deploy.apply import Deployments
    from mlflow_tdeploy.deploy.files import FolderFiles
    from mlflow_tdeploy.triton.client import Connection, TritonClient

    return Deployments(TritonClient(Connection(triton.url)), FolderFiles(repository), on_step=lambda step: None)


def _version(model: Path, version: int, variant: str, name: str = "minilm") -> tuple[Any, Any]:
    from mlflow_tdeploy.deploy.apply import Settings
    from mlflow_tdeploy.deploy.choose import choose, served
    from mlflow_tdeploy.deploy.settings import DeploySettings

    said = DeploySettings.of({"variant": variant, "version": version})
    what = choose(str(model), said, name=name)
    return what, Settings(grace=0.0, options=served(said, what))


def _timed(call: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def _triton(
    triton: Any, model: str, name: str, output: str, texts: Sequence[str], *, column: bool = False
) -> dict[str, Any]:
    """Return how to ask a model for the vector of a text; vectors come as bytes."""
    shape = [1, 1] if column else [1]
    wanted = [{"name": output, "parameters": {"binary_data": True}}]
    bodies = [
        json.dumps({"inputs": [{"name": name, "shape": shape, "datatype": "BYTES", "data": [text]}], "outputs": wanted})
        for text in texts
    ]
    return {
        "port": triton.http,
        "path": f"/v2/models/{model}/infer",
        "bodies": bodies,
        "headers": {"Content-Type": "application/json"},
    }


def _mlflow(port: int, texts: Sequence[str]) -> dict[str, Any]:
    bodies = [json.dumps({"inputs": [text]}) for text in texts]
    return {"port": port, "path": "/invocations", "bodies": bodies, "headers": {"Content-Type": "application/json"}}


def _load(asked: Mapping[str, Any], clients: int, seconds: float) -> dict[str, Any]:
    """Run a load in a process of its own, after a short one to warm up."""
    found: dict[str, Any] = {}
    for length in (min(1.0, seconds), seconds):
        load_ = {**asked, "clients": clients, "seconds": length}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.load"],
            input=json.dumps(load_),
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout)
    return found


def _same_vectors(contestants: Mapping[str, Mapping[str, Any]]) -> None:
    """Make sure that all of them answer the same."""
    vectors = []
    for one in contestants.values():
        request = urllib.request.Request(
            f"http://127.0.0.1:{one['port']}{one['path']}", one["bodies"][0].encode(), dict(one["headers"])
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            head = int(answer.headers["Inference-Header-Content-Length"])
            vectors.append(np.frombuffer(answer.read()[head:], np.float32))
    if not all(np.allclose(vectors[0], vector, atol=1e-4) for vector in vectors):
        raise RuntimeError("the contestants' vectors differ")


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[int]:
    """Run ``mlflow models serve`` on a free port."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        str(folder),
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    environment = {
        **os.environ,
        "TDEPLOY_VARIANT": VARIANT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1):
                break
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


if __name__ == "__main__":
    raise SystemExit(main())
