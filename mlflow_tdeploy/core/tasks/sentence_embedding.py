"""One vector per text: pooling and normalization are part of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mlflow_tdeploy.core.budget import VECTOR_BUDGET, Budget
from mlflow_tdeploy.core.compare import Comparison, Rows
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Head
from mlflow_tdeploy.core.tasks._text import TextTask
from mlflow_tdeploy.core.tensors import Array, Arrays

OUTPUT = "sentence_embedding"


@TASKS.register("sentence-embedding")
class SentenceEmbedding(TextTask):
    """Returns a float array (texts, width), as ``SentenceTransformer.encode`` does."""

    name: ClassVar[str] = "sentence-embedding"
    head: ClassVar[Head | None] = Head(OUTPUT)  # of a SentenceTransformer
    default_budget: ClassVar[Budget] = VECTOR_BUDGET

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return one vector per text."""
        return list(outputs[OUTPUT][:count])

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> Array:
        """Return the vectors as one array (texts, width)."""
        array: Array = np.array(answers)  # faster than np.stack for a lone text
        return array

    def answer_form(self) -> AnswerForm:
        """Return an array of the embedding's width."""
        spec = next(spec for spec in self.signature.outputs if spec.name == OUTPUT)
        width = spec.shape[-1]
        return AnswerForm("array", width=width if isinstance(width, int) else -1, name=OUTPUT, dtype=spec.dtype)

    def comparison(self) -> Comparison:
        """Compare vector by vector."""
        return _VectorComparison()


class _VectorComparison(Comparison):
    def __init__(self) -> None:
        self._rows = Rows()

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        self._rows.add(reference[OUTPUT], got[OUTPUT])

    def metrics(self) -> dict[str, float]:
        return self._rows.metrics()
