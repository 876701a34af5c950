"""Small models that answer for tokens, each with another kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

from tests.served import texts

LABELS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG"]
#: Kinds of tokenizers: WordPiece (words of its own), byte-level BPE, Unigram (both without).
MODELS = ("bert", "roberta", "xlm-roberta")


def tagger(kind: str, minilm: Path, folder: Path) -> Path:
    """Write a model with random weights that finds entities in most texts; return its folder."""
    from transformers import AutoModelForTokenClassification

    named = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    return _written(AutoModelForTokenClassification, kind, minilm, folder, **named)


def entailer(kind: str, minilm: Path, folder: Path) -> Path:
    """Write a model of natural language inference with random weights; return its folder."""
    from transformers import AutoModelForSequenceClassification

    names = {"contradiction": 0, "neutral": 1, "entailment": 2}
    named = {"id2label": {index: name for name, index in names.items()}, "label2id": names}
    return _written(AutoModelForSequenceClassification, kind, minilm, folder, **named)


def asker(kind: str, minilm: Path, folder: Path) -> Path:
    """Write a model with random weights that says where answers are; return its folder."""
    from transformers import AutoModelForQuestionAnswering

    return _written(AutoModelForQuestionAnswering, kind, minilm, folder)


def ranker(kind: str, minilm: Path, folder: Path) -> Path:
    """Write a model with random weights that scores pairs of texts; return its folder."""
    from transformers import AutoModelForSequenceClassification

    return _written(AutoModelForSequenceClassification, kind, minilm, folder, num_labels=1)


def filler(kind: str, minilm: Path, folder: Path) -> Path:
    """Write a model with random weights that fills masks; return its folder."""
    from transformers import AutoModelForMaskedLM

    return _written(AutoModelForMaskedLM, kind, minilm, folder)


def _written(auto, kind: str, minilm: Path, folder: Path, **more) -> Path:
    import torch
    from transformers import AutoConfig

    tokenizer = tokenizer_of(kind, minilm)
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128 if kind == "bert" else 130, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, type_vocab_size=2 if kind == "bert" else 1, **more,
    )  # fmt: skip
    auto.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(kind: str, minilm: Path):
    """Return the real WordPiece tokenizer, or one of another kind that was trained on real texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if kind == "bert":
        return AutoTokenizer.from_pretrained(minilm, model_max_length=128)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "roberta":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=1500, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator(texts(2000)[:2000], trainer)
    if kind == "roberta":
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    else:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>", model_max_length=128,
    )  # fmt: skip
