"""What a task needs of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mlflow_tdeploy.core.errors import InvalidInputError


@dataclass(frozen=True)
class Head:
    """One output of a Hugging Face model, and which models have it.

    Attributes:
        output: Its key in what the model returns, and its name in the graph.
        axes: Its axes before the last one.
        architecture: How the names of transformers' classes with this head end; empty for models without a head.
        auto_class: transformers' class that loads such a model; empty where transformers has none.
        told: Whether a graph with such an output is taken for one of the task, where nobody says which it is of.
    """

    output: str
    axes: tuple[str, ...] = ("batch",)
    architecture: str = ""
    auto_class: str = ""
    told: bool = True


def refuse_arguments(unknown: Collection[str]) -> None:
    """Refuse what a pipeline gives its tokenizer and a logged model would not.

    Args:
        unknown: Names of such arguments.

    Raises:
        InvalidInputError: There are some.
    """
    if unknown:
        raise InvalidInputError(
            f"The pipeline was made with the tokenizer argument '{min(unknown)}', which the logged model would not "
            f"keep. Make the pipeline without it."
        )
