"""One vector per text: pooling and normalization are part of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mlflow_tdeploy.core.budget import VECTOR_BUDGET, Budget
from mlflow_tdeploy.core.compare import Comparison, Rows
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Head, Param
from mlflow_tdeploy.core.tasks._text import TextConfig, TextEncoded, TextTask
from mlflow_tdeploy.core.tensors import Array, Arrays

OUTPUT = "sentence_embedding"


@dataclass(frozen=True)
class EmbeddingConfig(TextConfig):
    """Settings of sentence embeddings.

    Attributes:
        prompts: Texts that come before every text, by name; those of the SentenceTransformer.
        default_prompt: Name of the one that comes there unless a request says otherwise; empty for none.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.default_prompt and self.default_prompt not in self.prompts:
            raise InvalidInputError(f"The default prompt {self.default_prompt!r} is none of {list(self.prompts)}.")


@TASKS.register("sentence-embedding")
class SentenceEmbedding(TextTask):
    """Returns a float array (texts, width), as ``SentenceTransformer.encode`` does, prompts included."""

    name: ClassVar[str] = "sentence-embedding"
    settings: ClassVar[type] = EmbeddingConfig
    params: ClassVar[tuple[Param, ...]] = (
        Param(
            "prompt_name", "string", "", "Which of the model's prompts comes before each text; empty for its default."
        ),
        Param("prompt", "string", None, "A text to come before each text instead; an empty one for none at all."),
    )
    encoding: ClassVar[tuple[str, ...]] = ("prompt_name", "prompt")
    head: ClassVar[Head | None] = Head(OUTPUT)  # of a SentenceTransformer
    default_budget: ClassVar[Budget] = VECTOR_BUDGET

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check ``prompt_name``."""
        checked = super().check_params(params)
        if (name := checked["prompt_name"]) and name not in self.config.prompts:
            known = ", ".join(self.config.prompts) or "none"
            raise InvalidInputError(f"prompt_name is {shown(name)}, and the model's prompts are: {known}.")
        return checked

    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize the texts, each with its prompt before it."""
        asked = params or {}
        before = asked.get("prompt")
        if before is None:
            before = self.config.prompts.get(asked.get("prompt_name") or self.config.default_prompt, "")
        return super().encode([f"{before}{item}" for item in items] if before else items, params)

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return one vector per text."""
        return list(outputs[OUTPUT][:count])

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> Array:
        """Return the vectors as one array (texts, width)."""
        array: Array = np.array(answers)  # faster than np.stack for a lone text
        return array

    def answer_form(self) -> AnswerForm:
        """Return an array of the embedding's width."""
        spec = next(spec for spec in self.signature.outputs if spec.name == OUTPUT)
        width = spec.shape[-1]
        return AnswerForm("array", width=width if isinstance(width, int) else -1, name=OUTPUT, dtype=spec.dtype)

    def comparison(self) -> Comparison:
        """Compare vector by vector."""
        return _VectorComparison()


class _VectorComparison(Comparison):
    def __init__(self) -> None:
        self._rows = Rows()

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        self._rows.add(reference[OUTPUT], got[OUTPUT])

    def metrics(self) -> dict[str, float]:
        return self._rows.metrics()
