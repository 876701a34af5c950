"""Histograms of activations, kept on this host: the same graph on the same data is not run again for them.

Another budget, another recipe's turn or a search that was interrupted begins with the same ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from mlflow_tdeploy.build.ranges import BINS, Histogram, histograms
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.store.disk import own_folder, write_once
from mlflow_tdeploy.store.external_data import external_files

#: So many are kept, those that were used last; one takes a megabyte at most for a model of hundreds of products.
_MOST = 32


def known_histograms(path: Path, names: Sequence[str], batches: Sequence[Arrays]) -> dict[str, Histogram]:
    """Return what tensors of a graph hold on some batches, see :func:`histograms`; as an earlier run has found it.

    Raises:
        BuildError: The graph fails on them, or a tensor is not finite.
    """
    kept = own_folder("ranges") / f"{_key(path, names, batches)}.npz"
    with contextlib.suppress(Exception):  # not there, or damaged: numpy and zlib raise nearly anything
        found = _read(kept)
        kept.touch()
        return found
    found = histograms(path, names, batches)
    with contextlib.suppress(Exception):  # a full disk, another process that was faster: it is only remembered
        kept.unlink(missing_ok=True)
        write_once(kept, _bytes(found))
        _forget_oldest(kept.parent)
    return found


def _key(path: Path, names: Sequence[str], batches: Sequence[Arrays]) -> str:
    digest = hashlib.sha256(f"{BINS} {version('mlflow-tdeploy')} {np.__version__} {list(names)}".encode())
    with contextlib.suppress(PackageNotFoundError):  # onnxruntime-gpu is another distribution
        digest.update(version("onnxruntime").encode())
    for file in (path, *(path.parent / name for name in sorted(external_files(path)))):
        digest.update(file.read_bytes())
    for feeds in batches:
        for name, array in sorted(feeds.items()):
            digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _bytes(found: Mapping[str, Histogram]) -> bytes:
    file = io.BytesIO()
    counts = np.array([one.counts for one in found.values()]).reshape(-1, BINS)
    ends = np.array([(one.span, one.most) for one in found.values()], np.float64).reshape(-1, 2)
    np.savez_compressed(file, names=np.array(list(found), dtype=str), ends=ends, counts=counts)
    return file.getvalue()


def _read(path: Path) -> dict[str, Histogram]:
    with np.load(path, allow_pickle=False) as arrays:
        rows = zip(arrays["names"], arrays["counts"], arrays["ends"], strict=True)
        return {str(name): Histogram(counts, float(span), float(most)) for name, counts, (span, most) in rows}


def _forget_oldest(folder: Path) -> None:
    by_use = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_use[_MOST:]:
        path.unlink(missing_ok=True)
