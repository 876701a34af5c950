"""A small tokenizer and what belongs to it; without onnx, as the tests of ``core`` run where there is none."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from mlflow_tdeploy.core.tensors import TensorSpec

WORDS = ["[PAD]", "[UNK]", "a", "good", "bad", "film"]
WIDTH = 4
LABELS = ["bad", "good", "other"]
OUTPUTS = {
    "sentence-embedding": TensorSpec("sentence_embedding", "float32", ("batch", WIDTH)),
    "text-classification": TensorSpec("logits", "float32", ("batch", 3)),
    "feature-extraction": TensorSpec("last_hidden_state", "float32", ("batch", "sequence", WIDTH)),
    "zero-shot-classification": TensorSpec("logits", "float32", ("batch", 3)),
    "fill-mask": TensorSpec("logits", "float32", ("batch", "sequence", len(WORDS))),
    "token-classification": TensorSpec("logits", "float32", ("batch", "sequence", 3)),
}


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
