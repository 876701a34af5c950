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

BACKENDS = Path(mlflow_tdeploy.__file__).parent / "runtime" / "backends"
SNAPSHOTS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "trt_api").glob("*.json")}
#: What the names in each file stand for.
FILES = {
    Path(mlflow_tdeploy.__file__).parent / "build" / "engine.py": {
        "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition", "parser": "OnnxParser",
        "profile": "IOptimizationProfile", "cache": "ITimingCache",
    },
    BACKENDS / "tensorrt.py": {},
    BACKENDS / "_trt_engine.py": {
        "engine": "ICudaEngine", "_engine": "ICudaEngine", "context": "IExecutionContext", "settings": "IRuntimeConfig",
        "runtime": "Runtime", "refitter": "Refitter", "weights": "OnnxParserRefitter",
    },
    BACKENDS / "_trt_lane.py": {"context": "IExecutionContext"},
    BACKENDS / "_trt_session.py": {},
}  # fmt: skip
#: Asked for with ``hasattr`` before it is used: there in one of them only.
GUARDED = {
    ("IBuilderConfig", "set_compute_capability"), ("IBuilderConfig", "num_compute_capabilities"),
    ("IRuntimeConfig", "cuda_graph_strategy"), ("CudaGraphStrategy", ""), ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
}  # fmt: skip
#: Members of the module itself that are neither classes nor enumerations.
PLAIN = {"__name__", "__version__", "__init__"}


def calls(path: Path) -> set[tuple[str, str]]:
    """Return (class or enumeration, member) of everything of TensorRT's that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr not in PLAIN:
            base, inner = last_name(node.value), getattr(node.value, "value", None)
            if base in ("trt", "_trt"):
                found.add((node.attr, ""))
            elif last_name(inner) in ("trt", "_trt"):
                found.add((base, node.attr))
            elif base in FILES[path] and not is_record(node.value):
                found.add((FILES[path][base], node.attr))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_member":
            found.add((ast.literal_eval(node.args[1]), ""))
    return found


def last_name(node: ast.AST | None) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def is_record(node: ast.AST) -> bool:
    """Whether a name stands for a field of a record of ours, such as ``record.weights``."""
    return isinstance(node, ast.Attribute) and last_name(node.value) in ("record", "variant")


def test_the_check_sees_calls():
    used = {call for path in FILES for call in calls(path)}
    assert {
        ("Builder", "build_serialized_network"), ("MemoryPoolType", "WORKSPACE"), ("ILogger", "ERROR"),
        ("ICudaEngine", "create_engine_inspector"), ("IExecutionContext", "execute_async_v3"),
        ("OnnxParserRefitter", "refit_from_file"), ("IRuntimeConfig", "cuda_graph_strategy"),
    } <= used  # fmt: skip


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
