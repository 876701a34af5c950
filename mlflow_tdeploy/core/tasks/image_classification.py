"""Labels and scores of images, as the Hugging Face pipeline ``image-classification`` returns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mlflow_tdeploy.core.tasks import TASKS, AnswerForm, Field, Head, Param
from mlflow_tdeploy.core.tasks._classes import FUNCTION, OUTPUT, Classifier
from mlflow_tdeploy.core.tasks._image import ImageConfig, ImageTask


@dataclass(frozen=True)
class ImageClassificationConfig(ImageConfig):
    """Settings of a classifier of images.

    Attributes:
        labels: Name of each class, by index.
        function_to_apply: From logits to scores, chosen from the model's config as the pipeline does.
    """

    labels: tuple[str, ...] = ()
    function_to_apply: Literal["softmax", "sigmoid", "none"] = "softmax"


@TASKS.register("image-classification")
class ImageClassification(Classifier, ImageTask):
    """Returns a list of ``{"label", "score"}`` per image, best first."""

    name: ClassVar[str] = "image-classification"
    settings: ClassVar[type] = ImageClassificationConfig
    head: ClassVar[Head | None] = Head(
        OUTPUT, architecture="ForImageClassification", auto_class="AutoModelForImageClassification", told=False
    )
    params: ClassVar[tuple[Param, ...]] = (
        Param("top_k", "integer", 5, "How many labels per image, best first; 0 for all."),
        FUNCTION,
    )

    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> list[Any]:
        """Return one list of records per image."""
        return answers

    def answer_form(self) -> AnswerForm:
        """Return a list of labels and scores per image."""
        return AnswerForm("lists", fields=(Field("label", "string"), Field("score", "double")))
