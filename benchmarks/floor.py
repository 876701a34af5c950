"""The floor: what an able engineer reaches with ONNX Runtime and ``tokenizers`` alone, no MLflow.

The usual fused graph (plain attention, TorchScript export, ``onnxruntime.transformers.optimizer``), length-sorted
batches, pooling in numpy. Thread count and batch size are searched for each workload and precision, best one taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from benchmarks.peers import INPUTS, MAX_LENGTH, MODEL, export, pool, quiet
from mlflow_tdeploy.core.hardware import usable_cores
from mlflow_tdeploy.core.measure import interleave

Precision = Literal["fp32", "int8"]

THREADS = tuple(range(1, usable_cores() + 1))
BATCH_SIZES = (2, 4, 8, 16, 32, 64)
_LAYERS = 6
#: A candidate that takes this many times the best one's time is out after the first round of a search.
_NEAR = 1.4
_PAUSE = 0.03


def prepare(work: Path) -> None:
    """Make both graphs below ``work``; what is there already stays."""
    if not graph(work, "int8").exists():
        make(work / "floor")


def graph(work: Path, precision: Precision) -> Path:
    """Return where :func:`prepare` puts a graph."""
    return work / "floor" / f"{precision}.onnx"


def make(folder: Path, **exported: Any) -> None:
    """Make both graphs of a model of BERT's kind in a folder.

    Args:
        folder: The folder.
        exported: Of which model, see :func:`benchmarks.peers.export`.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    with quiet():
        export(folder / "plain.onnx", attention="eager", dynamo=False, **exported)
        fused = optimize_model(str(folder / "plain.onnx"), model_type="bert", num_heads=12, hidden_size=384)
        if (found := fused.get_fused_operator_statistics()["Attention"]) != _LAYERS:
            raise RuntimeError(f"{found} of {_LAYERS} attention layers were fused: this is not the usual floor.")
        fused.save_model_to_file(str(folder / "fp32.onnx"))
        _quantize(folder / "fp32.onnx", folder / "int8.onnx")


def _quantize(src: Path, dst: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        src,
        dst,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


@dataclass
class Floor:
    """Texts to vectors, or to whatever a graph answers, with a bare session.

    Attributes:
        session: An ``InferenceSession``.
        threads: Its threads, for the record.
        batch_size: Most texts per run.
        finish: What the graph answers and the mask → a row for each text.
    """

    session: Any
    threads: int
    batch_size: int
    finish: Callable[[np.ndarray, np.ndarray], np.ndarray] = pool

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_LENGTH)

    @property
    def settings(self) -> dict[str, int]:
        """What the search chose."""
        return {"intra_op_threads": self.threads, "batch_size": self.batch_size}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector per text, in order."""
        if len(texts) == 1:
            return self._run([self.tokenizer.encode(texts[0])])
        encodings = self.tokenizer.encode_batch_fast(texts)
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index].ids))
        vectors: np.ndarray | None = None
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            got = self._run([encodings[index] for index in chosen])
            vectors = np.empty((len(texts), got.shape[1]), got.dtype) if vectors is None else vectors
            vectors[chosen] = got
        assert vectors is not None
        return vectors

    def _run(self, encodings: Sequence[Any]) -> np.ndarray:
        rows = [encoding.ids for encoding in encodings]
        width = max(map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        feeds = dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))
        return self.finish(self.session.run(None, feeds)[0], mask)


def best_floor(
    path: Path,
    texts: Sequence[str],
    *,
    rounds: int = 5,
    finish: Callable[[np.ndarray, np.ndarray], np.ndarray] = pool,
) -> tuple[Floor, dict[str, float]]:
    """Return the fastest floor for a workload, and every candidate's median in ms.

    Args:
        path: The graph.
        texts: The workload.
        rounds: Rounds of the search's second part, between the candidates that were near the best in the first.
        finish: See :class:`Floor`.
    """
    sizes = BATCH_SIZES if len(texts) > 1 else (1,)
    candidates: dict[str, Floor] = {}
    for threads in THREADS:
        session = _session(path, threads)
        for size in sizes:
            candidates[f"{threads} threads, batches of {size}"] = Floor(session, threads, size, finish)
    calls = {name: _bound(floor, texts) for name, floor in candidates.items()}
    medians = _medians(interleave(calls, rounds=1, warmup=1, pause=_PAUSE))
    near = [name for name in calls if medians[name] <= _NEAR * min(medians.values())]
    finals = _medians(interleave({name: calls[name] for name in near}, rounds=rounds, warmup=0, pause=_PAUSE))
    return candidates[min(finals, key=finals.__getitem__)], {**medians, **finals}


def _medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.median(times)) * 1e3 for name, times in samples.items()}


def _session(path: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _bound(floor: Floor, texts: Sequence[str]) -> Any:
    return lambda: floor(texts)
