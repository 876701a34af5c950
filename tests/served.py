"""Sources served without a bundle: task and reference put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlflow_tdeploy.core.pipeline import Pipeline
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.source.base import Source

GLOSSES = Path(__file__).parents[1] / "mlflow_tdeploy" / "build" / "data" / "glosses.txt"
#: What real texts seldom are.
ODD = ["", "   ", "emoji 👩‍👩‍👧 🇩🇪", "  spaced\tout\n", "ÀÉÎ ﬁne İstanbul 漢字", "[SEP] [MASK]", "over-long " * 700]


def texts(count: int) -> list[str]:
    """Real dictionary definitions, and odd texts."""
    lines = GLOSSES.read_text("utf-8").splitlines()
    return lines[:: max(1, len(lines) // count)][:count] + ODD


def task_of(source: Source, folder: Path) -> Task:
    """The source's task with its assets in ``folder``."""
    source.write_assets(folder)
    return TASKS.get(source.task)(source.task_config, source.signature, folder)


def pipeline_of(source: Source, folder: Path) -> Pipeline:
    """The source's own answers through the code that serves."""
    return Pipeline(task_of(source, folder), source.reference)


def close_to(answer: Any) -> Any:
    """Return what an answer is, numbers rounded a little differently."""
    if isinstance(answer, list):
        return [close_to(one) for one in answer]
    if isinstance(answer, dict):
        return {name: close_to(one) for name, one in answer.items()}
    return pytest.approx(answer, abs=1e-4) if isinstance(answer, float) else answer
