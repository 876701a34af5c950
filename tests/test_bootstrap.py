"""Plain ``import mlflow`` offers ``mlflow.tdeploy``, loads nothing heavy for it, and survives whatever is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("mlflow_tdeploy.flavor", "mlflow_tdeploy.registry_io", "torch", "transformers", "onnxruntime", "onnx")


@pytest.fixture
def metadata(tmp_path):
    """Installed metadata as pyproject.toml declares it now, whenever the package was last installed."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "metadata" / f"mlflow_tdeploy-{project['version']}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    return folder.parent


def run(code: str, metadata: Path, *before: Path) -> list[str]:
    """Return the lines that code prints in a fresh process; ``before`` are folders that hide the real package."""
    path = os.pathsep.join(map(str, (*before, metadata, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", code]
    # another folder than the repository's: an egg-info there would hide the metadata above
    done = subprocess.run(command, env=environment, cwd=metadata, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tdeploy" not in done.stderr, done.stderr  # such as MLflow's warning about a plugin that fails to load
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "code",
    [
        "import mlflow; print(mlflow.tdeploy.FLAVOR_NAME, mlflow.tdeploy.log_model.__name__)",
        "import mlflow.tdeploy; print(mlflow.tdeploy.FLAVOR_NAME, mlflow.tdeploy.log_model.__name__)",
        "from mlflow.tdeploy import FLAVOR_NAME, log_model; print(FLAVOR_NAME, log_model.__name__)",
        "import mlflow_tdeploy, mlflow; from mlflow.tdeploy import *; print(FLAVOR_NAME, log_model.__name__)",
    ],
)
def test_every_way_to_the_flavor_works_in_a_fresh_process(metadata, code):
    assert run(code, metadata) == ["tdeploy log_model"]


def test_plain_import_loads_nothing_of_the_flavor_even_when_every_module_is_looked_at(metadata):
    code = (
        "import inspect, json, sys, mlflow\n"
        "for module in list(sys.modules.values()): hasattr(module, '__file__'), hasattr(module, '__path__')\n"
        "inspect.getmodule(run := (lambda: 0))\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    names = set(json.loads(run(code, metadata)[0]))
    assert {"_mlflow_tdeploy_bootstrap", "mlflow.tdeploy"} <= names
    assert not names & {"mlflow_tdeploy", *HEAVY}


def test_the_public_names_resolve_when_torch_and_transformers_are_not_installed(metadata):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['onnx'] = None\n"
        "import mlflow_tdeploy as t\n"
        "assert all(getattr(t, name) is not None for name in t.__all__)\n"
        "assert set(t.__all__) <= set(dir(t))\n"
        "print('onnxruntime' in sys.modules)"
    )
    assert run(code, metadata) == ["False"]


@pytest.mark.parametrize("broken", ["raise RuntimeError('broken')", "this is no Python"])
def test_import_mlflow_works_when_the_package_is_broken(metadata, tmp_path, broken):
    package = tmp_path / "broken" / "mlflow_tdeploy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(broken)
    code = "import mlflow\ntry: mlflow.tdeploy.log_model\nexcept Exception as error: print(type(error).__name__)"
    assert run(code, metadata, package.parent) in (["RuntimeError"], ["SyntaxError"])


def test_a_tdeploy_of_mlflows_own_is_left_alone(metadata):
    code = (
        "import sys, types; theirs = sys.modules['mlflow'] = types.ModuleType('mlflow'); theirs.tdeploy = 'theirs'\n"
        "import _mlflow_tdeploy_bootstrap as b; provider = b.TDeployContextProvider()\n"
        "print(theirs.tdeploy, provider.in_context(), provider.tags())"
    )
    assert run(code, metadata) == ["theirs False {}"]


def test_the_provider_raises_nothing_when_attaching_fails(metadata):
    code = (
        "import sys; import _mlflow_tdeploy_bootstrap as b\n"
        "class Broken:\n"
        "    __slots__ = ()\n"
        "sys.modules['mlflow'] = Broken(); b.TDeployContextProvider(); print('fine')"
    )
    assert run(code, metadata) == ["fine"]
