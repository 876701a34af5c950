"""From an alias in the registry to an answer of a server: ``python -m benchmarks.promotion``.

A real ``mlflow server`` with SQLite, real Triton servers, ``tdeploy watch`` as a process. On a machine without NVIDIA's
image the server is that of the wheel, with this project's Python-based backend for graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import numpy as np

from benchmarks import peers
from benchmarks.ours import BUDGET, MODEL
from benchmarks.promotion_servers import registry, wait_until, watcher, write_spec
from benchmarks.report import Figure, Results, finish, say

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "promotion.json"
#: Goals: seconds with a webhook and on top of the interval without, of a plan; MiB and % of a core; beside one server.
WEBHOOK_GOAL, POLL_GOAL, PLAN_GOAL, MEMORY_GOAL, CORE_GOAL, SERVERS_GOAL = 3.0, 3.0, 10.0, 150.0, 1.0, 3.0
_SECTIONS = ("answers", "idle", "servers", "random", "many models")
_INTERVAL, _SERVERS, _CLIENTS = 2.0, 3, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.promotion", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--only", nargs="*", default=list(_SECTIONS), choices=_SECTIONS, help="these; all by default")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few of each; writes no JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tdeploy-promotion-") as folder:
        results = measure(Path(folder), options.only, quick=options.quick)
    return finish(results, options.out, quick=options.quick)


def measure(work: Path, only: Sequence[str], *, quick: bool) -> Results:
    """Run everything below a folder."""
    import mlflow

    os.environ.setdefault("TDEPLOY_TRITON_HOME", str(ROOT / ".triton"))
    os.environ["TDEPLOY_CACHE_DIR"] = str(work / "cache")
    results = Results()
    with registry(work / "mlflow") as url, _tritons(work, _SERVERS) as servers:
        client = mlflow.MlflowClient()
        one = dict([next(iter(servers.items()))])
        small = _log_small(client, work)
        say("log_model of all-MiniLM-L6-v2")
        _log_minilm(client, versions=6 if quick else 14)
        sections: dict[str, Callable[[], tuple[list[Figure], dict[str, Any]]]] = {
            "answers": lambda: _answers(client, one, work, url, quick=quick),
            "idle": lambda: _idle(one, work, url, quick=quick),
            "servers": lambda: _servers(client, servers, work),
            "random": lambda: _random(client, one, work, url, quick=quick),
            "many models": lambda: _many(client, servers, work, small, quick=quick),
        }
        for name in only:
            say(name)
            results.add(name, *sections[name]())
    return results


@contextlib.contextmanager
def _tritons(work: Path, count: int) -> Iterator[dict[str, str]]:
    """Run servers, each with a repository of its own; yields the repository of each address."""
    from mlflow_tdeploy.triton.home import find_server, install
    from mlflow_tdeploy.triton.local import local_triton

    with contextlib.suppress(Exception):
        find_server() if os.environ.get("TRITON_HOME") else install()
    server, found = find_server(), dict[str, str]()
    with contextlib.ExitStack() as stack:
        for index in range(count):
            repository = work / f"repository-{index}"
            repository.mkdir()
            found[stack.enter_context(local_triton(repository, server=server)).url] = str(repository)
        yield found


def _log_minilm(client: Any, versions: int) -> None:
    """Log the model once and register it several times: each version is published and loaded anew."""
    import mlflow

    import mlflow_tdeploy

    with peers.quiet():
        info = mlflow_tdeploy.log_model(
            str(MODEL), name="minilm", task="sentence-embedding", budget=BUDGET, precisions=["fp32"],
            registered_model_name="minilm",
        )  # fmt: skip
        for _ in range(versions - 1):
            mlflow.register_model(info.model_uri, "minilm")
    client.set_registered_model_alias("minilm", "champion", 1)


def _deployments(server: tuple[str, str]) -> Any:
    from mlflow_tdeploy.deploy.apply import Deployments
    from mlflow_tdeploy.deploy.files import FolderFiles
    from mlflow_tdeploy.triton.client import Connection, TritonClient

    return Deployments(TritonClient(Connection(server[0])), FolderFiles(server[1]))


def _answers(
    client: Any, servers: dict[str, str], work: Path, url: str, *, quick: bool
) -> tuple[list[Figure], dict[str, Any]]:
    """Return how long it takes from setting the alias over REST until another version answers."""
    spec = _minilm_spec(work, servers)
    found, count = _deployments(next(iter(servers.items()))), 2 if quick else 6
    times: dict[str, list[float]] = {"webhook": [], "poll": []}
    # a webhook that is installed stays: it would wake who polls
    ways = {"poll": ("--interval", str(_INTERVAL)), "webhook": ("--install-webhook",)}
    version = 1
    for way, options in ways.items():
        with watcher(spec, url, *options):
            wait_until(lambda wanted=version: _serves(found, "minilm") == wanted, 120)
            if way == "webhook":
                time.sleep(2.0)  # MLflow remembers for a second that there was none
            for _ in range(count):
                version += 1
                started = time.perf_counter()
                client.set_registered_model_alias("minilm", "champion", version)
                done = wait_until(lambda wanted=version: _serves(found, "minilm") == wanted, 120)
                times[way].append(done - started)
                time.sleep(0.5 + random.random() * _INTERVAL)
    worst = {way: max(some) for way, some in times.items()}
    figures = [
        Figure("alias set → new version answers, webhook", worst["webhook"], "s", WEBHOOK_GOAL,
               note=_told(times["webhook"])),
        Figure(f"alias set → new version answers, polling every {_INTERVAL:g} s", worst["poll"], "s",
               _INTERVAL + POLL_GOAL, note=_told(times["poll"])),
    ]  # fmt: skip
    return figures, times


def _minilm_spec(work: Path, servers: dict[str, str]) -> Path:
    return write_spec(work / "minilm.yaml", servers, "minilm", keep=0)


def _serves(found: Any, name: str) -> int | None:
    route = found.serving(name)
    return route.active if route else None


def _told(times: Sequence[float]) -> str:
    return f"worst of {len(times)}, median {statistics.median(times):.2f} s"


def _idle(servers: dict[str, str], work: Path, url: str, *, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Return what a watcher takes that has deployed something and finds nothing more to do, at its usual interval."""
    import psutil

    spec, seconds = _minilm_spec(work, servers), 10.0 if quick else 90.0
    found = _deployments(next(iter(servers.items())))
    found.delete("minilm")
    with watcher(spec, url, "--interval", "30") as process:
        wait_until(lambda: _serves(found, "minilm") is not None, 120)
        time.sleep(5.0)
        one = psutil.Process(process.pid)
        begin, cpu = time.perf_counter(), sum(one.cpu_times()[:2])
        time.sleep(seconds)
        share = 100 * (sum(one.cpu_times()[:2]) - cpu) / (time.perf_counter() - begin)
        memory = one.memory_info().rss / 2**20
    figures = [
        Figure("watch, idle: memory", memory, "MiB", MEMORY_GOAL, note="resident, after a deployment"),
        Figure("watch, idle: processor", share, "% of a core", CORE_GOAL, note=f"every 30 s, over {seconds:.0f} s"),
    ]
    return figures, {"memory_mib": memory, "core_percent": share}


def _servers(client: Any, servers: dict[str, str], work: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Return how long a promotion takes to three servers beside to one, interleaved."""
    from mlflow_tdeploy.promotion.promote import promote
    from mlflow_tdeploy.promotion.spec import Spec

    one = dict([next(iter(servers.items()))])
    specs = {
        count: Spec.read(write_spec(work / f"servers-{count}.yaml", some, "minilm", keep=0))
        for count, some in ((1, one), (len(servers), servers))
    }
    times: dict[int, list[float]] = {count: [] for count in specs}
    promote("models:/minilm/1", specs[len(servers)], alias="champion", client=client)
    for version in (2, 3, 4, 5):
        for count, spec in specs.items():
            number = version if count > 1 else 1
            started = time.perf_counter()
            promote(f"models:/minilm/{number}", spec, alias="champion", client=client)
            times[count].append(time.perf_counter() - started)
    ratio = statistics.median(times[len(servers)]) / statistics.median(times[1])
    for server in servers.items():
        _deployments(server).delete("minilm")
    note = f"medians {statistics.median(times[len(servers)]):.2f} s and {statistics.median(times[1]):.2f} s"
    return [Figure(f"one promotion to {len(servers)} servers", ratio, "x one", SERVERS_GOAL, note=note)], {
        str(count): some for count, some in times.items()
    }


def _random(
    client: Any, servers: dict[str, str], work: Path, url: str, *, quick: bool
) -> tuple[list[Figure], dict[str, Any]]:
    """Move an alias a hundred times under load; see what answers in the end, and what is left."""
    count, order = 10 if quick else 100, random.Random(0)
    spec = write_spec(work / "random.yaml", servers, "small", keep=1)
    server = next(iter(servers.items()))
    found, failures, answers = _deployments(server), list[str](), list[int]()
    client.set_registered_model_alias("small", "champion", 1)
    stop, version = threading.Event(), 1

    def ask() -> None:
        asking, some = _deployments(server).client, 0
        while not stop.is_set():
            try:
                asking.infer("small", {"x": np.ones((1, 4), np.float32)})
                some += 1
            except Exception as error:
                failures.append(str(error))
        answers.append(some)

    with watcher(spec, url, "--interval", "5", "--install-webhook"):
        wait_until(lambda: _serves(found, "small") == 1, 120)
        threads = [threading.Thread(target=ask) for _ in range(_CLIENTS)]
        for thread in threads:
            thread.start()
        for _ in range(count):
            version = order.choice([one for one in range(1, 6) if one != version])
            client.set_registered_model_alias("small", "champion", version)
            time.sleep(order.random())
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: _serves(found, "small") == version, 60)
        time.sleep(6.0)  # another look, which finds nothing to do
        stop.set()
        for thread in threads:
            thread.join()
    figures = [
        Figure(f"{count} aliases in random order: final version right", float(_serves(found, "small") == version), "",
               1.0, "at least"),
        Figure("  requests answered", float(sum(answers)), "", note=f"{_CLIENTS} clients"),
        Figure("  requests failed", float(len(failures)), "", 0.0),
        Figure("  orphan files and models", float(len(orphans(found, "small"))), "", 0.0),
    ]  # fmt: skip
    return figures, {"failures": failures[:5], "orphans": orphans(found, "small")}


def orphans(found: Any, name: str) -> list[str]:
    """Return what of a deployment lies in the repository or is loaded and belongs to no version that is kept."""
    route = found.required(name)
    kept = {name, *(f"{name}.v{version}" for version in route.kept)}
    folders = [one for one in found.files.models() if one not in kept]
    loaded = [one for one in found.loaded(name) if one not in kept]
    versions = {path.partition("/")[0] for path in found.files.below(name) if path.partition("/")[0].isdigit()}
    return [*folders, *loaded, *(f"{name}/{one}" for one in versions if int(one) not in route.kept)]


def _many(
    client: Any, servers: dict[str, str], work: Path, source: Path, *, quick: bool
) -> tuple[list[Figure], dict[str, Any]]:
    """Plan over many registered models, none of which is deployed: each one's records are read."""
    from mlflow_tdeploy.promotion.look import make_plan
    from mlflow_tdeploy.promotion.spec import Spec

    count, versions = (20, 2) if quick else (500, 5)
    say(f"{count} registered models with {versions} versions each")
    artifacts, experiment = work / "mlflow" / "artifacts", client.get_experiment_by_name("bench").experiment_id
    for number in range(count):  # as log_model leaves them, but for what it would take to log each
        name = f"fleet-{number:03d}"
        client.create_registered_model(name)
        logged = client.create_logged_model(experiment, name)
        shutil.copytree(source, artifacts / logged.artifact_location.partition("mlflow-artifacts:/")[2])
        client.finalize_logged_model(logged.model_id, "READY")
        for _ in range(versions):
            client.create_model_version(name, f"models:/{logged.model_id}", model_id=logged.model_id)
        client.set_registered_model_alias(name, "champion", versions)
    one = dict([next(iter(servers.items()))])
    spec = Spec.read(write_spec(work / "many.yaml", one, "fleet-*"))
    times = []
    for _ in range(2):
        started = time.perf_counter()
        plan = make_plan(spec, client)
        times.append(time.perf_counter() - started)
        assert len(plan.changes) == count, [one.why for one in plan.refused][:1]
    figures = [
        Figure(f"plan over {count} models with {versions} versions, none deployed", times[0], "s", PLAN_GOAL),
        Figure("  once more", times[1], "s", note="the records are in this host's cache"),
    ]
    return figures, {"seconds": times}


def _log_small(client: Any, work: Path) -> Path:
    """Log a model of one matrix product in five versions; return the folder of one."""
    import mlflow

    import mlflow_tdeploy
    from benchmarks.triton_switching import small_graph

    for version in range(1, 6):
        with peers.quiet():
            info = mlflow_tdeploy.log_model(
                small_graph(float(version)), name="small", precisions=["fp32"], registered_model_name="small"
            )
    return Path(mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(work / "small")))


if __name__ == "__main__":
    raise SystemExit(main())
