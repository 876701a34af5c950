"""Small models with random weights and the real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer(minilm_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def small() -> dict[str, int]:
    """Sizes of a tiny BERT that fits the real tokenizer."""
    return {
        "vocab_size": 30522,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }


@pytest.fixture
def encoder(small: dict[str, int]) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    return BertModel(BertConfig(**small))


@pytest.fixture
def classifier(small: dict[str, int]) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    return BertForSequenceClassification(BertConfig(**small, num_labels=3))
