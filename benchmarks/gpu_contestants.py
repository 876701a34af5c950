"""What ``make bench-gpu`` measures, one contestant per process: a crash or a missing package costs its own rows only.

Every call takes numpy arrays in host memory and returns one there, so all pay for the same copies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_models import Encoder, Shape, valid
from mlflow_tdeploy.core.compare import Rows
from mlflow_tdeploy.core.measure import Timing, interleave
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.options import SessionOptions

#: Runs a call: inputs by name to the hidden states.
Call = Callable[[Arrays], np.ndarray]
#: Makes the same call without a session of ours, for one set of inputs.
Bare = Callable[[Arrays], Callable[[], object]]
OUTPUT = "last_hidden_state"
#: Begins the lines of a child that are rows.
PREFIX = "row: "
#: Most calls of a row, and the seconds after which it ends.
_ROUNDS, _SECONDS, _WARMUP = 300, 1.5, 3


@dataclass(frozen=True)
class Opened:
    """A contestant, ready to be called.

    Attributes:
        call: Runs it.
        bare: What a call takes without our session, where there is one.
    """

    call: Call
    bare: Bare | None = None


@contextlib.contextmanager
def torch_call(encoder: Encoder, folder: Path, device: str, *, half: bool, compiled: bool) -> Iterator[Opened]:
    """Open the torch module on a device; full precision without TF32, as torch has it by default."""
    import torch

    del folder
    module = encoder.module().to(device)
    module = module.half() if half else module
    run = torch.compile(module) if compiled else module

    def call(feeds: Arrays) -> np.ndarray:
        with torch.inference_mode():
            moved = {name: torch.from_numpy(array).to(device) for name, array in feeds.items()}
            return np.asarray(run(**moved).last_hidden_state.float().cpu().numpy())

    yield Opened(call)


@contextlib.contextmanager
def ort_call(encoder: Encoder, folder: Path, device: str, *, precision: str) -> Iterator[Opened]:
    """Open a portable graph through this package's own runtime of ONNX Runtime's CUDA provider."""
    with contextlib.suppress(ImportError):
        import torch  # brings the CUDA libraries that the provider needs

        del torch
    runtime = "ort-cuda" if device == "cuda" else "ort-cpu"
    with _session(runtime, folder / precision, f"onnx-{precision}", "onnx", "model.onnx", encoder) as session:
        yield Opened(lambda feeds: session.infer(feeds)[OUTPUT])


@contextlib.contextmanager
def trt_call(encoder: Encoder, folder: Path, device: str, *, module: str, precision: str) -> Iterator[Opened]:
    """Build an engine with this package's builder and open it through its own runtime."""
    from mlflow_tdeploy.build.engine import build_engine
    from mlflow_tdeploy.build.engine_options import EngineOptions, tensorrt_module
    from mlflow_tdeploy.runtime import probe

    if device != "cuda":
        raise RuntimeError("TensorRT runs on a GPU only")
    plan = folder / precision / f"{module}.plan"
    if not plan.exists():
        build_engine(
            tensorrt_module(module), folder / precision / "model.onnx", plan, encoder.signature(), probe.host(),
            EngineOptions(precision=precision, module=module),
        )  # fmt: skip
    with _session(
        module.replace("_", "-"), folder / precision, f"trt-{precision}", "trt", plan.name, encoder
    ) as session:
        bare = functools.partial(_bare, module, plan, encoder)
        yield Opened(lambda feeds: session.infer(feeds)[OUTPUT], bare)


def _bare(module: str, plan: Path, encoder: Encoder, feeds: Arrays) -> Callable[[], object]:
    """Return the least that a call takes: copies of page-locked memory, ``execute_async_v3`` and a wait."""
    from mlflow_tdeploy.runtime.backends._cuda import Cuda

    trt, cuda = importlib.import_module(module), Cuda.load()
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.read_bytes())
    context, stream = engine.create_execution_context(), cuda.stream()
    context.set_optimization_profile_async(0, stream)
    cuda.wait(stream)
    out = np.empty((*feeds["input_ids"].shape, encoder.hidden), np.float32)
    sent = [_placed(cuda, context, name, array) for name, array in feeds.items()]
    for name, array in feeds.items():
        context.set_input_shape(name, array.shape)
    answer = _placed(cuda, context, OUTPUT, out)

    def call() -> None:
        for device, host, size in sent:
            cuda.to_device(device, host, size, stream)
        context.execute_async_v3(stream)
        device, host, size = answer
        cuda.to_host(host, device, size, stream)
        cuda.wait(stream)

    return call


def _placed(cuda: Any, context: Any, name: str, array: np.ndarray) -> tuple[int, int, int]:
    """Return the device and host address of a tensor's memory and its bytes, with the array in it."""
    device = cuda.allocate(array.nbytes)
    view, host = cuda.pinned(array.nbytes)
    view[:] = array.reshape(-1).view(np.uint8)
    context.set_tensor_address(name, device)
    return device, host, array.nbytes


@contextlib.contextmanager
def _session(runtime: str, folder: Path, name: str, form: Any, entry: str, encoder: Encoder) -> Iterator[Any]:
    precision = name.rpartition("-")[2]
    variant = Variant(
        id=name, format=form, precision=Precision(precision, precision), device="any", entry=entry, files=()
    )  # fmt: skip
    session = RUNTIMES.get(runtime)().open(folder, variant, encoder.signature(), SessionOptions())
    try:
        yield session
    finally:
        session.close()


#: How to open each contestant, and the bytes of a number in it. The first is what the others are compared with.
CONTESTANTS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "PyTorch fp32": (torch_call, {"half": False, "compiled": False}, 4),
    "PyTorch fp16": (torch_call, {"half": True, "compiled": False}, 2),
    "torch.compile fp16": (torch_call, {"half": True, "compiled": True}, 2),
    "ORT-CUDA fp32": (ort_call, {"precision": "fp32"}, 4),
    "ORT-CUDA fp16": (ort_call, {"precision": "fp16"}, 2),
    "TensorRT fp32": (trt_call, {"module": "tensorrt", "precision": "fp32"}, 4),
    "TensorRT fp16": (trt_call, {"module": "tensorrt", "precision": "fp16"}, 2),
    "TensorRT-RTX fp32": (trt_call, {"module": "tensorrt_rtx", "precision": "fp32"}, 4),
    "TensorRT-RTX fp16": (trt_call, {"module": "tensorrt_rtx", "precision": "fp16"}, 2),
}


def run(contestant: str, encoder: Encoder, folder: Path, device: str, shapes: list[Shape]) -> Iterator[dict[str, Any]]:
    """Measure a contestant at every shape, and first how far it is from the reference of each.

    Args:
        contestant: Name out of :data:`CONTESTANTS`.
        encoder: The model.
        folder: Where its graphs lie, and ``reference-<batch>x<tokens>.npz`` with inputs and answer of each shape.
        device: ``cuda`` or ``cpu``.
        shapes: Batch and tokens.
    """
    opener, settings, _ = CONTESTANTS[contestant]
    with opener(encoder, folder, device, **settings) as opened:
        for shape in shapes:
            stored = dict(np.load(folder / f"reference-{shape[0]}x{shape[1]}.npz"))
            answer = stored.pop("answer")
            rows = Rows()
            rows.add(_flat(answer), _flat(valid(opened.call(stored), stored)))
            calls: dict[str, Callable[[], object]] = {"session": functools.partial(opened.call, stored)}
            if opened.bare is not None:
                calls["bare"] = opened.bare(stored)
            samples = interleave(calls, rounds=_ROUNDS, warmup=_WARMUP, seconds=_SECONDS * len(calls))
            timings = {name: Timing.of(seconds) for name, seconds in samples.items()}
            bare = {"bare_p50_ms": timings["bare"].p50_ms} if "bare" in timings else {}
            yield {"shape": shape, **timings["session"].as_metrics(), **bare, **rows.metrics()}


def _flat(states: np.ndarray) -> np.ndarray:
    return states.reshape(-1, states.shape[-1])


def main() -> None:
    """Run one contestant as a process of its own; prints a line of JSON per shape."""
    told = json.loads(sys.argv[1])
    encoder = Encoder(**told["encoder"])
    shapes = [(batch, tokens) for batch, tokens in told["shapes"]]
    for row in run(told["contestant"], encoder, Path(told["folder"]), told["device"], shapes):
        print(PREFIX + json.dumps(row), flush=True)


def told(contestant: str, encoder: Encoder, folder: Path, device: str, shapes: list[Shape]) -> str:
    """Return the argument of :func:`main`."""
    return json.dumps({
        "contestant": contestant, "encoder": dataclasses.asdict(encoder), "folder": str(folder), "device": device,
        "shapes": shapes,
    })  # fmt: skip


if __name__ == "__main__":
    main()
