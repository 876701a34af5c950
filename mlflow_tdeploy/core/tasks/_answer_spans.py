"""From the scores of a context's tokens to the answers in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding

from mlflow_tdeploy.core.budget import SPREAD
from mlflow_tdeploy.core.compare import REFERENCE_NON_FINITE, Comparison, Rows
from mlflow_tdeploy.core.spread import Spread
from mlflow_tdeploy.core.tensors import Array, Arrays

START, END = "start_logits", "end_logits"
#: A difference of this share of the usual best score matters to nobody.
_MATTERS = 0.01


@dataclass(frozen=True)
class Spans:
    """What to look for.

    Attributes:
        keep: How many spans of a part, best first.
        longest: Most tokens of one.
        whole_words: Whether they begin and end where words do.
        context: Which of a row's two texts is the context.
        cls_id: Token that stands for no answer; -1 for none.
    """

    keep: int
    longest: int
    whole_words: bool
    context: int
    cls_id: int


def spans_of(part: Encoding, starts: Array, ends: Array, wanted: Spans) -> tuple[list[tuple[float, int, int]], float]:
    """Return the best spans of a part of a context, and the score of there being none.

    As transformers 4's pipeline has it: the scores are probabilities among the context's tokens and that of no answer,
    and a span's is the product of its first token's and its last one's.

    Args:
        part: Tokens of the question and of that part.
        starts: Logits (tokens,) that an answer begins there.
        ends: Logits that it ends there.
        wanted: What to look for.

    Returns:
        (score, first character, character after the last) of each span, best first; and a score.
    """
    ids = np.array(part.ids)
    context = np.array([which == wanted.context for which in part.sequence_ids])
    none = np.flatnonzero(ids == wanted.cls_id)
    among = context.copy()
    among[none] = True
    if not among.any():
        return [], 1.0
    first, last = (_softmax(np.where(among, logits.astype(np.float64), -np.inf)) for logits in (starts, ends))
    impossible = float(first[none[0]] * last[none[0]]) if len(none) else 0.0
    found = _best(np.where(context, first, 0.0), np.where(context, last, 0.0), wanted)
    return [(score, *_characters(part, begin, end, wanted)) for score, begin, end in found], impossible


def _softmax(logits: Array) -> Array:
    exponents = np.exp(logits - logits.max())
    return np.asarray(exponents / exponents.sum())


def _best(first: Array, last: Array, wanted: Spans) -> Iterator[tuple[float, int, int]]:
    """Yield the best spans, (score, first token, last token): products of a band, not of all pairs of tokens."""
    width = min(wanted.longest, len(first))
    padded = np.concatenate([last, np.zeros(width - 1)])
    flat = (first[:, None] * padded[np.arange(len(first))[:, None] + np.arange(width)]).reshape(-1)
    keep = min(wanted.keep, len(flat))
    order = np.argpartition(-flat, keep - 1)[:keep]
    for place in order[np.argsort(-flat[order], kind="stable")].tolist():
        if flat[place] > 0:
            begin, more = divmod(place, width)
            yield float(flat[place]), begin, begin + more


def _characters(part: Encoding, begin: int, end: int, wanted: Spans) -> tuple[int, int]:
    if wanted.whole_words:
        words = (part.token_to_word(token) for token in (begin, end))
        first, last = (None if word is None else part.word_to_chars(word, wanted.context) for word in words)
        if first is not None and last is not None:
            return int(first[0]), int(last[1])
    return int(part.offsets[begin][0]), int(part.offsets[end][1])  # some tokenizers know no words


class SpanComparison(Comparison):
    """Where answers may begin and end, token by token, padding left out."""

    def __init__(self) -> None:
        self._rows, self._scores = Rows(), Spread()
        self._worst = self._top = 0.0
        self._agree = self._count = self._broken = 0

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        """Take in logits (rows, tokens) of beginnings and ends."""
        for row in range(len(reference[START])):
            own = inputs["attention_mask"][row].astype(bool) if "attention_mask" in inputs else slice(None)
            ref, new = (
                np.stack([arrays[name][row][own] for name in (START, END)], axis=1).astype(np.float64)
                for arrays in (reference, got)
            )
            if np.isfinite(ref).all():
                self._add(ref, new)
            else:
                self._broken += 1

    def _add(self, ref: Array, new: Array) -> None:
        """Take in a row's logits (tokens, 2)."""
        self._rows.add(ref, new)
        lost = not np.isfinite(new).all()
        wanted = np.apply_along_axis(_softmax, 0, ref)
        scores = np.zeros_like(wanted) if lost else np.apply_along_axis(_softmax, 0, new)
        self._scores.add(wanted, scores)
        self._top += float(wanted.max())
        self._worst = max(self._worst, 1.0 if lost else float(np.abs(wanted - scores).max()))
        self._agree += int(not lost and bool((ref.argmax(axis=0) == new.argmax(axis=0)).all()))
        self._count += 1

    def metrics(self) -> dict[str, float]:
        """Return how far logits and scores are off, and for how many rows the best beginning and end are the same."""
        rows: dict[str, Any] = self._rows.metrics()
        if broken := self._broken + rows.get(REFERENCE_NON_FINITE, 0.0):
            rows[REFERENCE_NON_FINITE] = broken
        rows[SPREAD.metric] = self._scores.error(_MATTERS * self._top / self._count if self._count else 0.0)
        agreement = self._agree / self._count if self._count else 1.0
        return {**rows, "max_score_difference": self._worst, "span_agreement": agreement}
