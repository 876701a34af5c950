"""What ONNX Runtime's runtimes share: options, sessions, versions.

Session options: https://onnxruntime.ai/docs/api/python/api_summary.html#sessionoptions
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import RefusedInputError, SessionError, first_line
from mlflow_tdeploy.core.hardware import usable_cores
from mlflow_tdeploy.core.tensors import Arrays, Signature, numpy_dtype
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.affinity import move_to, processors, release
from mlflow_tdeploy.runtime.base import Compat, Fit, Session
from mlflow_tdeploy.runtime.options import SessionOptions, check_choice

#: A provider by name, or with its options.
Provider = str | tuple[str, dict[str, Any]]
_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
#: y = x + x as an ONNX model (opset 17, IR 8): proves that sessions open and run.
_SELF_TEST = "CAg6PwoOCgF4CgF4EgF5IgNBZGQSCXNlbGZfdGVzdFoQCgF4EgsKCQgBEgUKAxIBbmIQCgF5EgsKCQgBEgUKAxIBbkIECgAQEQ=="


@dataclass(frozen=True)
class OrtOptions:
    """ONNX Runtime's session options that can be set.

    Attributes:
        spinning: Whether waiting operator threads spin, where ``intra_op_threads`` is given.
        arena: Whether freed memory is kept for the next run.
        graph_level: ``disable``, ``basic``, ``extended``, ``layout`` or ``all``.
        execution_mode: ``sequential`` or ``parallel``.
        profiling: Path prefix of a profile to write; empty for none.
    """

    spinning: bool = False
    arena: bool = True
    graph_level: str = "all"
    execution_mode: str = "sequential"
    profiling: str = ""

    def __post_init__(self) -> None:
        check_choice("graph_level", self.graph_level, _LEVELS)
        check_choice("execution_mode", self.execution_mode, ("sequential", "parallel"))


def open_graph(
    root: Path, variant: Variant, options: SessionOptions, providers: Sequence[Provider], lacking: Sequence[str] = ()
) -> Any:
    """Return an ``InferenceSession`` of a variant's graph.

    Args:
        root: The bundle's folder.
        variant: The variant.
        options: How to run it.
        providers: The one that must be used, and what it may fall back on for single operators.
        lacking: Which libraries of that provider could not be loaded, for the message.

    Raises:
        SessionError: It cannot be opened, or ONNX Runtime left out the first of the providers: it does so without an
            error where a library is missing.
    """
    try:
        import onnxruntime as ort

        session = ort.InferenceSession(
            str(root / variant.entry),
            sess_options=_session_options(ort, options),
            providers=list(providers),
            disabled_optimizers=list(variant.session.get("disabled_optimizers", [])) or None,
        )
    except Exception as error:  # onnxruntime's classes share no base of their own
        raise SessionError(f"ONNX Runtime cannot open variant '{variant.id}': {first_line(error)}") from error
    require_provider(session, providers[0], lacking)
    return session


def require_provider(session: Any, wanted: Provider, lacking: Sequence[str] = ()) -> None:
    """Make sure that a session uses the provider it was made for; ``lacking`` says why it may not.

    Raises:
        SessionError: It does not.
    """
    name, found = wanted if isinstance(wanted, str) else wanted[0], session.get_providers()
    if name not in found:
        raise SessionError(
            f"ONNX Runtime left out its {name} and would use {', '.join(found)}: a library that it needs cannot be "
            f"loaded (CUDA, cuDNN or TensorRT of the versions that onnxruntime-gpu was built for)."
            f"{' '.join(['', *lacking])}"
        )


def self_test(providers: Sequence[Provider], lacking: Sequence[str] = ()) -> str:
    """Open and run a one-node graph; returns what was used. ``lacking`` is told where the first provider is not.

    Raises:
        SessionError: It computed something else, or without the first provider.
    """
    import onnxruntime as ort

    session = ort.InferenceSession(base64.b64decode(_SELF_TEST), providers=list(providers))
    require_provider(session, providers[0], lacking)
    (result,) = session.run(None, {"x": np.array([1.0, 2.0], np.float32)})
    if result.tolist() != [2.0, 4.0]:
        raise SessionError(f"ONNX Runtime computed {result.tolist()} for 1+1 and 2+2.")
    return f"onnxruntime {ort.__version__}: {', '.join(session.get_providers())}"


def too_old(variant: Variant, version: str, fit: Fit) -> Compat | None:
    """Return that a variant needs a newer ONNX Runtime than this one, or None.

    Args:
        variant: The variant.
        version: The host's version; empty where that is not known.
        fit: What the fit would be otherwise.
    """
    needed = variant.requires.get("onnxruntime", "")
    if not needed or not version or fit is Fit.UNSUPPORTED or _numbers(version) >= _numbers(needed):
        return None
    return Compat(Fit.UNSUPPORTED, f"needs onnxruntime >= {needed}, this host has {version}", otherwise=fit)


class OrtSession(Session):
    """An ``InferenceSession``; its ``run`` is safe from several threads and releases the GIL.

    Args:
        session: The ``InferenceSession``.
        variant: What it was opened from.
        signature: The model's.
        processor: Where the calling thread runs meanwhile; None for anywhere.
    """

    def __init__(self, session: Any, variant: Variant, signature: Signature, processor: int | None = None) -> None:
        self._session = session
        self._processor = processor
        self._variant = variant
        self._outputs = [spec.name for spec in signature.outputs]
        self._cast_in = {
            s.name: numpy_dtype(variant.dtypes[s.name]) for s in signature.inputs if s.name in variant.dtypes
        }
        self._cast_out = {s.name: numpy_dtype(s.dtype) for s in signature.outputs if s.name in variant.dtypes}
        known = {node.name for node in session.get_outputs()}
        if lacking := [name for name in self._outputs if name not in known]:
            raise SessionError(
                f"Variant '{variant.id}' has no output '{lacking[0]}'; it has {', '.join(sorted(known))}."
            )

    def infer(self, feeds: Arrays) -> Arrays:
        """Run the graph."""
        session = self._session
        if session is None:
            raise SessionError(f"The session of variant '{self._variant.id}' is closed.")
        if self._cast_in:
            feeds = {n: a.astype(self._cast_in[n], copy=False) if n in self._cast_in else a for n, a in feeds.items()}
        before = move_to(self._processor)
        try:
            values = self._run(session, feeds)
        except SessionError:
            raise
        except Exception as error:
            if "INVALID_ARGUMENT" in str(error):
                raise RefusedInputError(
                    f"ONNX Runtime refused a value of this request in variant '{self._variant.id}': "
                    f"{first_line(error)}. Look for an index beyond a table, such as a token id that the model has not."
                ) from error
            raise SessionError(f"ONNX Runtime failed in variant '{self._variant.id}': {first_line(error)}") from error
        finally:
            release(before)
        outputs = dict(zip(self._outputs, values, strict=True))
        for name, dtype in self._cast_out.items():
            outputs[name] = outputs[name].astype(dtype, copy=False)
        return outputs

    def _run(self, session: Any, feeds: Arrays) -> list[Any]:
        return list(session.run(self._outputs, feeds))

    def close(self) -> None:
        """Drop the session; a run in progress ends first."""
        self._session = None

    @property
    def device(self) -> str:
        """The first provider that ONNX Runtime really uses."""
        return str(self._session.get_providers()[0]) if self._session else "closed"


def placement(options: SessionOptions) -> tuple[int, ...]:
    """Return the processors that a session's operator threads keep to, the caller's first; nothing for anywhere.

    Only a session for lone requests ties them: callers of any other would all come to the same processor.
    """
    return processors(options.intra_op_threads) if options.lone else ()


def _session_options(ort: Any, options: SessionOptions) -> Any:
    own, settings = options.settings(OrtOptions), ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = options.intra_op_threads or 1  # 0 would be one per core
    settings.enable_cpu_mem_arena = own.arena
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[own.graph_level])
    parallel = own.execution_mode == "parallel"
    settings.execution_mode = ort.ExecutionMode.ORT_PARALLEL if parallel else ort.ExecutionMode.ORT_SEQUENTIAL
    # With one inter-op thread ONNX Runtime would quietly run sequentially.
    settings.inter_op_num_threads = max(2, options.threads or usable_cores()) if parallel else 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if own.spinning else "0")
    if placed := placement(options)[1:]:
        ids = ";".join(str(processor + 1) for processor in placed)  # ONNX Runtime counts from one
        settings.add_session_config_entry("session.intra_op_thread_affinities", ids)
    if own.profiling:
        Path(own.profiling).parent.mkdir(parents=True, exist_ok=True)  # else nothing is written, and nothing said
        settings.enable_profiling = True
        settings.profile_file_prefix = own.profiling
    return settings


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())
