from __future__ import annotations

import base64
import time

import numpy as np
import pandas as pd
import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.image_models import LABELS, MODELS, model_of, processor_of, written
from tests.pictures import odd, opened, pictures
from tests.served import close_to, pipeline_of


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """The pipeline of transformers, and ours, of a model in a folder."""
    from transformers import pipeline

    folder = written(request.param, tmp_path_factory.mktemp("images"))
    original = pipeline("image-classification", model=str(folder), device="cpu")
    return original, pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    source = resolve(model_of("vit"), image_processor=processor_of("vit"))
    return pipeline_of(source, tmp_path_factory.mktemp("assets"))


def test_predict_equals_the_pipeline_for_real_and_odd_pictures(both):
    original, ours = both
    files = [*pictures(200), *odd()]
    wanted = original([opened(file) for file in files], top_k=99)
    assert ours(files, {"top_k": 0}) == close_to(wanted)
    assert len({answer[0]["label"] for answer in wanted}) > 1  # else any answer would do


def test_predict_gives_five_labels_unless_told_otherwise(both):
    original, ours = both
    files = pictures(3)
    images = [opened(file) for file in files]
    assert ours(files) == close_to(original(images))
    assert ours(files, {"top_k": 2}) == close_to(original(images, top_k=2))
    assert ours(files, {"top_k": 99}) == close_to(original(images, top_k=99))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_predict_equals_the_pipeline_when_a_function_is_asked_for(both, function):
    original, ours = both
    files = pictures(4)
    wanted = original([opened(file) for file in files], function_to_apply=function)
    assert ours(files, {"function_to_apply": function}) == close_to(wanted)


@pytest.mark.parametrize(
    ("more", "function"),
    [
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "none"),
        ({"problem_type": "single_label_classification"}, "softmax"),
    ],
)
def test_the_function_is_the_one_that_the_pipeline_chooses(more, function, tmp_path):
    from transformers import pipeline

    model = model_of("vit", **more)
    original = pipeline("image-classification", model=model, image_processor=processor_of("vit"), device="cpu")
    ours = pipeline_of(resolve(original), tmp_path)
    files = pictures(3)
    assert ours.task.config.function_to_apply == function
    assert ours(files) == close_to(original([opened(file) for file in files]))


def test_a_picture_is_the_same_in_whatever_form_it_comes(vit, tmp_path):
    files = pictures(4)[1::2]
    wanted = vit(files)
    images = [opened(file) for file in files]
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    coded = [base64.b64encode(file).decode() for file in files]
    paths = [tmp_path / f"{index}" for index in range(2)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    forms = [
        *(images, arrays, coded, paths),
        np.array(coded),
        [f"data:image/png;base64,{one}" for one in coded],
        [one.encode() for one in coded],
        [bytearray(one) for one in files],
        [{"image": one} for one in files],
        [{"bytes": one, "path": None} for one in files],
        [{"image": {"bytes": one, "path": None}} for one in files],
        [{"bytes": one, "path": "a.png"} for one in coded],
        {"image": files},
        {"images": images},
        pd.DataFrame({"image": files}),
        pd.DataFrame({"anything": coded}),
        pd.DataFrame({"image": images, "id": [1, 2]}),
        pd.Series(files),
        [arrays[0].tolist(), arrays[1].tolist()],
    ]
    for form in forms:
        assert vit(form) == wanted, type(form)
    for one in (files[0], images[0], arrays[0], {"image": coded[0]}, coded[0], paths[0]):
        assert vit(one) == close_to(wanted[:1]), type(one)


def test_a_batch_of_pixels_is_as_many_pictures(vit):
    grey = np.arange(5 * 40 * 30, dtype=np.int64).reshape(5, 40, 30, 1) % 256
    batch = np.repeat(grey, 3, axis=3).astype(np.uint8)
    wanted = vit(list(batch))
    assert len(wanted) == 5
    assert vit(batch) == wanted
    assert vit({"image": batch}) == wanted
    assert vit(grey) == wanted  # one channel is three alike
    assert vit([one[:, :, 0] for one in grey]) == wanted


def test_answers_are_scored_by_labels_of_either_kind(vit):
    files = pictures(6)
    answers = vit(files, vit.task.scored)
    right = [answer[0]["label"] for answer in answers]
    found = vit.task.metric(answers, right)
    assert found["accuracy"] == found["f1"] == 1.0
    assert found["loss"] == pytest.approx(-np.mean([np.log(answer[0]["score"]) for answer in answers]))
    assert vit.task.metric(answers, [LABELS.index(one) for one in right]) == found
    with pytest.raises(InvalidInputError, match="label 0"):
        vit.task.check_labels(["cat"])


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (None, "Image 1 is missing"),
        (float("nan"), "Image 1 is missing"),
        (
            "cat.jpg",
            "Image 1 is no image but the string 'cat.jpg', which is no base64. Paths and addresses are not opened",
        ),
        ("http://127.0.0.1/cat.jpg", "Paths and addresses are not opened"),
        (b"%!PS-Adobe-3.0", "Image 1 is no image that can be read"),
        (b"", "Image 1 is no image that can be read"),
        (3, "Image 1 cannot be of type int"),
        (np.zeros((3, 40, 30), np.uint8), r"Image 1 has the shape \(3, 40, 30\).*Channels come last"),
        (np.zeros((40, 30, 3)), "Image 1 holds float64"),
        (np.full((40, 30, 3), 256), "Image 1 holds int64 beyond 0 to 255"),
        (np.zeros((0, 30, 3), np.uint8), "Image 1 has no pixels"),
        ([[1, 2], [3]], "Image 1 has rows of different lengths"),
        (
            {"bytes": None, "path": "cat.jpg"},
            "Image 1 is a record with bytes and path, .*paths in records are not opened",
        ),
        (b"junk", "Image 1 is no image that can be read .4 bytes"),
    ],
)
def test_what_is_no_picture_is_told_with_its_place(vit, bad, why):
    good = pictures(2)
    with pytest.raises(InvalidInputError, match=why):
        vit([good[0], bad, good[1]])
    got = vit([good[0], bad, good[1]], {"errors": "null"})
    assert got == close_to([vit(good[0])[0], None, vit(good[1])[0]])


def test_a_damaged_file_is_told_with_its_place_and_the_others_answer(vit):
    good = pictures(3)
    cut = good[0][: len(good[0]) // 2]
    with pytest.raises(InvalidInputError, match="Image 2 cannot be decoded: .*damaged or incomplete"):
        vit([good[1], good[2], cut])
    assert vit([cut, good[2]], {"errors": "null"}) == close_to([None, vit(good[2])[0]])


def test_a_request_without_pictures_says_so(vit):
    for empty in ([], {"image": []}, pd.DataFrame({"image": []})):
        with pytest.raises(InvalidInputError, match="at least one image"):
            vit(empty)
    with pytest.raises(InvalidInputError, match="which column holds the images"):
        vit([{"a": b"", "b": b""}])


def test_nested_lists_are_one_picture_or_as_many_as_they_hold(vit):
    array = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    wanted = vit([array])
    assert vit(array.tolist()) == vit({"image": array.tolist()}) == vit([{"image": array.tolist()}]) == wanted
    assert vit([array.tolist()] * 3) == close_to(wanted * 3)
    assert vit([array.tolist(), array[:10].tolist()]) == close_to([wanted[0], vit([array[:10]])[0]])
    assert vit(array[:, :, 0].tolist()) == close_to(vit([array[:, :, 0]]))


def test_large_pictures_are_made_ready_one_after_the_other(vit, monkeypatch):
    from mlflow_tdeploy.core.tasks import _image

    busy, most, pixels = [], [], _image.pixels

    def slow(item):
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.02)
        busy.pop()
        return pixels(item)

    files = pictures(8)
    monkeypatch.setattr(_image, "pixels", slow)
    monkeypatch.setattr(_image, "_LARGE", 0)
    vit.task.encode(files)
    assert max(most) == 1


def test_asking_for_gaps_makes_a_good_request_ready_once(vit, monkeypatch):
    from mlflow_tdeploy.core.tasks import _image

    made, pixels = [], _image.pixels
    monkeypatch.setattr(_image, "pixels", lambda item: made.append(1) or pixels(item))
    vit(pictures(4), {"errors": "null"})
    assert len(made) == 4
