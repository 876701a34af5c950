"""Answers that are many: in memory at first, on disk then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.core.tensors import Arrays, numpy_dtype

#: Outputs beyond this many bytes are kept on disk.
MEMORY = 256 << 20


class StoredAnswers(Sequence[Arrays]):
    """Outputs by position.

    Args:
        folder: Where what is many is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._items: list[Arrays | Path] = []
        self._bytes = 0

    def append(self, arrays: Arrays) -> None:
        """Take in the outputs of one request."""
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes <= MEMORY:
            self._items.append(dict(arrays))
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"reference-{len(self._items)}.npz"
        names = {f"a{index}": array for index, array in enumerate(arrays.values())}
        dtypes = np.array([array.dtype.name for array in arrays.values()])
        np.savez(path, names=np.array(list(arrays)), dtypes=dtypes, **names)  # type: ignore[arg-type]
        self._items.append(path)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        if not isinstance(item, Path):
            return item
        with np.load(item, allow_pickle=False) as stored:
            found = zip(stored["names"].tolist(), stored["dtypes"].tolist(), strict=True)
            # a type that numpy itself lacks, such as bfloat16, is stored as raw bytes
            return {name: stored[f"a{place}"].view(numpy_dtype(dtype)) for place, (name, dtype) in enumerate(found)}
