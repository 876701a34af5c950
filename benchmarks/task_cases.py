"""What ``benchmarks.tasks`` measures: models of MiniLM's size, or ViT-S, their requests, and who else answers them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import peers

MAX_LENGTH = 256
LABELS = ("news", "science", "sport")
#: Documents of a query.
DOCUMENTS = 4
#: Of ViT-S, with 16 x 16 pixels a token: 197 tokens.
_VIT = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
_TEMPLATE = "This example is {}."
Items = Callable[[Sequence[str]], list[Any]]


@dataclass(frozen=True)
class Case:
    """A task as it is measured.

    Attributes:
        name: What it is called in the table.
        task: The task.
        auto: The class of transformers with its head; empty for the SentenceTransformer itself.
        items: Items of a request made of texts.
        rows: Texts, or pairs of them, that a graph is asked with, for items: a floor's own tokenization.
        params: Parameters of the request.
        theirs: From a model's folder to what answers items, as a user of transformers writes it; None for none.
        config: Settings of the model.
        images: Whether its items are images.
    """

    name: str
    task: str
    auto: str
    items: Items
    rows: Items
    params: Mapping[str, Any] = field(default_factory=dict)
    theirs: Callable[[Path], Callable[[list[Any]], Any]] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    images: bool = False


def write_model(case: Case, folder: Path) -> Path:
    """Write MiniLM with a task's head, whose weights are random, to a folder; return it."""
    import torch
    import transformers

    if not case.auto:
        return peers.MODEL
    torch.manual_seed(0)
    if case.images:
        config = transformers.ViTConfig(**_VIT, **case.config)
        getattr(transformers, case.auto).from_config(config).eval().save_pretrained(folder)
        transformers.ViTImageProcessorPil().save_pretrained(folder)
        return folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(peers.MODEL, model_max_length=MAX_LENGTH)
    model = getattr(transformers, case.auto).from_pretrained(peers.MODEL, **case.config)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _pipeline(task: str, **more: Any) -> Callable[[Path], Callable[[list[Any]], Any]]:
    def make(folder: Path) -> Callable[[list[Any]], Any]:
        from transformers import pipeline

        asks = pipeline(task, model=str(folder), device="cpu", **more)
        return lambda items: asks(items)

    return make


def _pictures(task: str) -> Callable[[Path], Callable[[list[Any]], Any]]:
    def make(folder: Path) -> Callable[[list[Any]], Any]:
        from PIL import Image
        from transformers import pipeline

        asks = pipeline(task, model=str(folder), device="cpu")
        return lambda files: asks([Image.open(io.BytesIO(file)) for file in files])

    return make


def _zero_shot(folder: Path) -> Callable[[list[Any]], Any]:
    from transformers import pipeline

    asks = pipeline("zero-shot-classification", model=str(folder), device="cpu")
    return lambda items: asks(items, list(LABELS))


def _ranking(folder: Path) -> Callable[[list[Any]], Any]:
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(folder), device="cpu")
    return lambda items: [encoder.rank(query, list(documents), show_progress_bar=False) for query, documents in items]


def _embedding(folder: Path) -> Callable[[list[Any]], Any]:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(folder), device="cpu")
    return lambda items: encoder.encode(items, show_progress_bar=False)


def _as_they_are(items: Sequence[Any]) -> list[Any]:
    return list(items)


def _pairs(texts: Sequence[str]) -> list[Any]:
    return [{"text": text, "text_pair": other} for text, other in zip(texts, reversed(texts), strict=True)]


def _questions(texts: Sequence[str]) -> list[Any]:
    return [{"question": f"What is {text.split()[0]}?", "context": text} for text in texts]


def _queries(texts: Sequence[str]) -> list[Any]:
    size = len(texts)
    return [
        (" ".join(text.split()[:4]), tuple(texts[(index + more) % size] for more in range(DOCUMENTS)))
        for index, text in enumerate(texts)
    ]


_CLASSES = {"num_labels": 3}
_ENTITIES = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-ORG", 4: "I-ORG"}}
_ENTAILED = {
    "id2label": {0: "contradiction", 1: "neutral", 2: "entailment"},
    "label2id": {"contradiction": 0, "neutral": 1, "entailment": 2},
}
CASES = (
    Case(
        "text-classification", "text-classification", "AutoModelForSequenceClassification", _as_they_are, _as_they_are,
        theirs=_pipeline("text-classification"), config=_CLASSES,
    ),
    Case(
        "text-classification of pairs", "text-classification", "AutoModelForSequenceClassification", _pairs,
        lambda items: [(one["text"], one["text_pair"]) for one in items], theirs=_pipeline("text-classification"),
        config=_CLASSES,
    ),
    Case(
        "token-classification", "token-classification", "AutoModelForTokenClassification", _as_they_are, _as_they_are,
        {"aggregation_strategy": "simple"}, _pipeline("token-classification", aggregation_strategy="simple"), _ENTITIES,
    ),
    Case(
        "question-answering", "question-answering", "AutoModelForQuestionAnswering", _questions,
        lambda items: [(one["question"], one["context"]) for one in items],
    ),
    Case(
        "zero-shot-classification", "zero-shot-classification", "AutoModelForSequenceClassification", _as_they_are,
        lambda items: [(text, _TEMPLATE.format(label)) for text in items for label in LABELS],
        {"candidate_labels": list(LABELS)}, _zero_shot, _ENTAILED,
    ),
    Case(
        "fill-mask", "fill-mask", "AutoModelForMaskedLM", lambda texts: [f"{text} [MASK]" for text in texts],
        _as_they_are, theirs=_pipeline("fill-mask"),
    ),
    Case(
        "text-ranking", "text-ranking", "AutoModelForSequenceClassification", _queries,
        lambda items: [(query, one) for query, documents in items for one in documents], theirs=_ranking,
        config={"num_labels": 1},
    ),
    Case("sentence-embedding", "sentence-embedding", "", _as_they_are, _as_they_are, theirs=_embedding),
    Case(
        "image-classification", "image-classification", "AutoModelForImageClassification", _as_they_are, _as_they_are,
        theirs=_pictures("image-classification"), config={"num_labels": 1000}, images=True,
    ),
    Case(
        "image-feature-extraction", "image-feature-extraction", "AutoModel", _as_they_are, _as_they_are,
        theirs=_pictures("image-feature-extraction"), images=True,
    ),
    Case(
        "feature-extraction", "feature-extraction", "AutoModel", _as_they_are, _as_they_are,
        theirs=_pipeline("feature-extraction"),
    ),
)  # fmt: skip
