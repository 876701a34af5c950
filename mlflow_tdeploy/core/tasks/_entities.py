"""From the scores of tokens to entities, as the Hugging Face pipeline ``token-classification`` puts them together.

Source: https://huggingface.co/docs/transformers/main_classes/pipelines#transformers.TokenClassificationPipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_tdeploy.core.tensors import Array

#: How tokens become entities: one by one, runs of one label, or runs of words whose tokens agree on a label first.
STRATEGIES = ("none", "simple", "first", "average", "max")
#: A token, or a word: label, score, text, first and last character, and place among the tokens.
Entity = dict[str, Any]


@dataclass(frozen=True)
class Token:
    """A token of a text that is no special one.

    Attributes:
        index: Its place in its row, special tokens counted.
        word: As the vocabulary has it.
        start: Of its first character in the text.
        end: After its last one.
        continues: Whether it goes on with the word of the one before.
        scores: Of each class.
    """

    index: int
    word: str
    start: int
    end: int
    continues: bool
    scores: Array


def entities(
    tokens: Sequence[Token], strategy: str, labels: Sequence[str], spell: Callable[[list[str]], str]
) -> list[Entity]:
    """Return the entities of a row.

    Args:
        tokens: Those of the row.
        strategy: One of :data:`STRATEGIES`.
        labels: Name of each class.
        spell: Writes tokens as text.
    """
    if strategy in ("none", "simple"):
        found = [_of_token(token, labels) for token in tokens]
        return found if strategy == "none" else _grouped(found, spell)
    return _grouped([_of_word(word, strategy, labels, spell) for word in _words(tokens)], spell)


def without_overlaps(found: Sequence[Entity]) -> list[Entity]:
    """Return entities of rows that overlap: of two that share a beginning's place the longer, or the surer one."""
    kept: list[Entity] = []
    for entity in sorted(found, key=lambda one: one["start"]):
        last = kept[-1] if kept else None
        if last is None or not last["start"] <= entity["start"] < last["end"]:
            kept.append(entity)
        elif (entity["end"] - entity["start"], entity["score"]) > (last["end"] - last["start"], last["score"]):
            kept[-1] = entity
    return kept


def _of_token(token: Token, labels: Sequence[str]) -> Entity:
    best = int(token.scores.argmax())
    return {
        "entity": labels[best], "score": float(token.scores[best]), "index": token.index, "word": token.word,
        "start": token.start, "end": token.end,
    }  # fmt: skip


def _words(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    word: list[Token] = []
    for token in tokens:
        if word and not token.continues:
            yield word
            word = []
        word.append(token)
    if word:
        yield word


def _of_word(word: Sequence[Token], strategy: str, labels: Sequence[str], spell: Callable[[list[str]], str]) -> Entity:
    if strategy == "first":
        scores = word[0].scores
    elif strategy == "max":
        scores = max(word, key=lambda token: float(token.scores.max())).scores
    else:
        scores = np.nanmean(np.stack([token.scores for token in word]), axis=0)
    best = int(scores.argmax())
    return {
        "entity": labels[best], "score": float(scores[best]), "word": spell([token.word for token in word]),
        "start": word[0].start, "end": word[-1].end,
    }  # fmt: skip


def _grouped(found: Sequence[Entity], spell: Callable[[list[str]], str]) -> list[Entity]:
    """Return runs of one label, each as one; a label that begins with ``B-`` begins another run."""
    groups: list[list[Entity]] = []
    for entity in found:
        begins, kind = _tag(entity["entity"])
        if groups and not begins and kind == _tag(groups[-1][-1]["entity"])[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [
        {
            "entity_group": group[0]["entity"].split("-", 1)[-1],
            "score": _mean([entity["score"] for entity in group]),
            "word": spell([entity["word"] for entity in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def _mean(scores: Sequence[float]) -> float:
    """Return the mean of those that are numbers; a handful at most, for which numpy takes ten times as long."""
    known = [score for score in scores if not math.isnan(score)]
    return math.fsum(known) / len(known) if known else math.nan


def _tag(label: str) -> tuple[bool, str]:
    """Return whether a label begins an entity, and of what kind it is; one without ``B-`` or ``I-`` goes on."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label
