from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.images import as_file, made_up_image, pixels, read_image
from tests.pictures import FORMS, opened, picture


def _saved(image: Image.Image, name: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def test_pixels_are_those_of_transformers(form):
    from transformers.image_utils import load_image

    for seed in range(6):
        file = picture(seed, form)
        wanted = np.asarray(load_image(opened(file)))
        for given in (file, opened(file)):
            np.testing.assert_array_equal(np.asarray(pixels(read_image("Image", 0, given))), wanted)


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_more_than_eight_bits_a_channel_are_refused(name):
    deep = Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30))
    for given in (_saved(deep, name), deep):
        with pytest.raises(InvalidInputError, match="Image 4 has more than eight bits a channel"):
            read_image("Image", 4, given)


def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header():
    huge = Image.new("1", (20_000, 20_000))
    for given in (_saved(huge), huge):
        with pytest.raises(InvalidInputError, match="Image 0 is too large"):
            read_image("Image", 0, given)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(InvalidInputError, match="10000 x 9000"):
        read_image("Image", 0, _saved(Image.new("1", (10_000, 9_000))))
    with pytest.raises(InvalidInputError, match="too large"):
        read_image("Image", 0, np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)))


def test_formats_that_run_programs_are_not_opened():
    eps = _saved(Image.new("RGB", (8, 8)), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # Pillow would
    with pytest.raises(InvalidInputError, match="is no image that can be read"):
        read_image("Image", 0, eps)


def test_a_file_of_pixels_loses_nothing():
    image = made_up_image(3, 37, 51)
    np.testing.assert_array_equal(np.asarray(opened(as_file(image))), image)
    assert as_file(b"bytes stay") == b"bytes stay"


def test_made_up_images_are_the_same_everywhere_and_differ_by_seed():
    image = made_up_image(5, 64, 48)
    assert image.shape == (64, 48, 3)
    assert image.dtype == np.uint8
    assert int(image.sum()) == 647639
    assert not np.array_equal(image, made_up_image(6, 64, 48))
    assert image.std() > 20  # neither grey nor noise


def test_no_memory_is_no_damaged_file(monkeypatch):
    from PIL import ImageOps

    def full(image):
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", full)
    with pytest.raises(MemoryError):
        pixels(picture(0))


@pytest.mark.parametrize("head", ["DATA:image/png;base64,", "data:image/png;charset=utf-8;base64,"])
def test_forms_of_data_urls(head):
    file = picture(0)
    assert read_image("Image", 0, head + base64.b64encode(file).decode()) == file
    with pytest.raises(InvalidInputError, match="holds bool"):
        read_image("Image", 0, np.zeros((3, 3), bool))
