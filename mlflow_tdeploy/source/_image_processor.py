"""What a Hugging Face image processor does, as a task's settings, and the proof that it is the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import ExportError, InvalidInputError, NotFoundError, TDeployError, first_line
from mlflow_tdeploy.core.images import made_up_image, pillow
from mlflow_tdeploy.core.records import from_plain
from mlflow_tdeploy.core.tasks import TASKS, Head, heads
from mlflow_tdeploy.core.tasks._image import INPUT, ImageConfig, ImageTask
from mlflow_tdeploy.core.tensors import Array, Signature

#: Heights and widths that settings are proven on: wide, tall, square, smaller and larger than models', a lone pixel.
_PROOF = ((48, 64), (64, 48), (300, 300), (480, 333), (7, 31), (1, 1), (700, 1001))
#: Below this side, ConvNeXt's processor cuts the middle out of a larger image (its ``crop_pct``).
_CONVNEXT_WARPS = 384
#: How far values may be: both are computed in float32, in one order.
_CLOSE = 1e-6


def image_heads() -> dict[str, Head]:
    """Return what tasks need of models of images, by task."""
    return {task: head for task, head in heads().items() if TASKS.get(task).input_kind == "image"}


def open_processor(given: Any) -> Any:
    """Return an image processor that resizes with Pillow, from one of any kind or its folder.

    Raises:
        InvalidInputError: It is none.
        NotFoundError: The folder has none.
    """
    from transformers import AutoImageProcessor

    if given is None:
        raise InvalidInputError(
            "A model of images needs its image processor: pass image_processor=, a transformers image processor or its "
            "folder."
        )
    if isinstance(given, (str, Path)):
        if not Path(given).is_dir():
            raise NotFoundError(f"image_processor= is '{given}', and there is no such folder.")
        try:
            given = AutoImageProcessor.from_pretrained(str(given), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever it meets
            raise InvalidInputError(
                f"'{Path(given).name}' has no image processor that can be read: {first_line(error)}. Save it there, or "
                f"pass image_processor=."
            ) from error
    if not callable(given) or not hasattr(given, "image_mean"):
        raise InvalidInputError(f"image_processor= is a {type(given).__name__}, and no transformers image processor.")
    return _of_pillow(given)


def _of_pillow(processor: Any) -> Any:
    """Return a processor's form that resizes with Pillow: serving has no torchvision, whose filters differ a little."""
    import transformers

    if getattr(processor, "backend", "torchvision" if type(processor).__name__.endswith("Fast") else "pil") == "pil":
        return processor
    base = type(processor).__name__.removesuffix("Fast")
    for name in (f"{base}Pil", base):
        kind = getattr(transformers, name, None)
        if kind is not None and kind is not type(processor):
            return kind.from_dict(processor.to_dict())
    return processor


def processor_settings(processor: Any) -> dict[str, Any]:
    """Return an image processor's settings as those of a task.

    Raises:
        InvalidInputError: Its images do not come to one size, or it does something that no task does.
    """
    try:
        found = _settings({name: getattr(processor, name, None) for name in _NAMES}, type(processor).__name__)
        from_plain(ImageConfig, found, "settings of images")
    except (TDeployError, KeyError) as error:
        raise InvalidInputError(
            f"{type(processor).__name__} cannot be reproduced: {error} Log the model with task='tensors' and example "
            f"inputs, and make images ready yourself."
        ) from error
    return found


def _settings(asked: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"resample": int(asked["resample"] if asked["resample"] is not None else 2)}
    if asked["do_resize"]:
        found |= _resized(kind, _sizes(asked["size"]), asked["crop_pct"])
    if asked["do_center_crop"]:
        found["crop"] = _pair(_sizes(asked["crop_size"]))
    if asked["do_rescale"]:
        found["factor"] = float(asked["rescale_factor"])
        found["offset"] = -1.0 if asked["rescale_offset"] else 0.0
    if asked["do_normalize"]:
        found |= {"mean": _channels(asked["image_mean"]), "std": _channels(asked["image_std"])}
        found["again"] = bool(asked["include_top"])
    found["bgr"] = bool(asked["do_flip_channel_order"])
    return found


_NAMES = (
    *("do_resize", "size", "resample", "crop_pct", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("rescale_offset", "do_normalize", "image_mean", "image_std", "include_top", "do_flip_channel_order"),
)


def _sizes(value: Any) -> dict[str, int]:
    """Return a processor's size without what is not set; transformers has a class of its own for it, or mappings."""
    names = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
    if isinstance(value, int):
        return {"height": value, "width": value}
    pairs = ((name, value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)) for name in names)
    return {name: int(size) for name, size in pairs if size}


def _pair(sizes: Mapping[str, int]) -> list[int]:
    if {"height", "width"} <= set(sizes):
        return [sizes["height"], sizes["width"]]
    return [sizes["shortest_edge"]] * 2 if "shortest_edge" in sizes else []


def _resized(kind: str, sizes: Mapping[str, int], crop_share: float | None) -> dict[str, Any]:
    """Return how a processor of a kind resizes; some mean other sizes than they say."""
    edge = sizes.get("shortest_edge", 0)
    if kind.startswith("ConvNext") and edge:
        if edge >= _CONVNEXT_WARPS:
            return {"size": [edge, edge]}
        return {"shortest_edge": int(edge / (crop_share or 224 / 256)), "crop": [edge, edge]}
    if kind.startswith("PoolFormer") and crop_share:
        side = edge or sizes.get("height", 0)
        return {"shortest_edge": int(side / crop_share)}
    if kind.startswith("Levit") and edge:
        return {"shortest_edge": int((256 / 224) * edge)}
    return {"shortest_edge": edge} if edge else {"size": _pair(sizes)}


def _channels(value: Any) -> list[float]:
    if value is None:
        raise InvalidInputError("It normalizes by numbers of each image, or has none.")
    return [float(value)] * 3 if isinstance(value, (int, float)) else [float(one) for one in value]


def check_image_parity(task: str, config: Mapping[str, Any], signature: Signature, processor: Any) -> None:
    """Make sure that the task makes of images what the processor makes.

    Raises:
        ExportError: It does not.
    """
    ours = TASKS.get(task)(config, signature, Path())
    assert isinstance(ours, ImageTask)
    for seed, (height, width) in enumerate(_PROOF):
        image = made_up_image(seed, height, width)
        got = ours.encode([image]).whole()[INPUT]
        wanted = _asked(processor, image)
        if wanted.shape != got[:1].shape or not np.allclose(wanted, got[:1], rtol=0, atol=_CLOSE):
            off = float(np.abs(wanted - got[:1]).max()) if wanted.shape == got[:1].shape else math.nan
            told = f"values differ by {off:.3g}" if off == off else f"it gives {wanted.shape}, not {got[:1].shape}"
            raise ExportError(
                f"{type(processor).__name__} cannot be reproduced: of an image of {width} x {height} {told}. Log the "
                f"model with task='tensors' and example inputs, and make images ready yourself."
            )


def _asked(processor: Any, image: Array) -> Array:
    try:
        found = processor(images=pillow().fromarray(image), return_tensors="np")
    except Exception as error:  # whatever a processor meets
        raise ExportError(f"{type(processor).__name__} fails on an image: {first_line(error)}") from error
    if set(found) != {INPUT}:
        raise ExportError(
            f"{type(processor).__name__} makes {', '.join(sorted(found))} of an image, and a model of this task takes "
            f"{INPUT} alone. Log the model with task='tensors' and example inputs."
        )
    return np.asarray(found[INPUT], np.float32)
