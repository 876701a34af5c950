"""Entities in texts, as the Hugging Face pipeline ``token-classification`` returns them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Encoding

from mlflow_tdeploy.core.budget import SPREAD, Budget, Limit
from mlflow_tdeploy.core.compare import Comparison
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.quality import SPANS, spans_found
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Field, Head, Param, refuse_arguments
from mlflow_tdeploy.core.tasks._classes import ScoreComparison, apply_function, check_classes, class_names
from mlflow_tdeploy.core.tasks._entities import STRATEGIES, Entity, Token, entities, without_overlaps
from mlflow_tdeploy.core.tasks._text import TextConfig, TextEncoded, TextTask, own_tokens
from mlflow_tdeploy.core.tensors import Arrays, Signature

OUTPUT = "logits"
#: Arguments that a pipeline with a stride gives its tokenizer besides.
_WITH_STRIDE = ("return_overflowing_tokens", "padding")
#: Tokenizers that are kept, one for each stride that requests ask for.
_STRIDES = 4


@dataclass(frozen=True)
class TokenConfig(TextConfig):
    """Settings of a token classifier.

    Attributes:
        labels: Name of each class, by index.
        aggregation_strategy: How tokens become entities, unless a request says it.
        ignore_labels: Labels that are no entities, unless a request says them.
        stride: Tokens that the parts of a long text share, unless a request says it; -1 cuts it off.
        unk_id: Token for what the vocabulary has not; -1 for none.
    """

    labels: tuple[str, ...] = ()
    aggregation_strategy: str = "none"
    ignore_labels: tuple[str, ...] = ("O",)
    stride: int = -1
    unk_id: int = -1


@TASKS.register("token-classification")
class TokenClassification(TextTask):
    """Returns a list of entities for each text: label, score, word and the characters it is of."""

    name: ClassVar[str] = "token-classification"
    settings: ClassVar[type] = TokenConfig
    head: ClassVar[Head | None] = Head(
        OUTPUT,
        axes=("batch", "sequence"),
        architecture="ForTokenClassification",
        auto_class="AutoModelForTokenClassification",
        told=False,  # as for fill-mask
    )
    default_budget: ClassVar[Budget] = Budget((Limit("max_score_difference", "<=", 0.02), SPREAD))
    offsets: ClassVar[bool] = True
    quality: ClassVar[tuple[str, ...]] = SPANS
    pipeline_arguments: ClassVar[tuple[str, ...]] = ("tokenizer_params",)
    encoding: ClassVar[tuple[str, ...]] = ("stride",)
    params: ClassVar[tuple[Param, ...]] = (
        Param(
            "aggregation_strategy", "string", "",
            "none (tokens one by one), simple, first, average or max; empty for the model's own.",
        ),
        Param("ignore_labels", "string", [], "Labels to leave out; [] for the model's own, [''] for none.", many=True),
        Param("stride", "integer", -1, "Tokens that parts of a long text share; -1 for the model's own."),
    )  # fmt: skip

    def __init__(self, config: Mapping[str, Any], signature: Signature, assets: Path) -> None:
        super().__init__(config, signature, assets)
        self._labels = list(self.config.labels)
        check_classes(self.name, self._labels, signature)

    @property
    def scored(self) -> Mapping[str, Any]:
        """Parameters that put tokens together: right answers are about entities."""
        return {"aggregation_strategy": "simple"} if self.config.aggregation_strategy == "none" else {}

    @classmethod
    def settings_of(
        cls, config: Mapping[str, Any], width: int, labels: Sequence[str] | None, pipeline: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return labels in class order and how the pipeline makes entities of them.

        Raises:
            InvalidInputError: There are more or fewer labels than classes, or the pipeline does what is not supported.
        """
        asked = dict(pipeline.get("tokenizer_params") or {})
        stride = int(asked.pop("stride", -1))
        refuse_arguments(set(asked) - set(_WITH_STRIDE))
        strategy = pipeline.get("aggregation_strategy")
        ignored = pipeline.get("ignore_labels")
        return {
            "labels": class_names(config, width, labels),
            "aggregation_strategy": "none" if strategy is None else _strategy(getattr(strategy, "value", strategy)),
            "ignore_labels": ["O"] if ignored is None else list(ignored),
            "stride": stride,
        }

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check the strategy, the labels and the stride."""
        checked = super().check_params(params)
        checked["aggregation_strategy"] = _strategy(checked["aggregation_strategy"] or self.config.aggregation_strategy)
        checked["ignore_labels"] = checked["ignore_labels"] or list(self.config.ignore_labels)
        asked, room = checked["stride"], self.longest - self._special_count
        stride = self.config.stride if asked < 0 else asked
        if asked < -1 or stride >= room:
            raise InvalidInputError(
                f"stride must be from 0 to {room - 1}, for the model takes {room} tokens of a text at once, or -1 for "
                f"its own; got {asked}."
            )
        checked["stride"] = stride
        return checked

    def encode(self, items: Sequence[str], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize the texts, long ones in several rows where a stride is asked for."""
        checked = self.check_params(self.usual) if params is None else params
        if checked["stride"] < 0:
            return super().encode(items, checked)
        return self.in_parts(items, items, checked["stride"])

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the scores (tokens, classes) of each row's own tokens."""
        scores = apply_function(outputs[OUTPUT][:count], "softmax").astype(np.float32)
        mask = own_tokens(feeds)
        return list(scores) if mask is None else [scores[row, mask[row]] for row in range(count)]

    def join(self, parts: Sequence[Any], encoded: Any, item: int, params: Mapping[str, Any]) -> list[Entity]:
        """Return the entities of a text."""
        text, rows = encoded.texts[item], encoded.rows_of(item)
        found: list[Entity] = []
        for row, scores in zip(rows, parts, strict=True):
            encoding = encoded.encodings[row]
            tokens = self._tokens(text, encoding, self.own(scores, encoding))
            made = entities(tokens, params["aggregation_strategy"], self._labels, self._spell)
            found += [one for one in made if one.get("entity", one.get("entity_group")) not in params["ignore_labels"]]
        return found if len(rows) == 1 else without_overlaps(found)

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[list[Entity]]:
        """Return one list of entities per text."""
        return answers

    def answer_form(self) -> AnswerForm:
        """Return a list of entities per text."""
        kind = "entity" if self.config.aggregation_strategy == "none" else "entity_group"
        place = (Field("index", "long"),) if kind == "entity" else ()
        fields = (Field(kind, "string"), Field("score", "double"), *place, Field("word", "string"))
        return AnswerForm("lists", fields=(*fields, Field("start", "long"), Field("end", "long")))

    def comparison(self) -> Comparison:
        """Compare scores token by token and class by class, padding left out."""
        return _TokenScores("softmax")

    def metric(self, answers: Any, labels: Sequence[Any]) -> dict[str, float]:
        """Return precision, recall and F1 of entities: one is right whose characters and label are.

        Args:
            answers: A list of entities for each text.
            labels: A list of ``{"start", "end", "label"}`` for each; the label without ``B-`` or ``I-``.
        """
        return spans_found([_spans(one) for one in answers], [_spans(one) for one in labels])

    def check_labels(self, labels: Sequence[Any], items: Sequence[Any] = ()) -> None:
        """Make sure that each text's labels are spans of the model's classes."""
        known = {label.split("-", 1)[-1] for label in self._labels}  # as groups are called
        for index, one in enumerate(labels):
            try:
                found = _spans(one)
            except (TypeError, LookupError, ValueError) as error:
                raise InvalidInputError(
                    f"The label {index} must be a list like [{{'start': 0, 'end': 5, 'label': 'PER'}}], got "
                    f"{shown(one)}."
                ) from error
            if unknown := sorted(label for _, _, label in found if label not in known):
                names = ", ".join(sorted(known))
                raise InvalidInputError(
                    f"The label {index} has {shown(unknown[0])}, which is no label of the model: {names}."
                )

    @functools.cached_property
    def _special_count(self) -> int:
        return int(self.tokenizer.num_special_tokens_to_add(is_pair=False))

    @functools.cached_property
    def _prefix(self) -> str:
        """What begins a token that goes on with a word, where the tokenizer has such."""
        return str(getattr(self.tokenizer.model, "continuing_subword_prefix", None) or "")

    def _tokens(self, text: str, encoding: Encoding, scores: Any) -> list[Token]:
        found = []
        for index, (special, number, (start, end)) in enumerate(
            zip(encoding.special_tokens_mask, encoding.ids, encoding.offsets, strict=True)
        ):
            if special:
                continue
            word, piece = self.tokenizer.id_to_token(number) or "", text[start:end]
            of_words, before = len(word) != len(piece), text[start - 1 : start + 1] if start else " "
            continues = of_words if self._prefix else " " not in before
            if number == self.config.unk_id:
                word, continues = piece, False
            found.append(Token(index, word, start, end, continues, scores[index]))
        return found

    @functools.cached_property
    def _spell(self) -> Callable[[list[str]], str]:
        decoder = self.tokenizer.decoder
        return decoder.decode if decoder is not None else " ".join


class _TokenScores(ScoreComparison):
    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        mask = own_tokens(inputs)
        width = reference[OUTPUT].shape[-1]

        def of_tokens(arrays: Arrays) -> Arrays:
            return {OUTPUT: arrays[OUTPUT].reshape(-1, width) if mask is None else arrays[OUTPUT][mask]}

        super().add(of_tokens(reference), of_tokens(got), inputs)


def _strategy(name: Any) -> str:
    if name not in STRATEGIES:
        raise InvalidInputError(f"aggregation_strategy must be one of {', '.join(STRATEGIES)}, got {shown(name)}.")
    return str(name)


def _spans(found: Any) -> list[tuple[int, int, str]]:
    """Return entities, or what is right, as (start, end, label)."""
    values = json.loads(found) if isinstance(found, str) else found
    return [(int(one["start"]), int(one["end"]), str(one[_named(one)])) for one in values]


def _named(span: Mapping[str, Any]) -> str:
    return next((name for name in ("label", "entity_group", "entity") if name in span), "label")
