"""Small models of images with random weights, each with another way of making images ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = ["temple", "flower", "portrait", "sky", "leaf", "coat", "wall"]
#: A transformer, a ConvNet whose images are cut, one with a pooled map, a window transformer.
MODELS = ("vit", "convnext", "resnet", "swin")
_SIDE = 64


def _config(kind: str, more: dict[str, Any]) -> Any:
    from transformers import ConvNextConfig, ResNetConfig, SwinConfig, ViTConfig

    if kind == "vit":
        own = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        return ViTConfig(**own, image_size=_SIDE, patch_size=16, initializer_range=0.2, **more)
    if kind == "convnext":
        return ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, initializer_range=0.2, **more)
    if kind == "resnet":
        return ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **more)
    return SwinConfig(
        image_size=_SIDE, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4,
        initializer_range=0.6, **more,
    )  # fmt: skip


def processor_of(kind: str) -> Any:
    """The image processor that transformers has for such a model, for small images."""
    from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

    if kind in ("convnext", "resnet"):
        return ConvNextImageProcessorPil(size={"shortest_edge": _SIDE}, crop_pct=0.875)
    return ViTImageProcessorPil(size={"height": _SIDE, "width": _SIDE})


def model_of(kind: str, *, head: bool = True, **more: Any) -> Any:
    """A model with random weights."""
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    torch.manual_seed(7)
    named = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    config = _config(kind, {**(named if head else {}), **more})
    return (AutoModelForImageClassification if head else AutoModel).from_config(config).eval()


def written(kind: str, folder: Path, *, head: bool = True) -> Path:
    """Write a model with its image processor; return its folder."""
    model_of(kind, head=head).save_pretrained(str(folder))
    processor_of(kind).save_pretrained(str(folder))
    return folder
