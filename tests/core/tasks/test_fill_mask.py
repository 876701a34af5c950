"""Fillings equal those of the Hugging Face pipeline: one mask and several, chosen words, tokenizers of three kinds."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.records import to_plain
from mlflow_tdeploy.core.tasks.fill_mask import FillMask, _highest
from mlflow_tdeploy.source.resolve import resolve
from tests.core.tasks.token_models import MODELS, filler
from tests.served import pipeline_of, texts


@pytest.fixture(scope="module", params=MODELS)
def both(request, minilm_path, tmp_path_factory):
    """The pipeline of transformers, and ours, of one model."""
    from transformers import pipeline

    folder = filler(request.param, minilm_path, tmp_path_factory.mktemp("filler"))
    original = pipeline("fill-mask", model=str(folder), device="cpu")
    return original, pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def bert(minilm_path, tmp_path_factory):
    folder = filler("bert", minilm_path, tmp_path_factory.mktemp("filler"))
    return pipeline_of(resolve(folder), tmp_path_factory.mktemp("assets"))


def same(got, wanted):
    assert len(got) == len(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(mine, list):
            same(mine, theirs)
            continue
        assert mine == {**theirs, "score": pytest.approx(theirs["score"], rel=1e-3, abs=1e-6)}


def masked(ours, count):
    plain = [one for one in texts(count) if "over-long" not in one and "[MASK]" not in one]
    return list(ours.task.sample(plain))


def test_predict_equals_the_pipeline(both):
    original, ours = both
    wanted = masked(ours, 200)
    assert len(wanted) >= 200
    assert all(one.count(ours.task.mask) == 1 for one in wanted)
    same(ours(wanted), [original(text) for text in wanted])
    same(ours(wanted[:20], {"top_k": 1}), [original(text, top_k=1) for text in wanted[:20]])


def test_several_masks_are_filled_each(both):
    original, ours = both
    mask = ours.task.mask
    wanted = [f"the {mask} of a {mask} is not it", f"{mask} {mask} {mask}", f"one {mask}"]
    got = ours(wanted, {"top_k": 3})
    same(got, [original(text, top_k=3) for text in wanted])
    assert [isinstance(one[0], list) for one in got] == [True, True, False]


def test_words_to_choose_among_can_be_said(both):
    original, ours = both
    wanted = masked(ours, 10)
    words = [original.tokenizer.convert_ids_to_tokens(number) for number in (1000, 1001, 1200)]
    same(ours(wanted, {"targets": words}), [original(text, targets=words) for text in wanted])
    assert {one["token"] for fillings in ours(wanted, {"targets": words}) for one in fillings} == {1000, 1001, 1200}


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_that_nobody_gave_have_a_mask_that_is_not_cut_off(bert, side):
    task = FillMask({**to_plain(bert.task.config), "truncation_side": side}, bert.task.signature, bert.task.assets)
    given = ["", "   ", "word", "over-long " * 700, "antidisestablishmentarianism" * 90, *texts(50)]
    for text, made in zip(given, task.sample(given), strict=True):
        task.encode([made])
        assert made.count("[MASK]") == max(1, text.count("[MASK]"))


def test_a_text_without_a_mask_is_named(bert):
    with pytest.raises(InvalidInputError, match=r"Text 1 has no \[MASK\] among its first 128 tokens: 'a plain one'"):
        bert(["a [MASK]", "a plain one"])
    with pytest.raises(InvalidInputError, match="Text 0 has no"):
        bert("word " * 300 + "[MASK]")
    with pytest.raises(InvalidInputError, match="top_k must be at least 1"):
        bert("a [MASK]", {"top_k": -2})
    with pytest.raises(InvalidInputError, match="The target '' has no tokens"):
        bert("a [MASK]", {"targets": [""]})


def test_accuracy_is_that_of_the_first_mask(bert):
    task = bert.task
    answers = [[{"token_str": "cat"}, {"token_str": "dog"}], [[{"token_str": "a"}], [{"token_str": "b"}]]]
    assert task.metric(answers, ["cat", "b"]) == {"accuracy": 0.5}


def test_a_tokenizer_without_a_mask_is_refused(minilm_path, tmp_path):
    folder = filler("bert", minilm_path, tmp_path)
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = None
    with pytest.raises(InvalidInputError, match="fills masks, and this .* has no mask token"):
        resolve(AutoModelForMaskedLM.from_pretrained(folder), tokenizer=tokenizer)


def test_words_that_are_ruled_out_come_once():
    for keep in (2, 3):
        places, values = _highest(np.array([-np.inf, 5, -np.inf], np.float32), keep)
        assert places.tolist() == [1, 0, 2][:keep]
        assert values.tolist() == [5, -np.inf, -np.inf][:keep]
    places, _ = _highest(np.arange(100, dtype=np.float32), 5)
    assert places.tolist() == [99, 98, 97, 96, 95]
