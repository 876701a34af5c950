"""Tokenizers that transformers has in Python only, with what the tasks use of ``tokenizers.Tokenizer``.

Such a model, and no other, is served with transformers. The tokenizer's files lie beside the graph as
``save_pretrained`` writes them; see https://huggingface.co/docs/transformers/main_classes/tokenizer.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.columns import is_unicode
from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, MissingDependencyError, first_line, shown
from mlflow_tdeploy.core.thread_lock import ThreadLock

#: Where its files lie among a model's assets.
FOLDER = "tokenizer"
CONFIG = "tokenizer_config.json"
#: Packages below which a class is transformers' own.
OWN = "transformers.models."
#: What those classes import: a model that is handed on can make nothing else a requirement.
PACKAGES = (
    "transformers", "emoji", "fugashi", "ipadic", "mykytea", "protobuf", "pythainlp", "regex", "rhoknp", "rjieba",
    "sacremoses", "sentencepiece", "sudachidict-core", "sudachidict-full", "sudachidict-small", "sudachipy", "unidic",
    "unidic-lite",
)  # fmt: skip
#: Files by which transformers would choose another class, or run code, and which ``save_pretrained`` does not write.
_NEVER = ("config.json", "tokenizer.json")
#: Words whose pieces a tokenizer may remember; those of transformers forget none.
_REMEMBERED = 50_000
#: Settings that a tokenizer hands to the library below, with the values that mean the same on every machine.
_EVERYWHERE = {
    "mecab_kwargs": {"mecab_dic": ("ipadic", "unidic", "unidic_lite"), "mecab_option": (None, "")},
    "sudachi_kwargs": {
        "sudachi_split_mode": ("A", "B", "C", None), "sudachi_dict_type": ("small", "core", "full", None),
        "sudachi_config_path": (None,), "sudachi_resource_dir": (None,), "sudachi_projection": (None,),
    },
}  # fmt: skip
#: Settings by which other files would be read than those that lie beside.
_FILES = ("fast_tokenizer_files", "gguf_file", "vocab", "merges")
#: By class: each is written in Python that is no more thread-safe than what it calls (MeCab, a dict, a C library).
_locks: defaultdict[str, ThreadLock] = defaultdict(ThreadLock)
_within = threading.local()


_making = threading.Lock()


class UnreadableTextError(InvalidInputError):
    """A tokenizer's own code fails at a text.

    Attributes:
        row: Which one of those that it was given.
        why: What it said.
    """

    def __init__(self, row: int, text: str, error: Exception) -> None:
        self.row, self.why = row, f"{type(error).__name__}: {first_line(error)}"
        super().__init__(f"The model's tokenizer cannot read {shown(text)} ({self.why}). Leave it out.")


def _says_something(record: logging.LogRecord) -> bool:
    """Leave out what is said of every pair of texts that this module cuts: that what was cut off is not returned."""
    return not (getattr(_within, "here", False) and "overflowing tokens are not returned" in record.getMessage())


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
        with _making:
            self._lock = _locks[type(tokenizer).__name__]
        self._cut = {"truncation": strategy, "max_length": longest}
        remembered = getattr(tokenizer, "cache", None)
        self._cache = remembered if isinstance(remembered, dict) else {}
        self._first = dict(self._cache)

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
            IntegrityError: The files cannot be read, or would have other code run than transformers' own.
        """
        try:
            found = _class_of(folder).from_pretrained(str(folder), local_files_only=True)
            found.truncation_side = direction
            logging.getLogger("transformers.tokenization_python").addFilter(_says_something)
            return cls(found, longest, strategy)
        except IntegrityError:
            raise
        except ImportError as error:
            raise MissingDependencyError(
                ", ".join(needs), "The model's tokenizer, which has no fast form,", f"pip install {' '.join(needs)}"
            ) from error
        except Exception as error:  # whatever a tokenizer's own code meets in a damaged file
            raise IntegrityError(
                f"Cannot read the tokenizer's files: {first_line(error)}. Log the model again."
            ) from error

    def encode_batch(
        self, texts: Sequence[str | tuple[str, str]], *, add_special_tokens: bool = True
    ) -> list[SlowEncoding]:
        """Return the tokens of texts, or of pairs of them.

        Raises:
            TypeError: One is no Unicode, as the fast ones have it.
            UnreadableTextError: The tokenizer fails at one.
        """
        pairs: list[tuple[str, str | None]] = [(text, None) if isinstance(text, str) else text for text in texts]
        return [self._encoded(row, *pair, add_special_tokens) for row, pair in enumerate(pairs)]

    encode_batch_fast = encode_batch

    def encode(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> SlowEncoding:
        """Return the tokens of a text, or of two; raises as :meth:`encode_batch` does."""
        return self._encoded(0, text, pair, add_special_tokens)

    def _encoded(self, row: int, text: str, pair: str | None, add_special_tokens: bool) -> SlowEncoding:
        if not is_unicode(text + (pair or "")):
            raise TypeError("a lone surrogate")
        try:
            with self._alone():
                found: Mapping[str, list[int]] = self._tokenizer(
                    text, pair, add_special_tokens=add_special_tokens, return_token_type_ids=True,
                    return_special_tokens_mask=True, verbose=False, **self._cut,
                )  # fmt: skip
            return SlowEncoding(found["input_ids"], found["token_type_ids"], found["special_tokens_mask"])
        except (ImportError, OSError, MemoryError):  # the host's fault, whatever the text
            raise
        except Exception as error:  # a tokenizer's own code: a word too long for a library, a character it cannot take
            raise UnreadableTextError(row, text if pair is None else f"{text} | {pair}", error) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock.held():
            _within.here = True
            try:
                yield
            finally:
                _within.here = False
                if len(self._cache) > _REMEMBERED + len(self._first):
                    self._cache.clear()
                    self._cache.update(self._first)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return tokens as text."""
        with self._alone():
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token: int) -> str | None:
        """Return a token as the vocabulary has it."""
        found = self._tokenizer.convert_ids_to_tokens(token)
        return None if found is None else str(found)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a word that is a token."""
        return self._vocabulary.get(token)

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

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


def names_a_place(config: Mapping[str, Any]) -> str:
    """Return the setting of a tokenizer that names a place of a machine, such as a dictionary's; empty for none.

    Places are among the arguments of the library below (``mecab_kwargs``), which are handed to it as they are, and
    where a tokenizer of another kind would be told of its files.
    """
    for name, value in config.items():
        if value is not None and (name in _FILES or name.endswith("_file")):
            return name
        if isinstance(value, Mapping) and name.endswith("_kwargs"):
            known = _EVERYWHERE.get(name, {})
            for key, given in value.items():
                if given not in known.get(key, ()) and isinstance(given, (str, type(None))):
                    return f"{name}.{key}"
    return ""


def _class_of(folder: Path) -> Any:
    """Return the class that a tokenizer's settings name, where it is transformers' own.

    ``AutoTokenizer`` would load any class of transformers that they name, and code that such a class finds beside it.

    Raises:
        IntegrityError: The settings are not those of a tokenizer that this package has written.
    """
    said = json.loads((folder / CONFIG).read_text("utf-8"))
    if planted := [path.name for path in folder.iterdir() if path.name in _NEVER or path.suffix == ".py"]:
        raise IntegrityError(f"'{planted[0]}' lies among the tokenizer's files, and is none of them. Remove the file.")
    if "auto_map" in said or (place := names_a_place(said)):
        what = "auto_map (code of its own)" if "auto_map" in said else f"{place} (a place of a machine)"
        raise IntegrityError(f"The tokenizer's {CONFIG} has {what}, which is never written here. Log the model again.")
    import transformers

    name = str(said.get("tokenizer_class"))
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if lacking := getattr(found, "_backends", None):  # what stands for a class whose library is not here
        raise ImportError(f"{name} takes {', '.join(lacking)}")
    # those in Python alone: others are told where their files are by their settings
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizer)
            and found.__module__.startswith(OWN)):  # fmt: skip
        raise IntegrityError(
            f"The tokenizer's {CONFIG} names the class {name!r}, which is no tokenizer of this transformers "
            f"({transformers.__version__}). Install the version of the model's requirements.txt."
        )
    return found
