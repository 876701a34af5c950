"""The texts are real, mixed in length, and the same at every run."""

import numpy as np
import pytest

from benchmarks import data


def test_short_text_has_eight_words():
    assert len(data.SHORT_TEXT.split()) == 8


def test_mixed_texts_are_the_same_when_the_seed_is():
    assert data.digest(data.mixed_texts(40)) == data.digest(data.mixed_texts(40))
    assert data.digest(data.mixed_texts(40)) != data.digest(data.mixed_texts(40, seed=1))


def test_mixed_texts_have_lognormal_lengths():
    lengths = np.array([len(text.split()) for text in data.mixed_texts(256)])
    assert len(lengths) == 256
    assert np.median(lengths) == pytest.approx(data.MEDIAN_WORDS, rel=0.2)
    assert np.log(lengths).std() == pytest.approx(data.SIGMA, rel=0.2)
    assert lengths.max() > 5 * np.median(lengths)


def test_mixed_texts_are_distinct_words_of_definitions():
    texts = data.mixed_texts(64)
    assert len(set(texts)) == 64
    words = {word for gloss in data.glosses() for word in gloss.split()}
    assert all(word in words for text in texts for word in text.split())
