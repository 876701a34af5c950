"""Documents in the order in which they answer a query, as sentence-transformers' ``CrossEncoder.rank`` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mlflow_tdeploy.core.budget import SPREAD, Budget, Limit
from mlflow_tdeploy.core.columns import Column
from mlflow_tdeploy.core.compare import Comparison
from mlflow_tdeploy.core.errors import InvalidInputError, ManifestError, shown
from mlflow_tdeploy.core.quality import RANKED, ranked
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Field, Head, Param
from mlflow_tdeploy.core.tasks._classes import OUTPUT, RAW_BUDGET, ScoreComparison, apply_function
from mlflow_tdeploy.core.tasks._text import TextConfig, TextEncoded, TextTask
from mlflow_tdeploy.core.tensors import Arrays, Signature

_FUNCTIONS = ("sigmoid", "none")
#: Where sentence-transformers writes what becomes of a score, in a model's config: since version 4, and before.
_SINCE, _BEFORE = ("sentence_transformers", "activation_fn"), "sbert_ce_default_activation_function"
_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none", "Softmax": "softmax"}
#: Words of a text that a made-up query is of.
_ASKED = 3


@dataclass(frozen=True)
class RankingConfig(TextConfig):
    """Settings of a model that ranks.

    Attributes:
        function_to_apply: From logits to scores; the order is the same.
    """

    function_to_apply: Literal["sigmoid", "none"] = "sigmoid"


@TASKS.register("text-ranking")
class TextRanking(TextTask):
    """Returns a list of ``{"corpus_id", "score"}`` per query, best first: the place of each document, and its score."""

    name: ClassVar[str] = "text-ranking"
    settings: ClassVar[type] = RankingConfig
    head: ClassVar[Head | None] = Head(
        OUTPUT,
        architecture="ForSequenceClassification",
        auto_class="AutoModelForSequenceClassification",
        told=False,
    )
    columns: ClassVar[tuple[Column, ...]] = (Column("query"), Column("documents", many=True))
    default_budget: ClassVar[Budget] = Budget((Limit("max_score_difference", "<=", 0.02), SPREAD))
    quality: ClassVar[tuple[str, ...]] = RANKED
    params: ClassVar[tuple[Param, ...]] = (
        Param("top_k", "integer", 0, "How many documents per query, best first; 0 for all."),
        Param("return_documents", "boolean", False, "Whether the documents are in the answer, as text."),
        Param("function_to_apply", "string", "", "sigmoid or none; empty for the model's own."),
    )

    def __init__(self, config: Mapping[str, Any], signature: Signature, assets: Path) -> None:
        super().__init__(config, signature, assets)
        scores = next((spec.shape[-1] for spec in signature.outputs if spec.name == OUTPUT), None)
        if isinstance(scores, int) and scores != 1:
            raise ManifestError(f"task_config of '{self.name}': a graph that returns {scores} scores instead of one.")

    @classmethod
    def settings_of(
        cls, config: Mapping[str, Any], width: int, labels: Sequence[str] | None, pipeline: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what becomes of a score, as sentence-transformers says it.

        Raises:
            InvalidInputError: The model has more than one class, or something else becomes of a score.
        """
        super().settings_of(config, width, labels, pipeline)
        if width != 1:
            raise InvalidInputError(
                f"Task '{cls.name}' needs a model with one score, and this one has {width} classes. Log it with "
                f"task='text-classification', which takes pairs of texts."
            )
        function = pipeline.get("function_to_apply") or function_named(saved_activation(config))
        if function not in _FUNCTIONS:
            raise InvalidInputError(f"Scores of task '{cls.name}' go through {', '.join(_FUNCTIONS)}, got {function}.")
        return {"function_to_apply": function}

    def usual_budget(self) -> Budget:
        """Return one without a limit on scores where these are the model's own numbers, of whatever scale."""
        return RAW_BUDGET if self.config.function_to_apply == "none" else self.default_budget

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check ``top_k`` and ``function_to_apply``."""
        checked = super().check_params(params)
        if checked["top_k"] < 0:
            raise InvalidInputError(f"top_k must be at least 1, or 0 for all documents, got {checked['top_k']}.")
        function = checked["function_to_apply"] or self.config.function_to_apply
        if function not in _FUNCTIONS:
            raise InvalidInputError(f"function_to_apply must be one of {', '.join(_FUNCTIONS)}, got {shown(function)}.")
        return {**checked, "function_to_apply": function}

    def sample(self, texts: Sequence[str], like: Any = None) -> tuple[Any, ...]:
        """Return queries made of texts, each with its text and the next one as documents."""
        following = [*texts[1:], *texts[:1]]
        return tuple(
            (" ".join(text.split()[:_ASKED]), pair) for text, *pair in zip(texts, texts, following, strict=True)
        )

    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize each query with each of its documents."""
        ends = np.cumsum([len(documents) for _, documents in items]).tolist()
        spans = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        pairs = [(query, one) for query, documents in items for one in documents]
        return self.encoded(items, self.tokenized(self.tokenizer, pairs, spans), spans)

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the score of each row."""
        return list(apply_function(outputs[OUTPUT][:count, 0], params["function_to_apply"]).tolist())

    def join(self, parts: Sequence[Any], encoded: Any, item: int, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the documents of a query, best first."""
        order = sorted(range(len(parts)), key=lambda place: -parts[place])[: params["top_k"] or None]
        answer = [{"corpus_id": place, "score": float(parts[place])} for place in order]
        if params["return_documents"]:
            for one in answer:
                one["text"] = encoded.texts[item][1][one["corpus_id"]]
        return answer

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[Any]:
        """Return one list of documents per query."""
        return answers

    def answer_form(self) -> AnswerForm:
        """Return a list of places and scores per query."""
        return AnswerForm("lists", fields=(Field("corpus_id", "long"), Field("score", "double")))

    def comparison(self) -> Comparison:
        """Compare scores."""
        return ScoreComparison(self.config.function_to_apply)

    def metric(self, answers: Any, labels: Sequence[Any]) -> dict[str, float]:
        """Return how far up the right documents are, see :func:`~mlflow_tdeploy.core.quality.ranked`.

        Args:
            answers: All documents of each query, best first.
            labels: The place of the one that is right for each, or a list of such places.
        """
        return ranked([[one["corpus_id"] for one in answer] for answer in answers], [_places(one) for one in labels])

    def check_labels(self, labels: Sequence[Any], items: Sequence[Any] = ()) -> None:
        """Make sure that each label is a document's place, or a list of places."""
        for index, label in enumerate(labels):
            places = _places(label)
            if places and index < len(items) and max(places) >= (count := len(items[index][1])):
                raise InvalidInputError(
                    f"The label {index} is the place {max(places)}, and item {index} has {count} documents: places are "
                    f"from 0 on."
                )
            if not places:
                raise InvalidInputError(
                    f"The label {index} must be the place of the document that is right, from 0 on, or a list of such, "
                    f"got {shown(label)}."
                )


def saved_activation(config: Mapping[str, Any]) -> str:
    """Return the path of the class that scores go through, as sentence-transformers writes it to a model's config."""
    return str((config.get(_SINCE[0]) or {}).get(_SINCE[1]) or config.get(_BEFORE) or "")


def function_named(activation: Any, usual: str = "Sigmoid") -> str:
    """Return what a class of torch does to a score.

    Args:
        activation: The class's path, such as ``torch.nn.modules.activation.Sigmoid``; empty for none.
        usual: What sentence-transformers takes without one.

    Raises:
        InvalidInputError: It is none of those that this task has.
    """
    name = str(activation or usual).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise InvalidInputError(
            f"The model's scores go through {shown(activation)}, which the logged model would not do. Those that it "
            f"does: {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _places(label: Any) -> set[int]:
    """Return the places in a label; none where it is no such label."""
    several = label if isinstance(label, (list, tuple, np.ndarray)) else [label]
    numbers = [one for one in several if isinstance(one, (int, float, np.number)) and not isinstance(one, bool)]
    whole = {int(one) for one in numbers if one >= 0 and float(one).is_integer()}
    return whole if len(numbers) == len(several) and all(one in whole for one in numbers) else set()
