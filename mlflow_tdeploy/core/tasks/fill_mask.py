"""What may stand where a text has a mask, as the Hugging Face pipeline ``fill-mask`` returns it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlflow_tdeploy.core.budget import SPREAD, Budget, Limit
from mlflow_tdeploy.core.compare import Comparison
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Field, Head, Param, refuse_arguments
from mlflow_tdeploy.core.tasks._classes import ScoreComparison
from mlflow_tdeploy.core.tasks._text import TextConfig, TextEncoded, TextTask, own_tokens
from mlflow_tdeploy.core.tensors import Array, Arrays

OUTPUT = "logits"
#: Most tokens of a batch whose scores are held against the reference's: each has one for every word there is.
_COMPARED = 64
#: So many fillings are found one after the other, more by sorting all words.
_FEW = 24
#: How text is tidied up after words were put together, where a tokenizer does.
_TIDY = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True)
class MaskConfig(TextConfig):
    """Settings of a model that fills masks.

    Attributes:
        mask_id: Token that stands for what is to be filled in.
        blank_id: Token that a filled text is written without; -1 for none.
        top_k: How many fillings, unless a request says it.
        tidy: Whether spaces before punctuation go from a filled text, as the tokenizer's settings say.
    """

    mask_id: int = -1
    blank_id: int = -1
    top_k: int = 5
    tidy: bool = False


@TASKS.register("fill-mask")
class FillMask(TextTask):
    """Returns a list of fillings for each text, best first; for several masks a list of such lists."""

    name: ClassVar[str] = "fill-mask"
    settings: ClassVar[type] = MaskConfig
    head: ClassVar[Head | None] = Head(
        OUTPUT,
        axes=("batch", "sequence"),
        architecture="ForMaskedLM",
        auto_class="AutoModelForMaskedLM",
        told=False,  # a model that goes on with a text has the same output
    )
    default_budget: ClassVar[Budget] = Budget((Limit("max_score_difference", "<=", 0.05), SPREAD))
    quality: ClassVar[tuple[str, ...]] = ("accuracy",)
    pipeline_arguments: ClassVar[tuple[str, ...]] = ("tokenizer_kwargs",)
    params: ClassVar[tuple[Param, ...]] = (
        Param("top_k", "integer", 0, "How many fillings per mask, best first; 0 for the model's own."),
        Param("targets", "string", [], "Words to choose among; [] for all.", many=True),
    )

    @classmethod
    def settings_of(
        cls, config: Mapping[str, Any], width: int, labels: Sequence[str] | None, pipeline: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return how many fillings the pipeline returns.

        Raises:
            InvalidInputError: It does what is not supported.
        """
        super().settings_of(config, width, labels, pipeline)
        refuse_arguments(set(pipeline.get("tokenizer_kwargs") or {}) - {"truncation", "padding"})
        if pipeline.get("target_ids") is not None:
            raise InvalidInputError(
                "The pipeline was made with targets, which the logged model would not keep. Make the pipeline without, "
                "and pass params={'targets': […]} to predict."
            )
        return {"top_k": int(pipeline.get("top_k", 5))}

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check ``top_k``, and find the tokens of ``targets``."""
        checked = super().check_params(params)
        checked["targets"] = self._targets(checked["targets"])
        checked["top_k"] = checked["top_k"] or self.config.top_k
        if checked["top_k"] < 0:
            raise InvalidInputError(f"top_k must be at least 1, or 0 for the usual, got {checked['top_k']}.")
        return checked

    def encode(self, items: Sequence[str], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize the texts.

        Raises:
            InvalidInputError: One has no mask.
        """
        encoded = super().encode(items, params)
        which = "last" if self.config.truncation_side == "left" else "first"
        for index, encoding in enumerate(encoded.encodings):
            if self.config.mask_id not in encoding.ids:
                raise InvalidInputError(
                    f"Text {index} has no {self.mask} among its {which} {self.longest} tokens: {shown(items[index])}. "
                    f"Put one where a word is to be filled in."
                )
        return encoded

    def sample(self, texts: Sequence[str], like: Any = None) -> tuple[str, ...]:
        """Return texts in each of which one word is a mask; those that have one stay as they are."""
        return tuple(text if self.mask in text else self._masked(text, place) for place, text in enumerate(texts))

    def _masked(self, text: str, place: int) -> str:
        """Return a text with a mask instead of a word that is not cut off: of a long one, from its middle."""
        if self.slow:  # which does not say where its tokens are: so many characters, of whatever bytes, are not cut off
            few = self.longest // 4
            begin = max(0, len(text) - few) if self.config.truncation_side == "left" else 0
            kept = [begin + match.start() for match in re.finditer(r"\S+", text[begin : begin + few])]
        else:
            encoding = self.tokenizer.encode(text)
            kept = [begin for special, (begin, _) in zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
                    if not special]  # fmt: skip
        if not kept:
            return self.mask
        at = kept[len(kept) // 4 :][place % max(1, len(kept) // 2)]
        begin, end = text.rfind(" ", 0, at + 1) + 1, text.find(" ", at + 1)
        return f"{text[:begin]}{self.mask}{text[end:] if end >= 0 else ''}"

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return scores and tokens of the fillings of each mask of a row, each (masks, fillings)."""
        masks = feeds["input_ids"][:count] == self.config.mask_id
        if (own := own_tokens(feeds)) is not None:
            masks &= own[:count]
        targets = np.array(params["targets"]) if params["targets"] else None
        logits = outputs[OUTPUT][:count][masks].astype(np.float32, copy=False)
        keep = min(params["top_k"], logits.shape[1] if targets is None else len(targets))
        values, tokens = np.empty((len(logits), keep)), np.empty((len(logits), keep), np.int64)
        for index, row in enumerate(logits):  # one fits into a processor's cache, all of them do not
            highest = row.max()
            whole = np.exp(row - highest).sum(dtype=np.float64)
            places, found = _highest(row if targets is None else row[targets], keep)
            values[index] = np.exp(found.astype(np.float64) - highest) / whole
            tokens[index] = places if targets is None else targets[places]
        ends = np.cumsum(masks.sum(axis=1))[:-1]
        return list(zip(np.split(values, ends), np.split(tokens, ends), strict=True))

    def join(self, parts: Sequence[Any], encoded: Any, item: int, params: Mapping[str, Any]) -> list[Any]:
        """Return the fillings of a text."""
        values, tokens = parts[0]
        ids = encoded.encodings[item].ids
        places = [place for place, token in enumerate(ids) if token == self.config.mask_id]
        found = [
            [self._filling(ids, place, token, score, alone=len(places) == 1) for score, token in zip(*of, strict=True)]
            for place, of in zip(places, zip(values.tolist(), tokens.tolist(), strict=True), strict=True)
        ]
        return found[0] if len(found) == 1 else found

    def _filling(self, ids: Sequence[int], place: int, token: int, score: float, *, alone: bool) -> dict[str, Any]:
        filled = [*ids[:place], token, *ids[place + 1 :]]
        filled = [one for one in filled if one != self.config.blank_id]
        return {
            "score": score, "token": token, "token_str": self._text([token], skip=False),
            "sequence": self._text(filled, skip=alone),
        }  # fmt: skip

    def _text(self, ids: Sequence[int], *, skip: bool) -> str:
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=skip))
        if self.config.tidy:
            for old, new in _TIDY:
                text = text.replace(old, new)
        return text

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[Any]:
        """Return one list per text."""
        return answers

    def answer_form(self) -> AnswerForm:
        """Return a list of fillings per text."""
        fields = (Field("score", "double"), Field("token", "long"), Field("token_str", "string"))
        return AnswerForm("lists", fields=(*fields, Field("sequence", "string")))

    def comparison(self) -> Comparison:
        """Compare scores where texts have masks; where a batch has none, at some of its tokens."""
        return _MaskScores(self.config.mask_id)

    def metric(self, answers: Any, labels: Sequence[Any]) -> dict[str, float]:
        """Return the accuracy of the best filling of each text's first mask.

        Args:
            answers: Fillings for each text.
            labels: The right words.
        """
        first = [one[0][0] if isinstance(one[0], list) else one[0] for one in answers]
        right = [str(label).strip() for label in labels]
        hits = [one["token_str"].strip() == word for one, word in zip(first, right, strict=True)]
        return {"accuracy": float(np.mean(hits))}

    @functools.cached_property
    def mask(self) -> str:
        """The mask, as it stands in texts.

        Raises:
            InvalidInputError: The tokenizer has none.
        """
        found = self.tokenizer.id_to_token(self.config.mask_id) if self.config.mask_id >= 0 else None
        if found is None:
            raise InvalidInputError("The model's tokenizer has no mask token, so that it cannot fill any in.")
        return str(found)

    def _targets(self, words: Sequence[str]) -> list[int]:
        """Return the tokens of words to choose among: of one that is no token its first one.

        Raises:
            InvalidInputError: One has no tokens.
        """
        found = []
        for word in words:
            token = self.tokenizer.token_to_id(word)
            ids = [token] if token is not None else self.tokenizer.encode(word, add_special_tokens=False).ids
            if not ids:
                raise InvalidInputError(f"The target {shown(word)} has no tokens. Leave it out.")
            found.append(ids[0])
        return sorted(set(found))


def _highest(logits: Array, keep: int) -> tuple[Array, Array]:
    """Return where the highest of some logits are, the highest first, and what they are; overwrites the logits."""
    if keep > _FEW or np.isneginf(logits.min()):  # some words are ruled out: they would be found again and again
        order = np.argsort(-logits, kind="stable")[:keep]
        return order, logits[order]
    places, values = np.empty(keep, np.int64), np.empty(keep, logits.dtype)
    for index in range(keep):  # of a vocabulary some passes are faster than its partition
        places[index] = logits.argmax()
        values[index] = logits[places[index]]
        logits[places[index]] = -np.inf
    return places, values


class _MaskScores(ScoreComparison):
    def __init__(self, mask_id: int) -> None:
        super().__init__("softmax")
        self._mask_id = mask_id

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        own = own_tokens(inputs)
        own = np.ones(inputs["input_ids"].shape, bool) if own is None else own
        masks = own & (inputs["input_ids"] == self._mask_id)
        chosen = np.argwhere(masks if masks.any() else own)
        chosen = chosen[:: -(-len(chosen) // _COMPARED)]
        rows, tokens = chosen[:, 0], chosen[:, 1]
        super().add({OUTPUT: reference[OUTPUT][rows, tokens]}, {OUTPUT: got[OUTPUT][rows, tokens]}, inputs)
