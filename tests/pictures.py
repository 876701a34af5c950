"""Real photographs, from packages that MLflow needs, cut to many pictures of many sizes, modes and formats."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

#: What pictures are saved as: format, Pillow's mode, and what else.
FORMS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("JPEG", "RGB", {"quality": 85}),
    ("PNG", "RGB", {}),
    ("JPEG", "L", {}),
    ("PNG", "RGBA", {}),
    ("WEBP", "RGB", {"quality": 80}),
    ("GIF", "P", {}),
    ("JPEG", "CMYK", {}),
    ("PNG", "LA", {}),
    ("BMP", "RGB", {}),
    ("PNG", "1", {}),
    ("TIFF", "RGB", {}),
)
#: Pillow's tag of how a camera was held.
_ORIENTATION = 0x0112


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """A temple, a flower, and a portrait of Grace Hopper."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(portrait) as image:
        return (*(Image.fromarray(one) for one in load_sample_images().images), image.convert("RGB"))


def picture(seed: int, form: tuple[str, str, dict[str, Any]] = FORMS[1]) -> bytes:
    """A part of a photograph, at least 8 pixels wide and high, as a file's bytes."""
    random = np.random.default_rng(seed)
    whole = photographs()[seed % 3]
    width, height = (int(random.integers(8, most + 1)) for most in whole.size)
    left, top = int(random.integers(0, whole.width - width + 1)), int(random.integers(0, whole.height - height + 1))
    part = whole.crop((left, top, left + width, top + height))
    name, mode, more = form
    if mode in ("RGBA", "LA"):
        part = part.convert(mode)
        part.putalpha(part.convert("L"))
    else:
        part = part.convert(mode)
    buffer = io.BytesIO()
    part.save(buffer, name, **more)
    return buffer.getvalue()


def pictures(count: int) -> list[bytes]:
    """Files of every form in turn."""
    return [picture(seed, FORMS[seed % len(FORMS)]) for seed in range(count)]


def odd() -> list[bytes]:
    """Files that are seldom: a lone pixel, a line, a camera on its side, several pictures in one."""
    found = []
    for size in ((1, 1), (3, 200), (200, 3)):
        buffer = io.BytesIO()
        photographs()[0].resize(size).save(buffer, "PNG")
        found.append(buffer.getvalue())
    for turn in (3, 6, 8):
        exif = Image.Exif()
        exif[_ORIENTATION] = turn
        buffer = io.BytesIO()
        photographs()[2].crop((0, 0, 200, 120)).save(buffer, "JPEG", exif=exif)
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    frames = [one.resize((40, 30)).convert("P") for one in photographs()]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return [*found, buffer.getvalue()]


def opened(file: bytes) -> Image.Image:
    """The picture in a file, as a user has it in hand."""
    return Image.open(io.BytesIO(file))
