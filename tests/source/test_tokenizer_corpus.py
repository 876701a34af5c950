"""Tokens are Hugging Face's own for tens of thousands of real strings, whatever kind of tokenizer makes them."""

from __future__ import annotations

import copy
import functools
import unicodedata

import pytest

from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from mlflow_tdeploy.source._tokenizer import tokenizer_settings, write_tokenizer
from tests.core.tasks.token_models import tokenizer_of
from tests.corpus import corpus

KINDS = ("WordPiece", "BPE", "byte-level BPE", "Unigram")
LONGEST = 24  # tokens: many a string is cut


@functools.cache
def tokenizer(kind, minilm_path):
    if kind == "BPE":
        return plain_bpe()
    models = {"WordPiece": "bert", "byte-level BPE": "roberta", "Unigram": "xlm-roberta"}
    return tokenizer_of(models[kind], minilm_path)


def plain_bpe():
    """Return one whose words have an end of their own, as those of CLIP and the first GPT have, in lower case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, end_of_word_suffix="</w>")
    made.train_from_iterator(corpus()[::20], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip


@pytest.fixture(params=KINDS)
def original(request, minilm_path):
    return copy.deepcopy(tokenizer(request.param, minilm_path))  # tests add tokens


def task_of(original, folder, *, longest=LONGEST):
    write_tokenizer(original, folder)
    dims = (Dim("batch", 1, 8, 64), Dim("sequence", 1, 16, 512))
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    signature = Signature(dims, inputs, (TensorSpec("logits", "float32", ("batch", 2)),))
    config = {**tokenizer_settings(original, longest), "labels": ["no", "yes"]}
    return TASKS.get("text-classification")(config, signature, folder)


def same(task, original, items, *, longest=LONGEST):
    """Hold ids and types of every item against the original's."""
    texts = [item if isinstance(item, str) else item[0] for item in items]
    pairs = None if isinstance(items[0], str) else [item[1] for item in items]
    wanted = original(texts, pairs, truncation=True, max_length=longest, return_token_type_ids=True)
    got = task.encode(list(items)).encodings
    assert len(got) == len(items)
    for item, mine, ids, types in zip(items, got, wanted["input_ids"], wanted["token_type_ids"], strict=True):
        assert (list(mine.ids), list(mine.type_ids)) == (ids, types), item


def test_the_corpus_is_large_and_of_many_scripts():
    texts = corpus()
    scripts = {unicodedata.name(letter, "").split(" ")[0] for text in texts for letter in text if letter.isalpha()}
    assert len(texts) >= 20_000
    assert len(scripts) >= 30


def test_every_string_has_the_originals_tokens(original, tmp_path):
    same(task_of(original, tmp_path), original, corpus())


def test_every_pair_has_the_originals_tokens(original, tmp_path):
    texts = corpus()[::4]
    same(task_of(original, tmp_path), original, list(zip(texts, reversed(texts), strict=True)))


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_added_and_special_tokens_and_the_side_that_is_cut_are_kept(original, tmp_path, truncation):
    from tokenizers import AddedToken

    original.truncation_side = truncation
    original.add_tokens(["<extra>", "naïve", AddedToken("new", single_word=True), AddedToken("wide", lstrip=True)])
    original.add_special_tokens({"additional_special_tokens": ["<|turn|>", "[漢]"]})
    marks = ("<extra>", "new", "<|turn|>", "naïve", "wide", "[漢]", "renewed", *original.all_special_tokens)
    texts = [
        f"{text[:30]} {marks[index % len(marks)]}{text[30:50]} {marks[(index + 3) % len(marks)]}"
        for index, text in enumerate(corpus()[::20])
    ]
    for longest in (12, LONGEST):
        same(task_of(original, tmp_path, longest=longest), original, texts, longest=longest)
        same(task_of(original, tmp_path, longest=longest), original, list(zip(texts, texts[::-1])), longest=longest)  # noqa: B905


def test_padded_rows_are_the_originals(original, tmp_path):
    task, texts = task_of(original, tmp_path), corpus()
    for side in ("left", "right"):
        original.padding_side = side
        task = task_of(original, tmp_path)
        for begin in range(0, len(texts), 1500):
            some = list(texts[begin : begin + 32])
            wanted = original(some, truncation=True, max_length=LONGEST, padding=True, return_token_type_ids=True)
            got = task.encode(some).collate(range(len(some)))
            for name, array in got.items():
                assert array.tolist() == wanted[name], name
