"""Labels and scores, as the Hugging Face pipeline ``text-classification`` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mlflow_tdeploy.core.columns import TEXT, TEXT_PAIR, Column
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Field, Head, Param
from mlflow_tdeploy.core.tasks._classes import FUNCTION, OUTPUT, Classifier
from mlflow_tdeploy.core.tasks._text import TextConfig, TextEncoded, TextTask


@dataclass(frozen=True)
class ClassificationConfig(TextConfig):
    """Settings of a classifier.

    Attributes:
        labels: Name of each class, by index.
        function_to_apply: From logits to scores, chosen from the model's config as the pipeline does.
        pairs: Whether it was made for pairs of texts, as far as is known: it is checked with such then.
    """

    labels: tuple[str, ...] = ()
    function_to_apply: Literal["softmax", "sigmoid", "none"] = "softmax"
    pairs: bool = False


@TASKS.register("text-classification")
class TextClassification(Classifier, TextTask):
    """Returns ``{"label", "score"}`` per text, or per pair of texts; lists of them where ``top_k`` is not 1."""

    name: ClassVar[str] = "text-classification"
    settings: ClassVar[type] = ClassificationConfig
    head: ClassVar[Head | None] = Head(
        OUTPUT, architecture="ForSequenceClassification", auto_class="AutoModelForSequenceClassification"
    )
    columns: ClassVar[tuple[Column, ...]] = (TEXT, TEXT_PAIR)
    params: ClassVar[tuple[Param, ...]] = (
        Param("top_k", "integer", 1, "How many labels per text, best first; 0 for all."),
        FUNCTION,
    )

    @classmethod
    def settings_of(
        cls, config: Mapping[str, Any], width: int, labels: Sequence[str] | None, pipeline: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return labels in class order, what the pipeline applies to the logits, and whether texts come in pairs."""
        found = super().settings_of(config, width, labels, pipeline)
        entails = any(name.lower().startswith("entail") for name in found["labels"])
        return {**found, "pairs": bool(pipeline.get("pairs")) or entails}

    def sample(self, texts: Sequence[str], like: Any = None) -> tuple[Any, ...]:
        """Return texts; each with the next one, where others are pairs, or the model was made for them."""
        if isinstance(like, str) or (like is None and not self.config.pairs):
            return tuple(texts)
        return tuple(zip(texts, [*texts[1:], *texts[:1]], strict=True))

    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize the texts or pairs; a second text that is empty is none, as for the pipeline."""
        return super().encode([item if isinstance(item, str) or item[1] else item[0] for item in items], params)

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[Any]:
        """Return one record per text, or one list of records where several labels were asked for."""
        return [answer[0] for answer in answers] if params["top_k"] == 1 else answers

    def answer_form(self) -> AnswerForm:
        """Return a label and a score per text."""
        return AnswerForm("records", fields=(Field("label", "string"), Field("score", "double")))
