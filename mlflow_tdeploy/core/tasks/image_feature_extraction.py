"""Hidden states of images, as the Hugging Face pipeline ``image-feature-extraction`` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mlflow_tdeploy.core.budget import VECTOR_BUDGET, Budget
from mlflow_tdeploy.core.compare import Comparison, Rows
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Head, Param
from mlflow_tdeploy.core.tasks._image import ImageTask
from mlflow_tdeploy.core.tensors import Array, Arrays

OUTPUT, POOLED = "last_hidden_state", "pooler_output"


@TASKS.register("image-feature-extraction")
class ImageFeatureExtraction(ImageTask):
    """Returns one array per image: (1, tokens, width) of a transformer, (1, channels, height, width) of a ConvNet.

    What comes first in the model's answer, as for the pipeline: of CLIP with its projection that is the embedding
    (1, width). With ``pool`` it is what the model's pooler makes of the states.
    """

    name: ClassVar[str] = "image-feature-extraction"
    head: ClassVar[Head | None] = Head(OUTPUT, optional=(POOLED,), auto_class="AutoModel", told=False)
    default_budget: ClassVar[Budget] = VECTOR_BUDGET
    params: ClassVar[tuple[Param, ...]] = (
        Param("pool", "boolean", False, "Whether to return the pooled output, one vector per image."),
    )

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Check ``pool``."""
        checked = super().check_params(params)
        if checked["pool"] and POOLED not in [spec.name for spec in self.signature.outputs]:
            raise InvalidInputError("pool=True asks for the pooled output, and this model has no pooler. Leave it out.")
        return checked

    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return each image's hidden states, or what was pooled of them."""
        states = outputs[POOLED if params["pool"] else self.signature.outputs[0].name]
        return [states[index : index + 1] for index in range(count)]

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[Array]:
        """Return the list of arrays."""
        return answers

    def answer_form(self) -> AnswerForm:
        """Return nested lists of floats."""
        return AnswerForm("nested")

    def comparison(self) -> Comparison:
        """Compare token by token, or place by place, and what is pooled of them."""
        return _StateComparison()


class _StateComparison(Comparison):
    def __init__(self) -> None:
        self._rows = Rows()

    def add(self, reference: Arrays, got: Arrays, inputs: Arrays) -> None:
        for name, wanted in reference.items():
            self._rows.add(_vectors(wanted), _vectors(got[name]))

    def metrics(self) -> dict[str, float]:
        return self._rows.metrics()


def _vectors(states: Array) -> Array:
    """Return hidden states as vectors: of tokens, or of the places of a map whose channels come first."""
    if states.ndim == 4:
        states = states.transpose(0, 2, 3, 1)
    return states.reshape(-1, states.shape[-1])
