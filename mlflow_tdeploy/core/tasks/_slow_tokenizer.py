"""Tokenizers that transformers has in Python only, with what the tasks use of ``tokenizers.Tokenizer``.

Such a model, and no other, is served with transformers. The tokenizer's files lie beside the graph as
``save_pretrained`` writes them; see https://huggingface.co/docs/transformers/main_classes/tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import IntegrityError, MissingDependencyError
from mlflow_tdeploy.core.thread_lock import ThreadLock

#: Where its files lie among a model's assets.
FOLDER = "tokenizer"
#: Each may be written in Python that is no more thread-safe than what it calls: MeCab, an lru_cache, a C library.
_lock = ThreadLock()


def _says_something(record: logging.LogRecord) -> bool:
    """Leave out what is said of every pair of texts that is cut: that what was cut off is not returned."""
    return "overflowing tokens are not returned" not in record.getMessage()


@dataclass(frozen=True)
class SlowEncoding:
    """Tokens of a text, or of two: that part of ``tokenizers.Encoding`` which such tokenizers know.

    Attributes:
        ids: The tokens.
        type_ids: Which of the two texts each is of.
        special_tokens_mask: 1 for those that stand for no text.
    """

    ids: list[int]
    type_ids: list[int]
    special_tokens_mask: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class SlowTokenizer:
    """A transformers tokenizer without a fast form, truncating and never padding. Safe from many threads.

    Args:
        tokenizer: The tokenizer.
        longest: Most tokens of a row, special ones included.
        strategy: Which of two texts is cut.
    """

    def __init__(self, tokenizer: Any, longest: int, strategy: str) -> None:
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._cut = {"truncation": strategy, "max_length": longest}
        self._specials = frozenset(tokenizer.all_special_ids)

    @classmethod
    def from_folder(
        cls, folder: Path, longest: int, *, strategy: str, direction: str, needs: Sequence[str]
    ) -> SlowTokenizer:
        """Load one from the files that were written when the model was logged; no code of theirs runs.

        Args:
            folder: Folder with ``tokenizer_config.json``.
            longest: Most tokens of a row.
            strategy: Which of two texts is cut.
            direction: The side on which.
            needs: Distributions that it takes, transformers first.

        Raises:
            MissingDependencyError: One of them is not installed.
            IntegrityError: The files cannot be read.
        """
        try:
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except ImportError as error:
            raise MissingDependencyError(
                ", ".join(needs), "The model's tokenizer, which has no fast form,", f"pip install {' '.join(needs)}"
            ) from error
        except Exception as error:  # whatever a tokenizer's own code meets in a damaged file
            raise IntegrityError(f"Cannot read the tokenizer's files: {error}. Log the model again.") from error
        found.truncation_side = direction
        logging.getLogger("transformers.tokenization_python").addFilter(_says_something)
        return cls(found, longest, strategy)

    def encode_batch(
        self, texts: Sequence[str | tuple[str, str]], *, add_special_tokens: bool = True
    ) -> list[SlowEncoding]:
        """Return the tokens of texts, or of pairs of them.

        Raises:
            TypeError: One is no Unicode, as the fast ones have it.
        """
        pairs = ((text, None) if isinstance(text, str) else text for text in texts)
        return [self.encode(*pair, add_special_tokens=add_special_tokens) for pair in pairs]

    encode_batch_fast = encode_batch

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> SlowEncoding:
        """Return the tokens of a text, or of two.

        Raises:
            TypeError: One is no Unicode, as the fast ones have it.
        """
        for one in (text, pair or ""):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError as error:
                raise TypeError(str(error)) from error
        with _lock.held():
            found: Mapping[str, list[int]] = self._tokenizer(
                text,
                pair,
                add_special_tokens=add_special_tokens,
                return_token_type_ids=True,
                verbose=False,
                **self._cut,
            )
        ids = found["input_ids"]
        return SlowEncoding(ids, found["token_type_ids"], [int(token in self._specials) for token in ids])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return tokens as text."""
        with _lock.held():
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token: int) -> str | None:
        """Return a token as the vocabulary has it."""
        found = self._tokenizer.convert_ids_to_tokens(token)
        return None if found is None else str(found)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a word that is a token."""
        return self._vocabulary.get(token)

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        """Return how many tokens a row has besides those of its text, or of its two texts."""
        return int(self._tokenizer.num_special_tokens_to_add(pair=is_pair))

    def get_added_tokens_decoder(self) -> Mapping[int, Any]:
        """Return the added tokens by id."""
        found: Mapping[int, Any] = self._tokenizer.added_tokens_decoder
        return found

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Return how many tokens there are."""
        return len(self._tokenizer) if with_added_tokens else int(self._tokenizer.vocab_size)
