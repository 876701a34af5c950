"""What all text tasks share: reading texts, tokenizing, padding."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
from tokenizers import Encoding, Tokenizer

from mlflow_tdeploy.core.columns import TEXT, Column, is_unicode, texts_in
from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, shown
from mlflow_tdeploy.core.tasks._base import Encoded
from mlflow_tdeploy.core.tasks._items import ItemTask
from mlflow_tdeploy.core.tasks._slow_tokenizer import FOLDER, PACKAGES, SlowTokenizer, UnreadableTextError
from mlflow_tdeploy.core.tensors import Array, Arrays, At, Signature

_ROW_FILE = "tokenizer.json"
#: Tokenizers that cut long texts, kept by their settings: requests may have any.
_TOKENIZERS = 8


@dataclass(frozen=True)
class TextConfig:
    """Settings of a text task.

    Attributes:
        max_length: Most tokens of a text, special ones included.
        pad_id: Token that fills rows.
        pad_type_id: Its type.
        padding_side: Where rows are filled.
        truncation_side: Where long texts are cut.
        strip: Whether surrounding white space is removed, as sentence-transformers does.
        pads: Whether texts of different lengths may be padded to one batch; not where that changes answers.
        tokenizer_packages: Distributions that a tokenizer without a fast form takes, transformers first; none for one
            that is a ``tokenizer.json``.
    """

    max_length: int
    pad_id: int = 0
    pad_type_id: int = 0
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    strip: bool = False
    pads: bool = True
    tokenizer_packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("pad_id", 0), ("pad_type_id", 0)):
            if not least <= getattr(self, name) < 2**31:
                raise InvalidInputError(f"{name} must be from {least} to 2**31 - 1, got {getattr(self, name)}.")
        if self.tokenizer_packages and (
            self.tokenizer_packages[0] != PACKAGES[0] or set(self.tokenizer_packages) - {*PACKAGES}
        ):
            raise InvalidInputError(
                f"tokenizer_packages must be {PACKAGES[0]} and others of {', '.join(PACKAGES[1:])}, got "
                f"{shown(list(self.tokenizer_packages))}."
            )


class TextTask(ItemTask):
    """A task whose items are texts and whose graph takes token ids; its settings are a :class:`TextConfig`."""

    settings: ClassVar[type] = TextConfig
    #: Of two texts in a row that is too long, which is cut: ``longest_first``, ``only_first`` or ``only_second``.
    truncation: ClassVar[str] = "longest_first"
    #: Whether answers say where in a text they are from.
    offsets: ClassVar[bool] = False
    input_kind: ClassVar[Literal["text", "image", "tensors"]] = "text"
    columns: ClassVar[tuple[Column, ...]] = (TEXT,)

    def __init__(self, config: Mapping[str, Any], signature: Signature, assets: Path) -> None:
        super().__init__(config, signature, assets)
        self._names = tuple(spec.name for spec in signature.inputs)
        self._dtypes = {spec.name: np.dtype(spec.dtype) for spec in signature.inputs}
        self._left = self.config.padding_side == "left"
        if self.offsets and self.slow:
            raise InvalidInputError(
                f"Task '{self.name}' says where in a text its answers are, which a tokenizer without a fast form does "
                f"not know. Log the model again."
            )
        self._pads = {"input_ids": self.config.pad_id, "token_type_ids": self.config.pad_type_id}
        if unknown := set(self._names) - {"input_ids", "attention_mask", "token_type_ids", "position_ids"}:
            raise InvalidInputError(
                f"Task '{self.name}' cannot fill the graph input '{min(unknown)}': text graphs take input_ids, "
                f"attention_mask, token_type_ids and position_ids. Log it with task='tensors'."
            )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, truncating at the model's length and never padding."""
        if self.slow:
            slow = SlowTokenizer.from_folder(
                self.assets / FOLDER, self.longest, strategy=self.truncation, direction=self.config.truncation_side,
                needs=self.packages,
            )  # fmt: skip
            return cast(Tokenizer, slow)  # all of it that tasks without offsets use
        path = self.assets / _ROW_FILE
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise IntegrityError(f"Cannot read the tokenizer {path.name}: {error}. Log the model again.") from error
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None  # for training: it splits words at random
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.longest, strategy=self.truncation, direction=self.config.truncation_side)
        return tokenizer

    @property
    def slow(self) -> bool:
        """Whether the tokenizer is one that transformers has in Python only."""
        return bool(self.config.tokenizer_packages)

    @property
    def packages(self) -> tuple[str, ...]:
        """Those of such a tokenizer."""
        return tuple(self.config.tokenizer_packages)

    @functools.cached_property
    def longest(self) -> int:
        """Most tokens of a row, special ones included."""
        return min(int(self.config.max_length), self._dim("sequence", "max"))

    @property
    def max_batch(self) -> int:
        """Most texts that one run of the graph can take, its fixed number of rows included."""
        return self._dim("batch", "max")

    @property
    def pads(self) -> bool:
        """Whether texts of different lengths may be in one batch."""
        return bool(self.config.pads)

    def prepare(self) -> None:
        """Read the tokenizer."""
        _ = self.tokenizer

    def item(self, index: int, row: Any) -> Any:
        """Return one item of a request."""
        item = row if isinstance(row, str) and len(self.columns) == 1 else super().item(index, row)
        return item.strip() if self.config.strip else item

    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> TextEncoded:
        """Tokenize the texts.

        Raises:
            InvalidInputError: One is not Unicode, or has no tokens; names its position.
        """
        return self.encoded(items, self.tokenized(self.tokenizer, items))

    def tokenized(
        self, tokenizer: Tokenizer, items: Sequence[str | tuple[str, str]], spans: Sequence[range] | None = None
    ) -> list[Encoding]:
        """Return the tokens of texts, or of pairs of them, by a tokenizer.

        Args:
            tokenizer: The task's, or one made of it.
            items: The texts.
            spans: Which of them are of each item of the request; None where each is one.

        Raises:
            InvalidInputError: One is not Unicode; names its position.
        """
        many = tokenizer.encode_batch if self.offsets else tokenizer.encode_batch_fast
        try:
            if len(items) > 1:
                return list(many(items))
            only = items[0]
            return [tokenizer.encode(only) if isinstance(only, str) else tokenizer.encode(*only)]
        except UnreadableTextError as error:
            item = error.row if spans is None else next(at for at, span in enumerate(spans) if error.row in span)
            raise InvalidInputError(
                f"The model's tokenizer cannot read text {item} ({error.why}): {shown(items[error.row])}. Leave it out."
            ) from error
        except TypeError as error:  # a lone surrogate is str for Python and not text for the tokenizer
            bad = next((row for row, item in enumerate(items) if not is_unicode("".join(item))), None)
            if bad is None:
                raise
            bad = bad if spans is None else next(item for item, span in enumerate(spans) if bad in span)
            raise InvalidInputError(
                f"Text {bad} is not valid Unicode (it has a lone surrogate) and cannot be encoded as UTF-8. "
                f"Decode the bytes with errors='replace' first."
            ) from error

    def in_parts(
        self,
        items: Sequence[Any],
        texts: Sequence[str | tuple[str, str]],
        stride: int,
        *,
        longest: int = 0,
        strategy: str = "longest_first",
    ) -> TextEncoded:
        """Return long texts as several rows that share some tokens.

        Args:
            items: The items.
            texts: What is tokenized of each.
            stride: Tokens that rows of one text share.
            longest: Most tokens of a row; 0 for the most there are.
            strategy: Which of two texts is cut.

        Raises:
            InvalidInputError: See :meth:`tokenized` and :meth:`encoded`.
        """
        rows: list[Encoding] = []
        spans = []
        for encoding in self.tokenized(self._cutting(longest or self.longest, stride, strategy), texts):
            parts = [encoding, *encoding.overflowing]
            spans.append(range(len(rows), len(rows) + len(parts)))
            rows += parts
        return self.encoded(items, rows, spans)

    @functools.cached_property
    def _cutting(self) -> Callable[[int, int, str], Tokenizer]:
        """Returns the tokenizer that cuts long texts in such parts."""

        @functools.lru_cache(maxsize=_TOKENIZERS)
        def made(longest: int, stride: int, strategy: str) -> Tokenizer:
            found = Tokenizer.from_str(self.tokenizer.to_str())  # settings of a tokenizer are those of all threads
            found.enable_truncation(longest, stride=stride, strategy=strategy, direction=self.config.truncation_side)
            return found

        return made

    def own(self, values: Array, encoding: Encoding) -> Array:
        """Return what a row's values are for its own tokens; for a graph without a mask they are of padding, too."""
        size = len(encoding.ids)
        return values[len(values) - size :] if self._left else values[:size]

    def encoded(
        self, items: Sequence[Any], encodings: Sequence[Encoding], spans: Sequence[range] | None = None
    ) -> TextEncoded:
        """Return tokens as rows.

        Args:
            items: The texts.
            encodings: Their tokens, by row.
            spans: See :attr:`Encoded.spans`.

        Raises:
            InvalidInputError: A text has no tokens; names its position.
        """
        encoded = TextEncoded(self, items, encodings, spans)
        if 0 in encoded.lengths:  # a row without a token is masked as a whole, and its answer means nothing
            bad = next(item for item, rows in enumerate(encoded.by_item) if 0 in [encoded.lengths[row] for row in rows])
            raise InvalidInputError(
                f"Text {bad} has no tokens: the model's tokenizer makes none of {shown(items[bad])} and adds no "
                f"special ones, so there is nothing to answer. Leave it out."
            )
        return encoded

    def example_feeds(
        self,
        at: At,
        *,
        ragged: bool,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        items: Sequence[Any] | None = None,
    ) -> Arrays:
        """Return rows of random token ids, or of the texts in ``items`` joined and cut; random lengths where ragged."""
        random = np.random.default_rng(seed)
        wanted = dict(sizes or {})
        head, tail = self._frame()
        shortest = min(len(head) + 1 + len(tail), self._dim("sequence", "max"))  # no text has fewer tokens
        batch = wanted.get("batch") or self._dim("batch", at)
        width = max(shortest, wanted.get("sequence") or self._dim("sequence", at))
        lengths = random.integers(shortest, width + 1, batch) if ragged and self.pads else np.full(batch, width)
        lengths[0] = width
        inner = np.maximum(lengths - len(head) - len(tail), 0)
        ends = np.cumsum(inner).tolist()
        stream = self._stream(items, ends[-1], random)
        rows = [head + stream[end - size : end] + tail for end, size in zip(ends, inner.tolist(), strict=True)]
        return self.pad([(row, [0] * len(row)) for row in rows], width)

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and after every text."""
        encoding = self.tokenizer.encode("a")
        own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        if own:
            return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
        half = (len(encoding) + 1) // 2  # a tokenizer that knows no "a"
        return encoding.ids[:half], encoding.ids[half:]

    def _special(self) -> set[int]:
        """Return the ids that no text has within, such as that of the end: some models count them."""
        added = self.tokenizer.get_added_tokens_decoder()
        head, tail = self._frame()
        return {*head, *tail, self._pads["input_ids"], *(index for index, token in added.items() if token.special)}

    def _stream(self, items: Sequence[Any] | None, size: int, random: np.random.Generator) -> list[int]:
        """Return ``size`` token ids: of the texts in ``items``, from a random one on, or random ones; none special."""
        special = self._special()
        if items:
            texts = [text for item in items for text in texts_in(item)]
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = (token for encoding in encodings for token in encoding.ids)
            if tokens := [token for token in ids if token not in special]:
                first = int(random.integers(len(tokens)))
                return [tokens[(first + index) % len(tokens)] for index in range(size)]
        vocabulary = range(self.tokenizer.get_vocab_size(with_added_tokens=False))
        plain = [token for token in vocabulary if token not in special] or list(vocabulary)
        return [plain[index] for index in random.integers(0, len(plain), size).tolist()]

    def pad(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], width: int) -> Arrays:
        """Return the graph's inputs for rows of (token ids, type ids), padded to ``width``.

        Rows are added up to the smallest batch that the graph takes.
        """
        width = max(width, self._dim("sequence", "min"))
        count = max(len(rows), self._dim("batch", "min"))
        return {name: self._fill(name, rows, count, width) for name in self._names}

    def _fill(self, name: str, rows: Sequence[tuple[Sequence[int], Sequence[int]]], count: int, width: int) -> Array:
        array: Array = np.zeros((count, width), self._dtypes[name])
        if pad := self._pads.get(name):
            array[:] = pad
        for index, (ids, types) in enumerate(rows):
            size = len(ids)
            place = array[index, width - size :] if self._left else array[index, :size]
            if name == "input_ids":
                place[:] = ids
            elif name == "attention_mask":
                place[:] = 1
            elif name == "token_type_ids":
                place[:] = types
            else:
                place[:] = np.arange(size)
        if count > len(rows):
            array[len(rows) :] = array[0]  # filler rows repeat a real one: a fully masked row can give NaN
        return array

    def _dim(self, name: str, at: At) -> int:
        if self.signature.has_dim(name):
            return self.signature.dim(name).at(at)
        axis = 0 if name == "batch" else 1
        size = self.signature.inputs[0].shape[axis]
        return size if isinstance(size, int) else self.signature.dim(size).at(at)

    @abstractmethod
    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]: ...


class TextEncoded(Encoded):
    """Tokenized texts.

    Attributes:
        texts: The items.
        encodings: Tokens of each row.
    """

    def __init__(
        self, task: TextTask, texts: Sequence[Any], encodings: Sequence[Encoding], spans: Sequence[range] | None = None
    ) -> None:
        self._task = task
        self.texts, self.encodings, self.spans = texts, encodings, spans
        self.lengths = [len(encoding) for encoding in encodings]

    def collate(self, indices: Sequence[int]) -> Arrays:
        """Return the padded arrays of these texts."""
        rows = [(self.encodings[index].ids, self.encodings[index].type_ids) for index in indices]
        return self._task.pad(rows, max(len(ids) for ids, _ in rows))


def own_tokens(feeds: Arrays) -> Array | None:
    """Return which tokens of a batch (rows, tokens) are no padding; None where the graph has no mask."""
    return feeds["attention_mask"].astype(bool) if "attention_mask" in feeds else None
