"""Every TensorRT call of ours exists in TensorRT 10, in 11 and in TensorRT-RTX, whose APIs differ.

The snapshots in ``trt_api`` were read from the real bindings. Which class a name of ours stands for is said here, so a
new name that is used like one of theirs must be added.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import mlflow_tdeploy

PACKAGE = Path(mlflow_tdeploy.__file__).parent
FILES = [PACKAGE / "build" / "engine.py", PACKAGE / "runtime" / "backends" / "tensorrt.py"]
SNAPSHOTS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "trt_api").glob("*.json")}
#: What our names stand for.
CLASSES = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "cache": "ITimingCache",
}  # fmt: skip
#: Asked for with ``hasattr`` before it is called.
GUARDED = {("IBuilderConfig", name) for name in ("set_compute_capability", "num_compute_capabilities")}
#: Members of the module itself that are neither classes nor enumerations.
PLAIN = {"__name__", "__version__", "__init__"}


def calls(path: Path) -> set[tuple[str, str]]:
    """Return (class or enumeration, member) of everything of TensorRT's that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "trt" and node.attr not in PLAIN:
                found.add((node.attr, ""))
            elif node.value.id in CLASSES and node.attr not in PLAIN:
                found.add((CLASSES[node.value.id], node.attr))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            inner = node.value
            if isinstance(inner.value, ast.Name) and inner.value.id == "trt" and node.attr not in PLAIN:
                found.add((inner.attr, node.attr))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_member":
            found.add((ast.literal_eval(node.args[1]), ""))
    return found


def test_the_check_sees_calls():
    used = {call for path in FILES for call in calls(path)}
    assert {("Builder", "build_serialized_network"), ("MemoryPoolType", "WORKSPACE"), ("ILogger", "ERROR")} <= used


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("version", sorted(SNAPSHOTS))
def test_every_call_exists(path, version):
    api = {**SNAPSHOTS[version]["classes"], **SNAPSHOTS[version]["enums"]}
    lacking = sorted(
        f"{owner}.{member}"
        for owner, member in calls(path) - GUARDED
        if owner not in api or (member and member not in api[owner])
    )
    if "rtx" not in version:
        lacking = [name for name in lacking if name != "ComputeCapability."]  # only where targets can be set
    assert lacking == []
