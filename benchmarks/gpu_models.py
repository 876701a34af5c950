"""The models of ``make bench-gpu``: three encoder shapes with random weights, their graphs, inputs and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.tensors import Arrays, Dim, Signature, TensorSpec

#: Batch and tokens of a call.
Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = ((1, 16), (1, 128), (16, 384), (32, 128))


@dataclass(frozen=True)
class Encoder:
    """A BERT encoder by its sizes.

    Attributes:
        name: For the table.
        hidden: Width of a token's vector.
        layers: Number of layers.
        heads: Attention heads.
        vocabulary: Number of token ids.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int = 30522

    @property
    def products(self) -> int:
        """Weights that are multiplied with every token: four projections and a feed-forward part of four times."""
        return 12 * self.layers * self.hidden**2

    def operations(self, shape: Shape) -> float:
        """Return the floating point operations of a call: matrix products, attention's included."""
        batch, tokens = shape
        return 2.0 * batch * tokens * (self.products + 2 * self.layers * tokens * self.hidden)

    def traffic(self, shape: Shape, width: int) -> float:
        """Return the bytes that a call moves at least: every weight once, and the answer.

        Args:
            shape: Batch and tokens.
            width: Bytes of a number.
        """
        batch, tokens = shape
        return float(width * self.products + batch * tokens * (16 + width * self.hidden))

    def module(self) -> Any:
        """Return the torch module on the CPU, with weights that are the same every time."""
        import torch
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, intermediate_size=4 * self.hidden,
        )  # fmt: skip
        return BertModel(config, add_pooling_layer=False).eval()

    def signature(self) -> Signature:
        """Return its inputs and outputs, for all of :data:`SHAPES`."""
        ids = [TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
        out = TensorSpec("last_hidden_state", "float32", ("batch", "sequence", self.hidden))
        return Signature((Dim("batch", 1, 16, 32), Dim("sequence", 1, 128, 384)), tuple(ids), (out,))

    def feeds(self, shape: Shape, seed: int) -> Arrays:
        """Return random tokens in rows of different lengths."""
        random, (batch, tokens) = np.random.default_rng(seed), shape
        lengths = random.integers(max(1, tokens // 2), tokens + 1, batch)
        lengths[0] = tokens
        mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
        return {"input_ids": random.integers(0, self.vocabulary, shape) * mask, "attention_mask": mask}


ENCODERS = (
    Encoder("MiniLM-L6 shape", 384, 6, 12),
    Encoder("BERT-base shape", 768, 12, 12),
    Encoder("BERT-large shape", 1024, 24, 16),
)
#: For a smoke run where there is no GPU.
TINY = Encoder("tiny", 32, 2, 2, 100)


def make_graphs(encoder: Encoder, folder: Path) -> None:
    """Export an encoder to ``fp32/model.onnx`` and ``fp16/model.onnx`` below a folder.

    Raises:
        ImportError: What exporting takes is not installed.
        TDeployError: It cannot be exported.
    """
    from mlflow_tdeploy.build.export import export_module
    from mlflow_tdeploy.build.graphs import simplify
    from mlflow_tdeploy.build.half import to_fp16

    for part in ("exported", "fp32", "fp16"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    exported = folder / "exported" / "model.onnx"
    export_module(encoder.module(), encoder.feeds((2, 16), 0), encoder.signature(), exported)
    simplify(exported, folder / "fp32" / "model.onnx")
    to_fp16(folder / "fp32" / "model.onnx", folder / "fp16" / "model.onnx")


def reference(module: Any, feeds: Arrays) -> np.ndarray:
    """Return the module's answer in full precision on the CPU; positions that are padding are zero."""
    import torch

    with torch.inference_mode():
        out = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    return valid(out.last_hidden_state.numpy(), feeds)


def valid(states: np.ndarray, feeds: Arrays) -> np.ndarray:
    """Return the vectors of a batch with those of padding set to zero: nobody reads them."""
    return np.asarray(states, np.float32) * feeds["attention_mask"][:, :, None]
