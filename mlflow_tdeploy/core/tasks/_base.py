"""The contract of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mlflow_tdeploy.core.budget import Budget, loss_of
from mlflow_tdeploy.core.columns import Column, checked_row
from mlflow_tdeploy.core.compare import Comparison
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.records import from_plain
from mlflow_tdeploy.core.tasks._forms import AnswerForm, Param
from mlflow_tdeploy.core.tasks._head import Head
from mlflow_tdeploy.core.tensors import Arrays, At, Signature


class Encoded(ABC):
    """A request turned into numbers, not yet padded: rows of the graph, one for each item or several.

    Attributes:
        lengths: Cost of each row in tokens, for planning batches.
        spans: Rows of each item, in order; None where each item is one row.
    """

    lengths: Sequence[int]
    spans: Sequence[range] | None = None

    @abstractmethod
    def collate(self, indices: Sequence[int]) -> Arrays:
        """Return the graph's input arrays for these rows, padded together. More rows than these are filler."""

    def whole(self) -> Arrays:
        """Return the graph's input arrays for all rows."""
        return self.collate(range(len(self.lengths)))

    def rows_of(self, item: int) -> range:
        """Return the rows of an item."""
        return range(item, item + 1) if self.spans is None else self.spans[item]

    @property
    def by_item(self) -> Sequence[range]:
        """Rows of each item."""
        return [self.rows_of(item) for item in range(len(self.lengths if self.spans is None else self.spans))]


@dataclass(frozen=True)
class NoSettings:
    """For tasks without settings of their own."""


class Task(ABC):
    """From inputs to tensors and from tensors to answers. Instances are immutable and used by many threads.

    Args:
        config: The manifest's ``task_config``.
        signature: The graph's signature.
        assets: Folder with the tokenizer and other files.

    Raises:
        ManifestError: The config is none of this task's.
    """

    name: ClassVar[str]
    #: What the manifest's ``task_config`` holds: a frozen dataclass.
    settings: ClassVar[type] = NoSettings
    #: ``text`` (strings), ``image`` or ``tensors`` (name → array).
    input_kind: ClassVar[Literal["text", "image", "tensors"]]
    #: What an item consists of, for tasks of items: texts or images.
    columns: ClassVar[tuple[Column, ...]] = ()
    #: What it needs of a Hugging Face model; None for tasks that are not about those.
    head: ClassVar[Head | None] = None
    params: ClassVar[tuple[Param, ...]] = ()
    default_budget: ClassVar[Budget]
    #: Arguments of a transformers pipeline, for what it does before the model, that :meth:`settings_of` keeps.
    pipeline_arguments: ClassVar[tuple[str, ...]] = ()
    #: Names of parameters that change what :meth:`encode` returns.
    encoding: ClassVar[tuple[str, ...]] = ()
    #: What :meth:`metric` returns of answers as they usually are.
    quality: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any], signature: Signature, assets: Path) -> None:
        self.config: Any = from_plain(self.settings, dict(config), f"task_config of '{self.name}'")
        self.signature = signature
        self.assets = assets

    @classmethod
    def settings_of(
        cls, config: Mapping[str, Any], width: int, labels: Sequence[str] | None, pipeline: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the part of ``task_config`` that is the task's own; nothing by default.

        Args:
            config: The config of a Hugging Face model; empty for a graph.
            width: Size of the output's last axis.
            labels: Names of the classes that the user gives.
            pipeline: Settings that a transformers pipeline was made with.

        Raises:
            InvalidInputError: They do not fit the model, or mean nothing for this task.
        """
        del config, width, pipeline
        if labels is not None:
            raise InvalidInputError(f"labels= means nothing for task '{cls.name}'. Leave it out.")
        return {}

    def usual_budget(self) -> Budget:
        """Return the budget of a model whose user states none: the task's default, where its settings say no other."""
        return self.default_budget

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that serving takes besides MLflow, numpy, tokenizers and a runtime; none by default."""
        return ()

    @property
    def usual(self) -> Mapping[str, Any]:
        """Parameters of requests that the model is checked with; none by default."""
        return {}

    @property
    def scored(self) -> Mapping[str, Any]:
        """Parameters of requests whose answers :meth:`metric` takes; :attr:`usual` ones by default."""
        return self.usual

    @property
    def quality_of_scores(self) -> tuple[str, ...]:
        """What :meth:`metric` returns besides of answers with all scores."""
        return ()

    @property
    def max_batch(self) -> int:
        """Most items that one run of the graph can take."""
        return self.signature.dim("batch").max if self.signature.has_dim("batch") else 1

    @property
    def independent_rows(self) -> bool:
        """Whether a row's answer is the same whichever rows are beside it."""
        return True

    @property
    def batch_dim(self) -> str | None:
        """The dimension along which a server may join requests, or None."""
        return self.signature.batch_dim if self.independent_rows else None

    @property
    def pads(self) -> bool:
        """Whether items of different lengths may be in one batch, padded."""
        return True

    def prepare(self) -> None:
        """Read what requests need, so that none of them waits for it and a damaged file shows at opening.

        Raises:
            IntegrityError: A file cannot be read.
        """
        return

    @abstractmethod
    def items(self, inputs: Any) -> list[Any]:
        """Validate what the user passed and return the items of the request.

        Raises:
            InvalidInputError: Empty, of a wrong type, or with a value that cannot be used; names the position.
        """

    def item(self, index: int, row: Any) -> Any:
        """Return one item of a request, of a task of items.

        Args:
            index: Its place, for messages.
            row: See :func:`mlflow_tdeploy.core.columns.raw_rows`.

        Raises:
            InvalidInputError: It cannot be used.
        """
        return checked_row(index, row, self.columns)

    def check_encoding(self, params: Mapping[str, Any]) -> None:
        """Make sure that rows can be made with parameters, whatever the items are; they can by default.

        Raises:
            InvalidInputError: They cannot.
        """
        del params
        return

    def sample(self, texts: Sequence[str], like: Any = None) -> tuple[Any, ...]:
        """Return items made of plain texts, such as the task can answer; the texts themselves by default.

        Args:
            texts: The texts.
            like: An item that they are beside, where there is one.
        """
        del like
        return tuple(texts)

    @abstractmethod
    def encode(self, items: Sequence[Any], params: Mapping[str, Any] | None = None) -> Encoded:
        """Return the items as numbers.

        Args:
            items: See :meth:`items`.
            params: See :meth:`check_params`; only those of :attr:`encoding` count. None for the usual ones.
        """

    @abstractmethod
    def decode(self, outputs: Arrays, feeds: Arrays, count: int, params: Mapping[str, Any]) -> Sequence[Any]:
        """Return what a batch says of each row, whatever rows are beside it; ``count`` are rows, the rest is filler."""

    def join(self, parts: Sequence[Any], encoded: Encoded, item: int, params: Mapping[str, Any]) -> Any:
        """Return an item's answer; by default what its only row says.

        Args:
            parts: What :meth:`decode` says of its rows.
            encoded: It is one of these items.
            item: Which one.
            params: See :meth:`check_params`.
        """
        del encoded, item, params
        return parts[0]

    @abstractmethod
    def finish(self, answers: list[Any], params: Mapping[str, Any]) -> Any:
        """Return the whole request's answer from the items' answers, in the caller's order."""

    def answers(
        self, rows: Sequence[Any], encoded: Encoded, params: Mapping[str, Any], items: range | None = None
    ) -> list[Any]:
        """Return the answers to items, or to some of them, from what :meth:`decode` says of each row of all."""
        wanted = range(len(encoded.by_item)) if items is None else items
        return [self.join([rows[row] for row in encoded.rows_of(item)], encoded, item, params) for item in wanted]

    @abstractmethod
    def answer_form(self) -> AnswerForm:
        """Describe what ``predict`` returns with default parameters."""

    @abstractmethod
    def comparison(self) -> Comparison:
        """Return a fresh comparison of graph outputs for this task."""

    @abstractmethod
    def example_feeds(
        self,
        at: At,
        *,
        ragged: bool,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        items: Sequence[Any] | None = None,
    ) -> Arrays:
        """Return graph inputs at a corner of the signature's ranges.

        Args:
            at: Which size of every dimension.
            ragged: Whether rows have different lengths (where the task has a mask).
            seed: Seed of what is random.
            sizes: Sizes that replace those of ``at``, by dimension.
            items: Real items to fill them with, where the task can cut and join them; random values otherwise.
        """

    def made_up_blindly(self, items: Sequence[Any] = ()) -> list[str]:
        """Return the inputs whose range of values :meth:`example_feeds` has to guess.

        Args:
            items: Requests that somebody gave.
        """
        del items
        return []

    def metric(self, answers: Any, labels: Sequence[Any]) -> dict[str, float]:
        """Return the task's quality metrics of predictions against labels; nothing by default.

        Args:
            answers: As ``predict`` returns them, with default parameters or with :attr:`scored`.
            labels: The right answers, one for each.
        """
        del answers, labels
        return {}

    def check_labels(self, labels: Sequence[Any], items: Sequence[Any] = ()) -> None:
        """Make sure that :meth:`metric` can take these labels; any by default.

        Args:
            labels: One for each item, or for the first of them.
            items: The items, where they are known.

        Raises:
            InvalidInputError: It cannot; names the position.
        """
        del labels, items
        return

    def check_budget(self, budget: Budget, *, labels: bool) -> None:
        """Make sure that every limit is on something that will be measured: one that is not is broken by every variant.

        Args:
            budget: The budget.
            labels: Whether the verification data has labels.

        Raises:
            InvalidInputError: A limit is on something else.
        """
        known, column = set(self.comparison().metrics()), self.columns[0].name if self.columns else "text"
        scored = {name for one in (*self.quality, *self.quality_of_scores) for name in (one, loss_of(one))}
        for limit in budget.limits:
            if limit.metric in scored and not labels:
                raise InvalidInputError(
                    f"The budget limits {limit.metric}, which needs the right answers: give verification data with "
                    f"labels (verify_with= a table with the columns {column} and label, or --data), or leave "
                    f"'{limit}' out."
                )
            if limit.metric not in known | scored:
                can = ", ".join(sorted(known - {"rows"}) + sorted(scored))
                raise InvalidInputError(
                    f"The budget limits {limit.metric}, which task '{self.name}' does not measure. It measures {can}."
                )

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return every parameter with its value or default.

        Raises:
            InvalidInputError: No mapping, an unknown name or a wrong type.
        """
        if params is not None and not isinstance(params, Mapping):
            raise InvalidInputError(
                f"params must be a mapping from name to value, such as {{'name': 1}}; got {shown(params)}."
            )
        given = dict(params or {})
        checked = {param.name: param.check(given.pop(param.name, None)) for param in self.params}
        if given:
            known = ", ".join(param.name for param in self.params) or "none"
            raise InvalidInputError(
                f"Unknown parameter {shown(next(iter(given)))} for task '{self.name}'. Known: {known}."
            )
        return checked
