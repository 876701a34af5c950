"""Images in whatever form a request holds them: which ones are taken, and their pixels.

An image is kept as it came where it is a file's bytes, which are small and exact, else as its pixels. Pillow is
imported where an image is read: tasks of texts do without.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import importlib
import io
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlflow_tdeploy.core.errors import (
    BrokenDependencyError,
    InvalidInputError,
    MissingDependencyError,
    first_line,
    shown,
)
from mlflow_tdeploy.core.tensors import Array

#: An image: a file's bytes, or RGB pixels (height, width, 3) of uint8.
Image = bytes | Array
#: Most pixels of an image: Pillow's own limit, above which it warns of a decompression bomb.
MOST_PIXELS = 89_478_485
#: Formats that are opened. Others run programs (EPS: Ghostscript) or are no pictures.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
#: Modes of more than eight bits a channel: Pillow would cut off what is above 255, and the picture be white.
_DEEP = re.compile(r"I|I;16.*|F")
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*", re.ASCII)
_WHAT = "Reading images"
_HINT = "Pass a file's bytes (as they are, or in base64), a PIL image, or an array of uint8."


def pillow() -> Any:
    """Import Pillow's ``Image`` module.

    Raises:
        MissingDependencyError: It is not installed.
        BrokenDependencyError: It is one for another Python, or lacks a library.
    """
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise BrokenDependencyError(_WHAT, error) from error
        raise MissingDependencyError("Pillow", _WHAT, "pip install 'mlflow-tdeploy[vision]'") from None
    except ImportError as error:
        raise BrokenDependencyError(_WHAT, error) from error


def is_image(value: Any) -> bool:
    """Tell whether a value is meant as one image, and not as several: nothing of it is read."""
    if isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike)) or _is_pil(value):
        return True
    if isinstance(value, Mapping):  # of Hugging Face's datasets
        return "bytes" in value and set(value) <= {"bytes", "path"}
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.ndim in (2, 3)


def pixels_in(values: Any) -> Array | None:
    """Return nested lists as an array of one image, or of several of one size; None where they are something else."""
    if not values or not all(isinstance(one, (list, tuple)) for one in values):
        return None
    try:
        found = np.asarray(values)
    except ValueError:  # of several sizes
        return None
    return found if found.dtype.kind in "biuf" and found.ndim in (2, 3, 4) else None


def read_image(title: str, index: int, value: Any) -> Image:
    """Return an image of a request: a file's bytes, of which nothing but the header was read, or pixels.

    Args:
        title: What it is called, for messages.
        index: Its place in the request, for messages.
        value: Bytes, base64 of such (a string or ASCII bytes, a ``data:`` URL too), a path object, a PIL image, an
            array (height, width) or (height, width, 1, 3 or 4) of whole numbers from 0 to 255, or a mapping with
            ``bytes``.

    Raises:
        InvalidInputError: It cannot be used: no image, too many pixels, more than eight bits a channel.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        return _read(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"{title} {index} {error}") from None


def pixels(image: Image) -> Any:
    """Return an image as PIL image in RGB, as Hugging Face's pipelines load it: turned as its EXIF says.

    Raises:
        InvalidInputError: Its file is damaged.
    """
    library = pillow()
    if isinstance(image, np.ndarray):
        return library.fromarray(image)
    return _loaded(_opened(image))


def pixel_count(image: Image) -> int:
    """Return how many pixels an image has, by its header."""
    if isinstance(image, np.ndarray):
        return int(image.shape[0] * image.shape[1])
    width, height = _opened(image).size
    return int(width * height)


def as_file(image: Image) -> bytes:
    """Return an image as a file's bytes, to be sent or stored: PNG, which loses nothing, of pixels."""
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    pillow().fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def made_up_image(seed: int, height: int, width: int) -> Array:
    """Return a picture of nothing, with edges and shades at every scale as photographs have: (height, width, 3).

    Each scale has half the contrast of the next larger one. Whole numbers only, so that it is the same everywhere.

    Args:
        seed: Another seed is another picture.
        height: Pixels.
        width: Pixels.
    """
    random, total, weights = np.random.default_rng(seed), np.zeros((height, width, 3), np.int64), 0
    for side in (1, 2, 4, 8, 16, 32, 64):
        grid = (-(-height // side), -(-width // side))
        blocks = random.integers(0, 256, (*grid, 1)) + random.integers(-48, 49, (*grid, 3))
        total += side * blocks.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]
        weights += side
    return np.clip((total // weights - 128) * 3 // 2 + 128, 0, 255).astype(np.uint8)


def _read(value: Any) -> Image:
    value = _plain(value)
    if isinstance(value, str):
        return _checked(_decoded(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _of_bytes(bytes(value))
    if _is_pil(value):
        _check(value)
        return np.asarray(_loaded(value))
    if isinstance(value, (list, tuple)):
        return _of_array(_array(value))
    if isinstance(value, np.ndarray):
        return _of_array(value)
    raise InvalidInputError(f"cannot be of type {type(value).__name__} ({shown(value)}). {_HINT}")


def _plain(value: Any) -> Any:
    """Return what a value holds an image in: the bytes of a file or of a dataset's record."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Mapping):
        if not isinstance(value.get("bytes"), (str, bytes, bytearray)):
            raise InvalidInputError(
                f"is a record with {' and '.join(map(str, value))}, and without bytes: paths in records are not "
                f"opened. {_HINT}"
            )
        return value["bytes"]
    return _file(value) if isinstance(value, os.PathLike) else value


def _array(rows: Any) -> Array:
    try:
        return np.asarray(rows)
    except ValueError:
        raise InvalidInputError(f"has rows of different lengths. {_HINT}") from None


def _is_pil(value: Any) -> bool:
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__)


def _file(path: os.PathLike[Any]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidInputError(f"cannot be read: {first_line(error)}.") from error


def _of_bytes(content: bytes) -> bytes:
    """Return a file's bytes; base64 is what a server's client sends that can send nothing but text."""
    try:
        return _checked(content)
    except InvalidInputError:
        head = content[:256].decode("latin-1")
        if _DATA_URL.match(head) or _BASE64.fullmatch(head):
            with contextlib.suppress(InvalidInputError):
                return _checked(_decoded(content.decode("latin-1")))
        raise


def _decoded(text: str) -> bytes:
    found = _DATA_URL.match(text)
    try:
        return base64.b64decode("".join(text[found.end() if found else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInputError(
            f"is no image but the string {shown(text)}, which is no base64. Paths and addresses are not opened. {_HINT}"
        ) from None


def _checked(content: bytes) -> bytes:
    _check(_opened(content))
    return content


def _opened(content: bytes) -> Any:
    """Return an image of which the header was read."""
    library = pillow()
    library.init()
    formats = [name for name in _FORMATS if name in library.OPEN]
    try:
        return library.open(io.BytesIO(content), formats=formats)
    except library.DecompressionBombError as error:
        raise InvalidInputError(f"is too large: {first_line(error)}") from error
    except Exception as error:  # of a damaged header, whatever the format's reader meets
        kinds = ", ".join(formats)
        raise InvalidInputError(
            f"is no image that can be read ({len(content)} bytes: {shown(content[:16])}). Formats: {kinds}. {_HINT}"
        ) from error


def _check(image: Any) -> None:
    width, height = image.size
    check_size(height, width)
    if _DEEP.fullmatch(image.mode):
        raise InvalidInputError(
            f"has more than eight bits a channel (Pillow's mode {image.mode}). Convert it to eight first, by the range "
            f"that its numbers have: what is above 255 would become white."
        )


def check_size(height: int, width: int) -> None:
    """Refuse a size that is none, or that would take more memory than any picture is worth.

    Raises:
        InvalidInputError: It is one.
    """
    if not height or not width:
        raise InvalidInputError(f"has no pixels: it is {width} x {height}.")
    if height * width > MOST_PIXELS:
        raise InvalidInputError(f"is too large: {width} x {height}, and at most {MOST_PIXELS:,} pixels are read.")


def _loaded(image: Any) -> Any:
    """Return an image with its pixels read, in RGB."""
    from PIL import ImageOps

    try:
        turned = ImageOps.exif_transpose(image)
        return turned if turned.mode == "RGB" else turned.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder meets in damaged bytes
        why = f"cannot be decoded: {first_line(error)}. The file is damaged or incomplete."
        raise InvalidInputError(why) from error


def _of_array(array: Array) -> Array:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = " Channels come last: array.transpose(1, 2, 0)." if channels_first else ""
        raise InvalidInputError(
            f"has the shape {array.shape}, and an image has (height, width) or (height, width, channels).{hint}"
        )
    check_size(*array.shape[:2])
    if array.dtype.kind not in "iu" or (array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255)):
        kind = f"{array.dtype} beyond 0 to 255" if array.dtype.kind in "iu" else f"{array.dtype}"
        raise InvalidInputError(f"holds {kind}; its numbers must be whole, from 0 to 255.")
    colours = array.astype(np.uint8, copy=False)[:, :, :3]
    return np.ascontiguousarray(np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours)
