"""ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from mlflow_tdeploy.core.batching import DEFAULT_TOKEN_BUDGET
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.backends._ort import OrtOptions, OrtSession, open_graph, placement, self_test, too_old
from mlflow_tdeploy.runtime.base import RUNTIMES, Compat, Fit, Runtime, Session, TritonBackend
from mlflow_tdeploy.runtime.options import SessionOptions

_PROVIDER = "CPUExecutionProvider"


@RUNTIMES.register("ort-cpu")
class OrtCpu(Runtime):
    """Opens ONNX graphs, fused ones included, on the CPU."""

    name: ClassVar[str] = "ort-cpu"
    formats: ClassVar[frozenset[str]] = frozenset({"onnx", "ort"})
    tier: ClassVar[int] = 1
    preference: ClassVar[int] = 30
    token_budget: ClassVar[int] = DEFAULT_TOKEN_BUDGET
    settings: ClassVar[type | None] = OrtOptions
    triton: ClassVar[TritonBackend | None] = TritonBackend("onnxruntime", ".onnx")
    install: ClassVar[str] = "pip install 'mlflow-tdeploy[cpu]'"
    modules: ClassVar[Mapping[str, str]] = {"onnxruntime": "onnxruntime"}
    #: Each has the CPU provider.
    distributions: ClassVar[tuple[str, ...]] = (
        *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    )
    exclusive: ClassVar[bool] = True

    def probe(self, host: Fingerprint, variant: Variant) -> Compat:
        """Any ONNX graph runs; graphs fused for the CPU are at their best."""
        if variant.device not in ("any", "cpu"):
            return Compat(Fit.UNSUPPORTED, f"made for {'CUDA' if variant.device == 'cuda' else variant.device}")
        found = _compat(host, variant)
        return too_old(variant, self.version_on(host), found.fit) or found

    def open(self, root: Path, variant: Variant, signature: Signature, options: SessionOptions) -> Session:
        """Open the graph with the CPU provider only."""
        session = open_graph(root, variant, options, [_PROVIDER])
        return OrtSession(session, variant, signature, next(iter(placement(options)), None))

    def workers(self, options: SessionOptions, cores: int) -> int:
        """Batches side by side, a processor each: nothing inside an operator waits for another one."""
        return max(1, cores // (options.intra_op_threads or 1))

    def lone_options(self, options: SessionOptions, cores: int) -> SessionOptions | None:
        """A spinning thread on every core, unless the user said how many; the profile stays the first session's."""
        if options.intra_op_threads or cores == 1:
            return None
        return replace(options, intra_op_threads=cores, lone=True).with_own(spinning=True, profiling="")

    def self_test(self) -> str:
        """Open and run a one-node graph."""
        return self_test([_PROVIDER])


def _compat(host: Fingerprint, variant: Variant) -> Compat:
    """Return how well a graph for CPUs fits one, whatever the version of ONNX Runtime."""
    if variant.precision.name in ("fp16", "bf16"):
        return Compat(
            Fit.USABLE, f"CPUs compute {variant.precision.name} graphs in fp32 with casts around each operator"
        )
    if variant.precision.name == "int8" and not set(host.cpu_features) & {
        "avx512_vnni",
        "avx_vnni",
        "amx_int8",
        "asimddp",
    }:
        return Compat(Fit.USABLE, "this CPU has no int8 dot product (VNNI)")
    if variant.device == "cpu":
        return Compat(Fit.OPTIMAL, "fused for the CPU")
    return Compat(Fit.USABLE, "portable graph")
