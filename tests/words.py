"""A tokenizer of a few words, padding on either side, with or without special tokens around a text."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SENTENCE = "a film of one two three four five six seven eight nine ten short text to see what padding changes"
WORDS = SENTENCE.split()
TEXTS = ["a film", "one two three four five six seven eight nine ten", "of a short text", "ten"]
SIZE = len(WORDS) + 3


def word_tokenizer(side: str = "left", frame: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Make it; ``frame`` puts ``<eos>`` at both ends of every text."""
    vocabulary = {"<eos>": 0, "<pad>": 1, "<unk>": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<eos> $A <eos>", pair="<eos> $A $B <eos>", special_tokens=[("<eos>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=32,
        padding_side=side,
    )  # fmt: skip
