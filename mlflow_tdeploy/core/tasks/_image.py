"""What all image tasks share: from files and pixels to what a model of images takes.

The steps are those of Hugging Face's image processors of the Pillow kind, in their order and with their arithmetic
(https://github.com/huggingface/transformers, ``image_processing_backends.py``): sizes, crop, and a function of each
channel's 256 values, which is kept as a table.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from mlflow_tdeploy.core.columns import IMAGE, Column
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.hardware import usable_cores
from mlflow_tdeploy.core.images import Image, check_size, made_up_image, pillow, pixel_count, pixels
from mlflow_tdeploy.core.tasks._base import Encoded
from mlflow_tdeploy.core.tasks._items import ItemTask
from mlflow_tdeploy.core.tensors import Array, Arrays, At

INPUT = "pixel_values"
#: Side of the squares that an image's cost is counted in, as most vision transformers cut theirs.
_PATCH = 16
#: Fewer images than these are made ready one after the other: threads cost more than they save.
_FEW = 3
#: Threads at most, and pixels of an image that is made ready by one alone: decoded it takes three bytes for each.
_MOST_THREADS, _LARGE = 8, 16_000_000


@dataclass(frozen=True)
class ImageConfig:
    """Settings of an image task, from a model's ``preprocessor_config.json``.

    Attributes:
        size: Height and width that images are brought to; empty where ``shortest_edge`` says it, or nothing does.
        shortest_edge: Length of the shorter side, the other one by the same ratio; 0 for none.
        resample: Pillow's number of the filter.
        crop: Height and width that are cut from the middle, with black around where there is less; empty for none.
        factor: What the values 0 to 255 are multiplied with; None for nothing.
        offset: What is added then.
        mean: What is subtracted, by channel; empty for nothing.
        std: What is divided by, by channel.
        again: Whether it is divided once more, as EfficientNet's does.
        bgr: Whether the channels are turned around.
    """

    size: tuple[int, ...] = ()
    shortest_edge: int = 0
    resample: int = 2
    crop: tuple[int, ...] = ()
    factor: float | None = None
    offset: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    again: bool = False
    bgr: bool = False

    def __post_init__(self) -> None:
        for name, counts in (("size", (0, 2)), ("crop", (0, 2)), ("mean", (0, 3)), ("std", (0, 3))):
            if len(getattr(self, name)) not in counts:
                raise InvalidInputError(f"{name} must have {counts[1]} numbers, got {getattr(self, name)}.")
        if min((1, *self.size, *self.crop)) < 1 or self.shortest_edge < 0 or not 0 <= self.resample <= 5:
            raise InvalidInputError(f"The sizes of images must be at least 1 and the filter from 0 to 5, got {self}.")
        if not self.size and not (self.shortest_edge and self.crop):
            raise InvalidInputError("Images must come to one size: by size, or by shortest_edge and crop.")
        if 0.0 in self.std or len(self.mean) != len(self.std):
            raise InvalidInputError(f"mean and std belong together, and std is never 0; got {self.mean}, {self.std}.")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what the model sees."""
        height, width = self.crop or self.size
        return height, width

    @functools.cached_property
    def table(self) -> Array:
        """What a channel's values 0 to 255 become: (channels, 256), in the order in which channels go in."""
        values: Array = np.arange(256, dtype=np.uint8)
        if self.factor is not None:
            values = (values.astype(np.float64) * self.factor).astype(np.float32)
        values = values.astype(np.float32) + np.float32(self.offset)
        rows: Array = np.stack([values] * 3)
        if self.std:
            mean, std = (np.array(one, np.float32)[:, None] for one in (self.mean, self.std))
            rows = (rows - mean) / std
            rows = (rows - np.float32(0)) / std if self.again else rows
        return rows


class ImageTask(ItemTask):
    """A task whose items are images and whose graph takes ``pixel_values``; its settings: :class:`ImageConfig`."""

    settings: ClassVar[type] = ImageConfig
    input_kind: ClassVar[Literal["text", "image", "tensors"]] = "image"
    columns: ClassVar[tuple[Column, ...]] = (IMAGE,)

    @property
    def packages(self) -> tuple[str, ...]:
        """What reads images."""
        return ("pillow",)

    @property
    def max_batch(self) -> int:
        """Most images that one run of the graph can take, its fixed number of rows included."""
        return self._rows("max")

    def _rows(self, at: At) -> int:
        size = self.signature.inputs[0].shape[0]
        return size if isinstance(size, int) else self.signature.dim(size).at(at)

    def prepare(self) -> None:
        """Import Pillow."""
        pillow()

    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> ImageEncoded:
        """Decode the images and bring them to the model's size.

        Raises:
            InvalidInputError: One is damaged, or as narrow that its other side would be too long; names its position.
        """
        return ImageEncoded(self, _at_once(self._ready, items))

    def _ready(self, index: int, item: Image) -> Array:
        """Return an image's pixels as the model sees them, in uint8: (height, width, 3)."""
        try:
            image = pixels(item)
            settings: ImageConfig = self.config
            if size := _target(settings, *image.size):
                check_size(*size)
                image = image.resize((size[1], size[0]), resample=settings.resample)
        except InvalidInputError as error:
            raise InvalidInputError(f"Image {index} {error}") from error
        return _cropped(np.asarray(image), settings.crop) if settings.crop else np.asarray(image)

    def collate(self, images: Sequence[Array]) -> Arrays:
        """Return the graph's input for images (height, width, 3); filler repeats the first one."""
        rows = [*images, *[images[0]] * (self._rows("min") - len(images))]
        table, order = self.config.table, (2, 1, 0) if self.config.bgr else (0, 1, 2)
        found: Array = np.empty((len(rows), 3, *self.config.shape), np.float32)
        for row, image in enumerate(rows):
            for channel in range(3):
                # "clip" lets numpy write in place; no value is beyond the table
                np.take(table[channel], image[:, :, order[channel]], out=found[row, channel], mode="clip")
        return {INPUT: found}

    def example_feeds(
        self,
        at: At,
        *,
        ragged: bool,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        items: Sequence[Any] | None = None,
    ) -> Arrays:
        """Return as many of the images in ``items``, from a random one on, or made-up ones; all are of one size."""
        del ragged
        random = np.random.default_rng(seed)
        count = (sizes or {}).get("batch") or self._rows(at)
        if items:
            first = int(random.integers(len(items)))
            wanted = [items[(first + index) % len(items)] for index in range(min(count, len(items)))]
        else:
            wanted = [made_up_image(seed + index, *self.config.shape) for index in range(min(count, 8))]
        ready = self.encode(wanted).images
        return self.collate([ready[index % len(ready)] for index in range(count)])


class ImageEncoded(Encoded):
    """Images of the model's size.

    Attributes:
        images: (height, width, 3) of uint8 each.
    """

    def __init__(self, task: ImageTask, images: Sequence[Array]) -> None:
        self._task = task
        self.images = images
        height, width = task.config.shape
        self.lengths = [max(1, height * width // _PATCH**2)] * len(images)

    def collate(self, indices: Sequence[int]) -> Arrays:
        """Return the graph's input for these images."""
        return self._task.collate([self.images[index] for index in indices])


def _target(settings: ImageConfig, width: int, height: int) -> tuple[int, int] | None:
    """Return the height and width that an image is brought to before anything is cut off."""
    if settings.size:
        return settings.size[0], settings.size[1]
    if not settings.shortest_edge:
        return None
    short, long = min(width, height), max(width, height)
    other = int(settings.shortest_edge * long / short)
    return (other, settings.shortest_edge) if width <= height else (settings.shortest_edge, other)


def _cropped(image: Array, crop: Sequence[int]) -> Array:
    """Return the middle of an image, with black around it where it is smaller."""
    height, width = crop
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        return image[top : top + height, left : left + width]
    found: Array = np.zeros((height, width, 3), np.uint8)
    inner = image[max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
    down, right = max(0, -top), max(0, -left)
    found[down : down + inner.shape[0], right : right + inner.shape[1]] = inner
    return found


def _at_once(ready: Callable[[int, Any], Array], items: Sequence[Any]) -> list[Array]:
    """Return what is made of each item, in threads where there are several: Pillow lets go of Python meanwhile."""
    workers = min(len(items), usable_cores(), _MOST_THREADS)
    if len(items) < _FEW or workers == 1:
        return [ready(index, item) for index, item in enumerate(items)]
    lock = threading.Lock()

    def one(index: int, item: Any) -> Array:
        with lock if pixel_count(item) > _LARGE else contextlib.nullcontext():
            return ready(index, item)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, range(len(items)), items))
