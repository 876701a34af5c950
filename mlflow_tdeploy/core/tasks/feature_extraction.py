"""Hidden states of every token, as the Hugging Face pipeline ``feature-extraction`` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mlflow_tdeploy.core.budget import VECTOR_BUDGET, Budget
from mlflow_tdeploy.core.compare import Comparison, Rows
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Head
from mlflow_tdeploy.core.tasks._text import TextTask, own_tokens
from mlflow_tdeploy.core.tensors import Array, Arrays

OUTPUT = "last_hidden_state"


@TASKS.register("feature-extraction")
class FeatureExtraction(TextTask):
    """Returns one array (1, tokens, width) per text, padding removed."""

    name: ClassVar[str] = "feature-extraction"
    head: ClassVar[Head | None] = Head(OUTPUT, axes=("batch", "sequence"), auto_class="AutoModel")
    default_budget: ClassVar[Budget] = VECTOR_BUDGET

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return the hidden states of each text's own tokens."""
        hidden = outputs[OUTPUT]
        mask = own_tokens(feeds)
        if mask is None:
            return [hidden[index : index + 1] for index in range(count)]
        return [hidden[index : index + 1, mask[index]] for index in range(count)]

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[Array]:
        """Return the list of arrays; lengths differ, so it stays a list."""
        return answers

    def answer_form(self) -> AnswerForm:
        """Return nested lists of floats."""
        return AnswerForm("nested")

    def comparison(self) -> Comparison:
        """Compare token by token, padding left out."""
        return _TokenComparison()


class _TokenComparison(Comparison):
    def __init__(self) -> None:
        self._rows = Rows()

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        mask = own_tokens(inputs)
        width = reference[OUTPUT].shape[-1]
        if mask is None:
            self._rows.add(reference[OUTPUT].reshape(-1, width), got[OUTPUT].reshape(-1, width))
        else:
            self._rows.add(reference[OUTPUT][mask], got[OUTPUT][mask])

    def metrics(self) -> dict[str, float]:
        return self._rows.metrics()
