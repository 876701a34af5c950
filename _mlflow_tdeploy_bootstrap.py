"""What plain ``import mlflow`` loads of this package: attaches ``mlflow.tdeploy``, does nothing else, never raises.

MLflow loads its entry points in the middle of its own import. So this is a top-level module that imports
nothing of mlflow or of the package: whatever is broken or missing there shows when ``mlflow.tdeploy`` is used.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from typing import Any

_NAME = "mlflow.tdeploy"
_PACKAGE = "mlflow_tdeploy"


class _LazyModule(types.ModuleType):
    """Stands for ``mlflow_tdeploy`` until the first use of one of its names."""

    def __getattr__(self, name: str) -> Any:
        # `inspect` and the like ask every module for dunder names: that is no use of the flavor.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
        return getattr(_load(), name)

    def __dir__(self) -> list[str]:
        return dir(_load())


def _load() -> types.ModuleType:
    module = importlib.import_module(_PACKAGE)
    sys.modules[_NAME] = module
    parent = sys.modules.get("mlflow")
    if parent is not None:
        parent.tdeploy = module  # type: ignore[attr-defined]
    return module


def _attach() -> None:
    parent = sys.modules.get("mlflow")
    if parent is None or "tdeploy" in vars(parent):
        return
    module = sys.modules.get(_PACKAGE) or _LazyModule(_NAME, "The tdeploy flavor, loaded when it is used.")
    sys.modules[_NAME] = module
    parent.tdeploy = module  # type: ignore[attr-defined]


class TDeployContextProvider:
    """A run context provider that adds no tags; MLflow creates it while ``import mlflow`` runs."""

    def __init__(self) -> None:
        with contextlib.suppress(Exception):  # no plugin may break `import mlflow`, and there is no one to tell
            _attach()

    def in_context(self) -> bool:
        """Never in context: there is nothing to add to a run."""
        return False

    def tags(self) -> dict[str, str]:
        """Return no tags."""
        return {}


def artifact_repository(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
    """Open an artifact repository for the scheme ``tdeploy:``; the flavor is loaded then, not before."""
    from mlflow_tdeploy.flavor.artifacts import TDeployArtifactRepository

    return TDeployArtifactRepository(artifact_uri, tracking_uri, registry_uri)
