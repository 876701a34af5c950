"""How good predictions are beside the right answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np
import numpy.typing as npt

#: Shares that :func:`classified` returns.
CLASSIFIED = ("accuracy", "precision", "recall", "f1")
#: Figures that :func:`spans_found` returns.
SPANS = ("f1", "precision", "recall")
#: Figures that :func:`answered` returns.
ANSWERED = ("f1", "exact_match")
#: Figures that :func:`ranked` returns.
RANKED = ("ndcg", "mrr")
#: All that are shares of 1, and better the higher they are.
SHARES = tuple(dict.fromkeys((*CLASSIFIED, *SPANS, *ANSWERED, *RANKED)))
#: What a predicted probability counts as at least, so that one wrong answer does not make the loss infinite.
_LEAST = float(np.finfo(np.float64).eps)


def classified(predicted: Sequence[Hashable], right: Sequence[Hashable]) -> dict[str, float]:
    """Return accuracy and the macro averages of precision, recall and F1.

    As scikit-learn has them with ``average="macro", zero_division=0``: each class that is right, or predicted,
    somewhere counts alike, and one that is never predicted has a precision of 0.

    Args:
        predicted: A class for each item, at least one.
        right: The right ones.
    """
    classes = {one: index for index, one in enumerate(dict.fromkeys([*right, *predicted]))}
    got, wanted = (np.array([classes[one] for one in which]) for which in (predicted, right))
    hits, said, there = (np.bincount(which, minlength=len(classes)) for which in (got[got == wanted], got, wanted))
    return {
        "accuracy": float(np.mean(got == wanted)),
        "precision": _mean(hits, said),
        "recall": _mean(hits, there),
        "f1": _mean(2 * hits, said + there),
    }


def log_loss(probabilities: Sequence[float]) -> float:
    """Return the mean of ``-log(p)``, where each p is the probability that was given to the right answer."""
    return float(-np.log(np.clip(np.asarray(probabilities, dtype=np.float64), _LEAST, 1.0)).mean())


def _mean(hits: npt.NDArray[np.int_], of: npt.NDArray[np.int_]) -> float:
    return float(np.mean(hits / np.maximum(of, 1)))


def spans_found(found: Sequence[Sequence[Hashable]], right: Sequence[Sequence[Hashable]]) -> dict[str, float]:
    """Return precision, recall and F1 of what was found in texts, each thing of all texts counting alike.

    As the shared task of CoNLL-2003 scores entities (https://aclanthology.org/W03-0419): one is right that is there
    with the same place and kind. Where nothing is to be found, and nothing is, all are 1.

    Args:
        found: What was found in each text, each once.
        right: What is there.
    """
    hits = sum(len({*got} & {*wanted}) for got, wanted in zip(found, right, strict=True))
    said, there = (sum(len({*one}) for one in which) for which in (found, right))
    return {
        "precision": hits / said if said else float(not there),
        "recall": hits / there if there else float(not said),
        "f1": 2 * hits / (said + there) if said + there else 1.0,
    }


def answered(found: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how many answers are right, and the mean F1 of their words, as shares of 1.

    As SQuAD 2.0's script has them (https://rajpurkar.github.io/SQuAD-explorer): case, punctuation and articles do not
    count, and of several right answers the one that is closest does.

    Args:
        found: An answer for each question; '' for none.
        right: Those that are right.
    """
    pairs = [(_words(got), [_words(one) for one in several]) for got, several in zip(found, right, strict=True)]
    return {
        "f1": float(np.mean([max(_overlap(got, one) for one in several) for got, several in pairs])),
        "exact_match": float(np.mean([any(got == one for one in several) for got, several in pairs])),
    }


def _words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(got: Sequence[str], wanted: Sequence[str]) -> float:
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


def ranked(found: Sequence[Sequence[int]], right: Sequence[Collection[int]]) -> dict[str, float]:
    """Return how far up what is right is in lists, over all lists and their whole lengths.

    ``mrr``: the mean of one over the place of the first that is right. ``ndcg``: the gain of all that are right, each
    discounted by the logarithm of its place, as a share of what it were with all of them first (Jarvelin and
    Kekalainen 2002, https://doi.org/10.1145/582415.582418).

    Args:
        found: What was found, best first.
        right: What is right, at least one for each.
    """
    reciprocal, gains = [], []
    for order, wanted in zip(found, right, strict=True):
        hits = np.array([one in wanted for one in order], dtype=np.float64)
        discounts = 1.0 / np.log2(np.arange(2, max(len(order), len(wanted)) + 2))
        reciprocal.append(1.0 / (1 + int(hits.argmax())) if hits.any() else 0.0)
        gains.append(float(hits @ discounts[: len(order)]) / float(discounts[: len(wanted)].sum()))
    return {"mrr": float(np.mean(reciprocal)), "ndcg": float(np.mean(gains))}
