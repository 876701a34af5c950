"""Models of every architecture that is promised, small and with random weights, made from transformers' configs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import peers

#: Sizes of models that tell whether all goes well, and of such as tell how fast it is: MiniLM's, of fewer layers.
_SIZES = {
    False: {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    True: {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 1536},
}
_TEXT = {"vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 130, "initializer_range": 0.1}
_TEXT_TASKS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "sentence-embedding": "",
}
_IMAGE_TASKS = {"image-classification": "AutoModelForImageClassification", "image-feature-extraction": "AutoModel"}
#: Pixels of an image's side.
_SIDES = {False: 64, True: 224}
#: Returns what ``save_model`` takes, for a task: of a model that is wide, or a small one.
Made = Callable[[str, bool], Mapping[str, Any]]


def _named(settings: Mapping[str, Any], wide: bool) -> dict[str, Any]:
    """Return settings where the name of a size stands for it, and a pair for that of a small and of a wide model."""
    sizes = {**_SIZES[wide], "side": _SIDES[wide]}
    chosen = {name: value[wide] if isinstance(value, tuple) else value for name, value in settings.items()}
    return {name: sizes.get(value, value) if isinstance(value, str) else value for name, value in chosen.items()}


def _text(kind: str, *, named: bool = False, **settings: Any) -> Made:
    """Return what makes models of texts; ``named`` where the architecture calls all its sizes otherwise."""

    def make(task: str, wide: bool) -> Mapping[str, Any]:
        import transformers

        usual = {} if named else {**_SIZES[wide], **_TEXT}
        config = transformers.AutoConfig.for_model(kind, **{**usual, **_named(settings, wide)})
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(peers.MODEL), model_max_length=64)
        found = {"tokenizer": tokenizer, "task": task, "shapes": {"batch": (1, 8, 16), "sequence": (3, 32, 64)}}
        if _TEXT_TASKS[task]:
            return {**found, "model": getattr(transformers, _TEXT_TASKS[task]).from_config(config).eval()}
        return _pooled(transformers.AutoModel.from_config(config).eval(), tokenizer, found["shapes"])

    return make


def _pooled(model: Any, tokenizer: Any, shapes: Any) -> Mapping[str, Any]:
    """Return a SentenceTransformer of a model, with pooling by the mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    with tempfile.TemporaryDirectory(prefix="tdeploy-architectures-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=64)
    chain = SentenceTransformer(modules=[transformer, Pooling(model.config.hidden_size, "mean")], device="cpu")
    return {"model": chain, "shapes": shapes}


def _image(kind: str, processor: str = "ViTImageProcessorPil", *, sized: bool = False, **settings: Any) -> Made:
    """Return what makes models of images; ``sized`` where they have a transformer's usual sizes."""

    def make(task: str, wide: bool) -> Mapping[str, Any]:
        import transformers

        usual = {**_SIZES[wide], "image_size": _SIDES[wide], "patch_size": 16} if sized else {}
        config = transformers.AutoConfig.for_model(kind, **{"num_labels": 7, **usual, **_named(settings, wide)})
        side = _SIDES[wide]
        edge = {"shortest_edge": side} if processor.startswith("ConvNext") else {"height": side, "width": side}
        return {
            "model": getattr(transformers, _IMAGE_TASKS[task]).from_config(config).eval(),
            "image_processor": getattr(transformers, processor)(size=edge),
            "task": task,
            "shapes": {"batch": (1, 8, 16)},
        }

    return make


def _tower(kind: str) -> Made:
    def make(task: str, wide: bool) -> Mapping[str, Any]:
        import transformers

        if kind == "vision":
            side = _SIDES[wide]
            config = transformers.CLIPVisionConfig(**_SIZES[wide], image_size=side, patch_size=16)
            processor = transformers.ViTImageProcessorPil(size={"height": side, "width": side})
            model = transformers.CLIPVisionModel(config).eval()
            return {"model": model, "image_processor": processor, "task": task, "shapes": {"batch": (1, 8, 16)}}
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(peers.MODEL), model_max_length=64)
        more = {"vocab_size": 30522, "max_position_embeddings": 64, "eos_token_id": tokenizer.sep_token_id}
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_SIZES[wide], **more)).eval()
        return {
            "model": model, "tokenizer": tokenizer, "task": task,
            "shapes": {"batch": (1, 8, 16), "sequence": (4, 32, 64)},
        }  # fmt: skip

    return make


def _sound(kind: str) -> Made:
    def make(task: str, wide: bool) -> Mapping[str, Any]:
        import transformers

        random, sizes = np.random.default_rng(0), _SIZES[wide]
        if kind == "whisper":
            config = transformers.WhisperConfig(
                d_model=sizes["hidden_size"], encoder_layers=2, encoder_attention_heads=sizes["num_attention_heads"],
                encoder_ffn_dim=sizes["intermediate_size"], decoder_layers=1,
                decoder_attention_heads=sizes["num_attention_heads"], decoder_ffn_dim=128,
                max_source_positions=100, num_mel_bins=16,
            )  # fmt: skip
            model, name, size = transformers.WhisperModel(config).encoder.eval(), "input_features", (16, 200)
        else:
            config = transformers.Wav2Vec2Config(**sizes, conv_dim=[32] * 7, num_conv_pos_embeddings=16)
            model, name, size = transformers.Wav2Vec2Model(config).eval(), "input_values", (4000,)
        waves = [random.normal(size=(2, *size)).astype(np.float32) for _ in range(8)]
        return {
            "model": model, "task": task, "example": {name: waves[0]}, "verify_with": [{name: one} for one in waves],
            "shapes": {"batch": (1, 2, 4)},
        }  # fmt: skip

    return make


_TEXTS = tuple(_TEXT_TASKS)
_NO_MASKS = tuple(task for task in _TEXTS if task != "fill-mask")
#: What makes the models of an architecture, and the tasks that it has a head for.
ARCHITECTURES: Mapping[str, tuple[Made, Sequence[str]]] = {
    "BERT": (_text("bert"), _TEXTS),
    "RoBERTa": (_text("roberta"), _TEXTS),
    "DistilBERT": (
        _text("distilbert", dim="hidden_size", hidden_dim="intermediate_size", n_layers=2,
              n_heads="num_attention_heads"), _TEXTS,
    ),
    "ALBERT": (_text("albert", embedding_size=32), _TEXTS),
    "ELECTRA": (_text("electra", embedding_size=32), _TEXTS),
    "DeBERTa-v2": (
        _text("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32), _TEXTS,
    ),
    "MPNet": (_text("mpnet"), _TEXTS),
    "XLM-R": (_text("xlm-roberta"), _TEXTS),
    "ModernBERT": (_text("modernbert", global_attn_every_n_layers=2, local_attention=16), _TEXTS),
    "CamemBERT": (_text("camembert"), _TEXTS),
    "XLNet": (
        _text("xlnet", named=True, vocab_size=30522, d_model="hidden_size", n_layer=2, n_head="num_attention_heads",
              d_inner="intermediate_size"), _NO_MASKS,
    ),
    "Longformer": (_text("longformer", attention_window=[16, 16]), _TEXTS),
    "BigBird": (_text("big_bird", attention_type="original_full"), _TEXTS),
    "ViT": (_image("vit", sized=True), tuple(_IMAGE_TASKS)),
    # transformers has two classifiers of it, and asks the config which
    "DeiT": (_image("deit", sized=True, architectures=["DeiTForImageClassification"]), tuple(_IMAGE_TASKS)),
    "DINOv2": (_image("dinov2", sized=True), tuple(_IMAGE_TASKS)),
    "Swin": (
        _image("swin", image_size="side", patch_size=4, embed_dim=(24, 96), depths=[1, 1], num_heads=([2, 4], [3, 6]),
               window_size=(4, 7)), tuple(_IMAGE_TASKS),
    ),
    "ConvNeXt": (
        _image("convnext", "ConvNextImageProcessorPil", hidden_sizes=([16, 32, 64, 128], [96, 192, 384, 768]),
               depths=[1, 1, 1, 1]), tuple(_IMAGE_TASKS),
    ),
    "ResNet": (
        _image("resnet", "ConvNextImageProcessorPil", embedding_size=(16, 64), hidden_sizes=([16, 32], [256, 512]),
               depths=[1, 1]), tuple(_IMAGE_TASKS),
    ),
    "CLIP, of texts": (_tower("text"), ("feature-extraction",)),
    "CLIP, of images": (_tower("vision"), ("image-feature-extraction",)),
    "Whisper's encoder": (_sound("whisper"), ("tensors",)),
    "Wav2Vec2's encoder": (_sound("wav2vec2"), ("tensors",)),
}  # fmt: skip
