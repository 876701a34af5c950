"""The texts that the benchmarks run on: real words, the same on every machine."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

#: A lone short request: eight words.
SHORT_TEXT = "How can I reset my account password today?"

#: Words per text are log-normal, as lengths of texts are: half of them are shorter than the median.
MEDIAN_WORDS = 28
SIGMA = 0.8
_LIMITS = (3, 256)

_TRAIN = Path(__file__).parents[1] / "examples" / "wordnet" / "data" / "train.tsv"


@functools.cache
def glosses() -> tuple[str, ...]:
    """Return WordNet definitions: the package's check texts and the classification example's training texts."""
    checks = resources.files("mlflow_tdeploy.build").joinpath("data/glosses.txt").read_text(encoding="utf-8")
    rows = _TRAIN.read_text(encoding="utf-8").splitlines()[1:]
    return (*filter(None, checks.splitlines()), *(row.split("\t", 1)[1] for row in rows))


def mixed_texts(count: int = 256, *, seed: int = 0) -> list[str]:
    """Return texts of log-normal lengths, made of definitions joined and cut to length.

    Args:
        count: How many.
        seed: The same seed gives the same texts.
    """
    rng = np.random.default_rng(seed)
    pool = glosses()
    sizes = np.clip(np.round(rng.lognormal(np.log(MEDIAN_WORDS), SIGMA, count)), *_LIMITS).astype(int)
    return [_text(pool, int(size), rng) for size in sizes]


def digest(texts: Sequence[str]) -> str:
    """Return a digest of texts, so that a result says which ones it was measured on."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _text(pool: Sequence[str], words: int, rng: np.random.Generator) -> str:
    got: list[str] = []
    while len(got) < words:
        got += pool[int(rng.integers(len(pool)))].split()
    return " ".join(got[:words])


def photographs(count: int) -> list[bytes]:
    """Return parts of 500 x 375 pixels of scikit-learn's two photographs, as JPEG files."""
    import io

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random, found = np.random.default_rng(0), []
    wholes = load_sample_images().images
    for index in range(count):
        whole = wholes[index % len(wholes)]
        top, left = (
            int(random.integers(0, have - size)) for have, size in zip(whole.shape[:2], (375, 500), strict=True)
        )
        buffer = io.BytesIO()
        Image.fromarray(whole[top : top + 375, left : left + 500]).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found
