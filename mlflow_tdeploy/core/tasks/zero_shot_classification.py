"""Labels that a request names, as the Hugging Face pipeline ``zero-shot-classification`` gives them to texts.

A model of natural language inference is asked, for each label, whether the text entails a sentence that names it
(https://arxiv.org/abs/1909.00161): a row for each text and label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlflow_tdeploy.core.budget import SPREAD, Budget, Limit
from mlflow_tdeploy.core.compare import Comparison
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.quality import CLASSIFIED, classified
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Field, Head, Param
from mlflow_tdeploy.core.tasks._classes import ScoreComparison, apply_function
from mlflow_tdeploy.core.tasks._text import TextConfig, TextEncoded, TextTask
from mlflow_tdeploy.core.tensors import Arrays

OUTPUT = "logits"
_TEMPLATE = "This example is {}."
#: What texts are asked for where variants are checked and a model was logged without labels of its own.
_SAMPLE = ("politics", "science", "an animal")


@dataclass(frozen=True)
class ZeroShotConfig(TextConfig):
    """Settings of a model of natural language inference.

    Attributes:
        entailment: The class that says that the second text follows from the first.
        contradiction: The class that says that it does not.
        candidate_labels: Labels for requests that name none; empty: each has to.
        hypothesis_template: Sentence about a label, which stands for ``{}``, unless a request says another.
        multi_label: Whether several labels may be right, whatever a request says.
    """

    entailment: int = 2
    contradiction: int = 0
    candidate_labels: tuple[str, ...] = ()
    hypothesis_template: str = _TEMPLATE
    multi_label: bool = False


@TASKS.register("zero-shot-classification")
class ZeroShotClassification(TextTask):
    """Returns ``{"sequence", "labels", "scores"}`` per text, best label first."""

    name: ClassVar[str] = "zero-shot-classification"
    settings: ClassVar[type] = ZeroShotConfig
    head: ClassVar[Head | None] = Head(
        OUTPUT,
        architecture="ForSequenceClassification",
        auto_class="AutoModelForSequenceClassification",
        told=False,
    )
    default_budget: ClassVar[Budget] = Budget((Limit("max_score_difference", "<=", 0.02), SPREAD))
    truncation: ClassVar[str] = "only_first"  # never the sentence about the label
    quality: ClassVar[tuple[str, ...]] = CLASSIFIED
    pipeline_arguments: ClassVar[tuple[str, ...]] = ("candidate_labels", "hypothesis_template")
    encoding: ClassVar[tuple[str, ...]] = ("candidate_labels", "hypothesis_template")
    params: ClassVar[tuple[Param, ...]] = (
        Param("candidate_labels", "string", [], "The labels to choose among; [] for the model's own.", many=True),
        Param("hypothesis_template", "string", "", "A sentence about a label, {}; empty for the model's own."),
        Param("multi_label", "boolean", False, "Whether several labels may be right; the model may be logged so."),
    )

    @classmethod
    def settings_of(
        cls, config: Mapping[str, Any], width: int, labels: Sequence[str] | None, pipeline: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return which classes are looked at, and what the pipeline asks.

        Raises:
            InvalidInputError: No class is called entailment: it is no model of natural language inference.
        """
        named = {str(name).lower(): int(index) for name, index in (config.get("label2id") or {}).items()}
        entails = next((index for name, index in named.items() if name.startswith("entail")), None)
        if entails is None:
            raise InvalidInputError(
                f"Task '{cls.name}' needs a model of natural language inference with a class called entailment; this "
                f"one's are {shown(list(config.get('label2id') or {}))}. Set model.config.label2id."
            )
        asked = pipeline.get("candidate_labels") if labels is None else labels
        asked = [one.strip() for one in asked.split(",")] if isinstance(asked, str) else asked
        return {
            "entailment": entails,
            "contradiction": width - 1 if entails == 0 else 0,  # as the pipeline has it
            "candidate_labels": list(asked or ()),
            "hypothesis_template": _checked_template(pipeline.get("hypothesis_template") or _TEMPLATE),
            "multi_label": bool(pipeline.get("multi_label", False)),
        }

    @property
    def usual(self) -> Mapping[str, Any]:
        """Parameters with some labels, where a model was logged without."""
        return {} if self.config.candidate_labels else {"candidate_labels": list(_SAMPLE)}

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check the labels and the template."""
        checked = super().check_params(params)
        labels = [label.strip() for label in checked["candidate_labels"]] or list(self.config.candidate_labels)
        if not labels or "" in labels:
            raise InvalidInputError(
                "The request names no labels to choose among. Pass params={'candidate_labels': ['news', 'sport']}, or "
                "log the model with labels=[…]."
                if not labels
                else f"candidate_labels has an empty one: {shown(labels)}."
            )
        if len(set(labels)) < len(labels):
            raise InvalidInputError(f"candidate_labels has one twice: {shown(labels)}.")
        template = _checked_template(checked["hypothesis_template"] or self.config.hypothesis_template)
        several = bool(checked["multi_label"] or self.config.multi_label)
        return {**checked, "candidate_labels": labels, "hypothesis_template": template, "multi_label": several}

    def check_encoding(self, params: Mapping[str, Any]) -> None:
        """Make sure that the sentences about labels leave room for a text."""
        room = self.longest - self.tokenizer.num_special_tokens_to_add(is_pair=True)
        for label, sentence in zip(params["candidate_labels"], _sentences(params), strict=True):
            if len(self.tokenizer.encode(sentence, add_special_tokens=False)) >= room:
                raise InvalidInputError(
                    f"The sentence about the label {shown(label)} leaves no room for a text: the model takes "
                    f"{self.longest} tokens. Shorten it."
                )

    def encode(self, items: Sequence[str], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize each text with a sentence about each label.

        Raises:
            InvalidInputError: A sentence is too long for the model.
        """
        asked = self.check_params(self.usual) if params is None else params
        self.check_encoding(asked)
        labels, sentences = asked["candidate_labels"], _sentences(asked)
        pairs = [(text, sentence) for text in items for sentence in sentences]
        spans = [range(begin, begin + len(labels)) for begin in range(0, len(pairs), len(labels))]
        return self.encoded(items, self.tokenized(self.tokenizer, pairs, spans), spans)

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the logits of each row."""
        return list(outputs[OUTPUT][:count])

    def join(self, parts: Sequence[Any], encoded: Any, item: int, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the labels of a text, best first."""
        logits, labels = np.stack(parts), params["candidate_labels"]
        if params["multi_label"] or len(labels) == 1:
            pairs = logits[:, [self.config.contradiction, self.config.entailment]]
            scores = apply_function(pairs, "softmax")[:, 1]
        else:
            scores = apply_function(logits[:, self.config.entailment], "softmax")
        order = np.argsort(scores)[::-1].tolist()
        return {
            "sequence": encoded.texts[item],
            "labels": [labels[index] for index in order],
            "scores": [float(scores[index]) for index in order],
        }

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return one record per text."""
        return answers

    def answer_form(self) -> AnswerForm:
        """Return labels and scores per text."""
        many = (Field("labels", "string", many=True), Field("scores", "double", many=True))
        return AnswerForm("records", fields=(Field("sequence", "string"), *many))

    def comparison(self) -> Comparison:
        """Compare scores class by class."""
        return ScoreComparison("softmax")

    def metric(self, answers: Any, labels: Sequence[Any]) -> dict[str, float]:
        """Return accuracy, macro precision, recall and F1 of the best labels."""
        return classified([one["labels"][0] for one in answers], [str(label) for label in labels])

    def check_labels(self, labels: Sequence[Any], items: Sequence[Any] = ()) -> None:
        """Make sure that each label is one that texts are asked for."""
        known = self.check_params(self.usual)["candidate_labels"]
        for index, label in enumerate(labels):
            if str(label) not in known:
                raise InvalidInputError(
                    f"The label {index} ({shown(label)}) is none of those that texts are asked for: "
                    f"{', '.join(known)}. Log the model with labels=[…]."
                )


def _sentences(params: Mapping[str, Any]) -> list[str]:
    """Return a sentence about each label."""
    return [params["hypothesis_template"].format(label) for label in params["candidate_labels"]]


def _checked_template(template: Any) -> str:
    try:
        good = isinstance(template, str) and template.format("x") != template
    except (IndexError, KeyError, ValueError):
        good = False
    if not good:
        raise InvalidInputError(f"hypothesis_template needs {{}} where the label goes, got {shown(template)}.")
    return str(template)
