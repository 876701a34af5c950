"""The project's own part: log the model, time the steps, open it through pyfunc and without MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers import MODEL, Embed, quiet
from benchmarks.report import Figure

#: Wider than the default, so that the int8 variant (worst cosine about 0.98) is kept and can be measured.
BUDGET = "worst_cosine >= 0.97"
VARIANTS = {"fp32": "ort-cpu-fp32", "int8": "ort-cpu-int8"}
LOGGING_GOAL = 90.0


def log(work: Path) -> tuple[Path, dict[str, Any]]:
    """Log the model with all variants and evidence into a fresh SQLite MLflow below ``work``.

    Returns:
        The model's folder, and how long everything and each step took.
    """
    import mlflow

    import mlflow_tdeploy

    work.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{work / 'mlflow.db'}")
    experiment = f"bench-{time.time_ns()}"
    mlflow.create_experiment(experiment, artifact_location=(work / "artifacts").as_uri())
    mlflow.set_experiment(experiment)
    steps: list[dict[str, Any]] = []
    started = time.perf_counter()
    info = mlflow_tdeploy.log_model(
        str(MODEL),
        name="minilm",
        task="sentence-embedding",
        budget=BUDGET,
        progress=lambda step: steps.append({"step": step.name, "seconds": step.seconds, "detail": step.detail}),
    )
    seconds = time.perf_counter() - started
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri, dst_path=str(work / f"model-{time.time_ns()}")))
    return folder, {"total_s": seconds, "steps": steps}


def logging_figures(times: Mapping[str, Any]) -> list[Figure]:
    """Return the figure of logging and one per step."""
    known = sum(step["seconds"] for step in times["steps"])
    figures = [
        Figure("log_model, all variants and evidence", times["total_s"], "s", LOGGING_GOAL),
        *(Figure(f"  {step['step']}", step["seconds"], "s", note=step["detail"][:100]) for step in times["steps"]),
    ]
    return [
        *figures,
        Figure("  outside the steps: importing torch, reading the model, MLflow", times["total_s"] - known, "s"),
    ]


def open_pyfunc(model: Path, variant: str) -> Embed:
    """Open a variant through ``mlflow.pyfunc``, as a user who forces it would."""
    import mlflow.pyfunc

    with quiet():
        return mlflow.pyfunc.load_model(str(model), model_config={"variant": variant}).predict
