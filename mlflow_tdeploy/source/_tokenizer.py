"""Tokenizers: from a Hugging Face tokenizer to ``tokenizer.json`` and the text tasks' settings, proven equal."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_tdeploy.core.errors import ExportError, InvalidInputError, first_line
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tasks._slow_tokenizer import UnreadableTextError
from mlflow_tdeploy.core.tasks._text import TextTask
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source._shapes import BATCH, Shapes, make_dims
from mlflow_tdeploy.source._slow_tokenizer import check_slow, slow_settings, write_slow

#: Tokens a text may have where neither tokenizer nor model says.
UNKNOWN_LENGTH = 512
#: Characters of a text that leaves room for another.
_SHORT = 60
#: transformers' way to say "no limit" is 1e30.
_INSANE = 1_000_000
_OPT_SEQUENCE = 128
#: Our tokenization must give the same ids for each of these.
PARITY_TEXTS = (
    "",
    "A plain sentence, with punctuation: it's 3.14% (or so)!",
    "  white \t space \n around  ",
    "ÀÉÎõü Straße ﬁne naïve İstanbul",
    "emoji 👩‍👩‍👧 🇩🇪 and symbols ∑ → €",
    "漢字とカタカナ 한국어 العربية",
    "[CLS] [SEP] [MASK] <s> </s> <pad> <|endoftext|>",
    "UPPER lower MiXeD_snake CamelCase a.b.c/d\\e http://example.org?q=1",
    "combining e\u0301 zero\u200bwidth soft\u00adhyphen nbsp\u00a0 \u2028 control\x07",
    "antidisestablishmentarianism " * 400,
)

#: Returns the tokens of a text, or of two.
Encode = Callable[..., Mapping[str, Sequence[int]]]


def check_tokenizer(tokenizer: Any, task: str) -> Any:
    """Return a tokenizer, loading it from a folder where a path is given.

    Args:
        tokenizer: The tokenizer, or its folder.
        task: The task that it is for.

    Raises:
        InvalidInputError: There is none, or it has no fast form and the task needs one, or it is not transformers' own.
    """
    if tokenizer is None:
        raise InvalidInputError(
            "A text task needs the model's tokenizer. Pass tokenizer=AutoTokenizer.from_pretrained(...), or a "
            "transformers pipeline, which has one."
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(tokenizer, (str, Path)):
        if not Path(tokenizer).is_dir():
            raise InvalidInputError(f"tokenizer must be a tokenizer or its folder; there is no folder '{tokenizer}'.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise InvalidInputError(
                f"No tokenizer can be read from '{Path(tokenizer).name}': {first_line(error)} "
                f"Save it there with tokenizer.save_pretrained(folder), or pass it as tokenizer=."
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InvalidInputError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}.")
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # what AutoTokenizer makes up for a folder that has a config.json and no tokenizer
        raise InvalidInputError(
            f"The {type(tokenizer).__name__} knows special tokens only: the model's folder has no tokenizer files. "
            f"Save the tokenizer there with tokenizer.save_pretrained(folder), or pass it as tokenizer=."
        )
    if not tokenizer.is_fast:
        check_slow(tokenizer, task)
    return tokenizer


def token_limit(tokenizer: Any, *limits: int | None) -> int:
    """Return the longest text in tokens, special ones included: the least that anything says."""
    said = [limit for limit in (tokenizer.model_max_length, *limits) if limit and limit < _INSANE]
    return int(min(said, default=UNKNOWN_LENGTH))


def tokenizer_settings(tokenizer: Any, max_length: int, *, strip: bool = False) -> dict[str, Any]:
    """Return the tokenizer's part of a text task's settings."""
    return {
        "max_length": max_length,
        "pad_id": int(tokenizer.pad_token_id or 0),
        "pad_type_id": int(tokenizer.pad_token_type_id or 0),
        "padding_side": str(tokenizer.padding_side),
        "truncation_side": str(tokenizer.truncation_side),
        "strip": strip,
        **slow_settings(tokenizer),
    }


def task_tokens(task: str, tokenizer: Any) -> dict[str, Any]:
    """Return what a task's settings ask of the tokenizer.

    Raises:
        InvalidInputError: It fills masks, and the tokenizer has none.
    """
    asked = {one.name for one in dataclasses.fields(TASKS.get(task).settings)}
    if "mask_id" in asked and tokenizer.mask_token_id is None:
        raise InvalidInputError(
            f"Task '{task}' fills masks, and this {type(tokenizer).__name__} has no mask token. Set "
            f"tokenizer.mask_token to the one that the model was trained with."
        )
    found = {
        "mask_id": tokenizer.mask_token_id,
        "blank_id": -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "cls_id": -1 if tokenizer.cls_token_id is None else tokenizer.cls_token_id,
        "unk_id": -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id,
        # of BPE, transformers ignores it
        "tidy": bool(tokenizer.clean_up_tokenization_spaces)
        and tokenizer.is_fast  # others tidy up themselves
        and type(tokenizer.backend_tokenizer.model).__name__ != "BPE",
    }
    return {name: value for name, value in found.items() if name in asked}


def text_inputs(tokenizer: Any, accepted: set[str] | None) -> tuple[TensorSpec, ...]:
    """Return the inputs that the tokenizer makes and the model takes.

    Args:
        tokenizer: The tokenizer.
        accepted: Names of the model's parameters; None for any.

    Raises:
        InvalidInputError: The model takes more of what the tokenizer makes.
    """
    made = set(tokenizer("a")) | {"attention_mask"}
    known = ("input_ids", "attention_mask", "token_type_ids")
    if more := sorted((made & (accepted or set())) - {*known}):
        raise InvalidInputError(
            f"{type(tokenizer).__name__} also makes '{more[0]}', which the model takes and no task of texts fills. Log "
            f"it with task='tensors' and example inputs."
        )
    names = [name for name in known if name in made]
    return tuple(
        TensorSpec(name, "int64", ("batch", "sequence")) for name in names if accepted is None or name in accepted
    )


def text_dims(tokenizer: Any, max_length: int, limit: int | None, shapes: Shapes | None) -> tuple[Dim, ...]:
    """Return batch and sequence with their ranges.

    No text has fewer tokens than the special ones and one more, but for the empty one, which is padded: a sequence
    begins there, whatever the user wants.

    Args:
        tokenizer: The tokenizer.
        max_length: Where texts are truncated.
        limit: Most tokens the model can take; None for any number.
        shapes: What the user wants.

    Raises:
        InvalidInputError: The longest sequence is longer than the model can take, or too short for any text.
    """
    longest = min(max_length, limit or max_length)
    special = tokenizer.num_special_tokens_to_add()
    shortest = min(special + 1, longest)
    defaults = (Dim("batch", *BATCH), Dim("sequence", shortest, max(shortest, min(_OPT_SEQUENCE, longest)), longest))
    dims = make_dims(defaults, shapes)
    sequence = next(dim for dim in dims if dim.name == "sequence")
    if limit is not None and sequence.max > limit:
        raise InvalidInputError(
            f"shapes wants sequences of up to {sequence.max} tokens, but the model has {limit} positions. "
            f"Use 'sequence': ({sequence.min}, {min(sequence.opt, limit)}, {limit})."
        )
    if sequence.max <= special:
        raise InvalidInputError(
            f"shapes allows {sequence.max} tokens, but every text has {special} special ones. "
            f"Allow at least {special + 1}."
        )
    raised = Dim("sequence", max(shortest, sequence.min), max(shortest, sequence.opt), sequence.max)
    return tuple(raised if dim is sequence else dim for dim in dims)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer.json``, the only thing that serving needs of a tokenizer; the files of one without it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not tokenizer.is_fast:
        write_slow(tokenizer, folder)
        return
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")


def encode_with(tokenizer: Any, max_length: int) -> Encode:
    """Return the Hugging Face tokenizer as a function of one text, or of two, truncating."""

    def encode(text: str, pair: str | None = None) -> Mapping[str, Sequence[int]]:
        encoded: Mapping[str, Sequence[int]] = tokenizer(text, pair, truncation=True, max_length=max_length)
        return encoded

    return encode


def check_parity(task: str, config: Mapping[str, Any], signature: Signature, tokenizer: Any, expected: Encode) -> None:
    """Make sure that the task tokenizes as the original does.

    Raises:
        ExportError: It does not; the message shows the text and both ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(tokenizer, Path(folder))
        ours = TASKS.get(task)(config, signature, Path(folder))
        assert isinstance(ours, TextTask)
        size = signature.inputs[0].shape[1]
        longest = min(int(config["max_length"]), size if isinstance(size, int) else signature.dim(size).max)
        for item in _parity_items(ours, tokenizer):
            texts = [item] if isinstance(item, str) else list(item)
            text, wanted = " | ".join(texts), expected(*texts)
            try:
                stripped = [item.strip() if ours.config.strip and isinstance(item, str) else item]
                encoded = ours.encoded(stripped, ours.tokenized(ours.tokenizer, stripped))
            except UnreadableTextError as error:
                raise ExportError(
                    f"The tokenizer cannot read what others can, from its saved files: {text[:60]!r} ({error.why})."
                ) from error
            except InvalidInputError as error:  # no tokens
                if wanted["input_ids"]:
                    raise _not_reproduced(text, "input_ids", [], wanted) from error
                continue
            width = encoded.lengths[0]
            if longest < len(wanted["input_ids"]):  # the user asked for shorter texts than the original takes
                continue
            _compare(text, ours.signature, encoded.collate([0]), wanted, width, config)


def _parity_items(task: TextTask, tokenizer: Any) -> Iterator[str | tuple[str, str]]:
    """Yield texts, and pairs of them for a task that reads such: short ones beside every other, as questions are."""
    texts = (*PARITY_TEXTS, " ".join(("a", *tokenizer.all_special_tokens, "b")))
    yield from texts
    if len(task.columns) > 1:
        short = [text for text in texts if len(text) < _SHORT]
        for place, text in enumerate(filter(None, texts)):  # no second text, for some callers, is one that is empty
            yield short[place % len(short)], text


def _compare(
    text: str, signature: Signature, feeds: Mapping[str, Any], wanted: Mapping[str, Any], width: int, config: Any
) -> None:
    for spec in signature.inputs:
        if spec.name not in wanted or spec.name == "attention_mask":
            continue
        row = feeds[spec.name][0]
        got = row[len(row) - width :] if config.get("padding_side") == "left" else row[:width]
        if got.tolist() != list(wanted[spec.name]):
            raise _not_reproduced(text, spec.name, got.tolist(), wanted)


def _not_reproduced(text: str, name: str, got: list[int], wanted: Mapping[str, Any]) -> ExportError:
    return ExportError(
        f"The tokenizer cannot be reproduced from its saved files: {text[:60]!r} gives {name} {got[:12]} from them "
        f"and {list(wanted[name])[:12]} from the original. Log the model with task='tensors' and "
        f"tokenize in the client."
    )
