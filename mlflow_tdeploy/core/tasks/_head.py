"""What a task needs of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mlflow_tdeploy.core.errors import InvalidInputError


@dataclass(frozen=True)
class Head:
    """What is read of a Hugging Face model's outputs, and which models have them.

    Attributes:
        output: An output's key in what the model returns, and its name in the graph.
        axes: Its axes, but for a width after them.
        more: Others of the same axes.
        optional: Others that a graph has where the model returns them, of whatever axes after the first.
        wide: Whether they have a width.
        architecture: How the names of transformers' classes with this head end; empty for models without a head.
        auto_class: transformers' class that loads such a model; empty where transformers has none.
        told: Whether a graph with such an output is taken for one of the task, where nobody says which it is of.
    """

    output: str
    axes: tuple[str, ...] = ("batch",)
    more: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    wide: bool = True
    architecture: str = ""
    auto_class: str = ""
    told: bool = True

    def of(self, architecture: str) -> bool:
        """Tell whether a class of transformers has this head, or is a model without one where that is asked for.

        Args:
            architecture: The name of the class; ``WithTeacher`` is a classifier that was distilled, ``Simple`` XLNet's
                usual head for questions.
        """
        if not self.architecture:
            return architecture.endswith(("Model", "Encoder", "ModelWithProjection")) and not architecture.endswith(
                ("LMHeadModel", "DoubleHeadsModel")
            )
        return architecture.endswith(tuple(f"{self.architecture}{more}" for more in ("", "WithTeacher", "Simple")))

    @property
    def outputs(self) -> tuple[str, ...]:
        """All of them."""
        return (self.output, *self.more)

    def fits(self, ranks: Mapping[str, int | None]) -> bool:
        """Tell whether a graph's outputs are these.

        Args:
            ranks: How many axes each has; None where the graph does not say.
        """
        return all(ranks.get(name, -1) in (len(self.axes) + self.wide, None) for name in self.outputs)


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
