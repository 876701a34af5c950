"""The reference's answers, computed once and held against every variant.

What is asked, in graph inputs:

* *corners*: the signature's minimum, optimum and maximum sizes, with every row full (dense) and with rows of
  different lengths (ragged). Text tasks fill them with the verification texts, joined and cut to length: random
  token ids are no language, activations on them are not those a user's texts cause, and an int8 variant's error on
  them says little about its error in use, in either direction.
* *blanks*, of ``tensors`` with floats: zeros throughout, and in each input (silence, a black image), each a request by
  itself, where the reference has a finite answer of its own (``build.steadiness``): an epsilon may have been lost.
* *rows*: some rows of the given requests of ``tensors``, each alone.
* *batches*: all items in the batches that serving makes of them, and a sample of items alone, because dynamic
  quantization picks its ranges per batch: a text's answer depends on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_tdeploy.build.golden import golden_texts
from mlflow_tdeploy.build.steadiness import Shaken, Steadiness
from mlflow_tdeploy.build.stored_answers import StoredAnswers
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.compare import REFERENCE_NON_FINITE, Comparison
from mlflow_tdeploy.core.errors import BuildError, InvalidInputError, TDeployError, first_line
from mlflow_tdeploy.core.evidence import shape_text
from mlflow_tdeploy.core.made_up import is_mask
from mlflow_tdeploy.core.pipeline import Infer, Pipeline
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.tensors import Arrays, At, Dim, Signature, dim_step, numpy_dtype

#: How many items are also asked alone.
ALONE = 24
#: Most elements (product of the named dims: tokens, for text) of a corner; fewer for large models.
MAX_CORNER = 32_768
MIN_CORNER = 2_048
#: Parameters × elements of the largest corner: about 10 s on two cores.
CORNER_WORK = 4e11
#: Numbers in the answer to the largest corner, and the fewest elements that are asked all the same.
ANSWER_NUMBERS, FEWEST = 1 << 24, 512
#: So many inputs are 0 by themselves, too.
_MOST_BLANKS = 8
_PARTS = ("corners", "items")
#: What is asked besides: the model may have no answer to it.
_EXTRA = ("rows", "blanks")
_CORNERS: tuple[tuple[At, int], ...] = (("min", MAX_CORNER), ("opt", MAX_CORNER), ("max", MIN_CORNER))


@dataclass(frozen=True)
class Case:
    """One batch that is asked.

    Attributes:
        part: ``corners``, ``items``, ``rows`` or ``blanks``.
        shape: Its sizes, for example ``batch=8,sequence=128``.
        feeds: The graph's inputs.
        indices: The rows of items in it, by position; empty for corners.
        answers: Whether its answers count for the task's metric (an item asked twice counts once).
        optional: Whether the model may fail at it: its sizes are none of those that all ranges of it are multiples of.
    """

    part: str
    shape: str
    feeds: Arrays
    indices: tuple[int, ...] = ()
    answers: bool = False
    optional: bool = False


class ReferenceAnswers:
    """Cases and the reference's outputs for them.

    Args:
        task: The task.
        data: Data in the task's form.
        reference: The original model.
        folder: Where outputs that are too large for memory are kept.
        parameters: Number of weights, which bounds the largest corner; 0 where unknown.
        shaken: The original with other roundings, where it can be asked so.

    Raises:
        BuildError: The reference itself fails.
        InvalidInputError: Its answer to an item is not finite.

    Attributes:
        steadiness: Which of its answers to zeros are its own.
        skipped: Sizes of corners that were left out: the model fails at them, and may.
        not_compared: How many rows of corners it has no finite answer for; variants are not held against those.
        unanswered: Sizes of corners at which it has none at all.
    """

    def __init__(
        self,
        task: Task,
        data: VerifyData,
        reference: Infer,
        folder: Path,
        *,
        parameters: int = 0,
        shaken: Shaken | None = None,
    ) -> None:
        self.task = task
        self.steadiness = Steadiness(task, shaken)
        self.data = data
        self._store = StoredAnswers(folder)
        cases, skipped = [], []
        for case in _cases(task, data, largest_corner(parameters, task.signature)):
            try:
                self._store.append(_asked(reference, case))
            except TDeployError as error:
                if case.part in _EXTRA:
                    continue
                if not (case.optional and isinstance(error, BuildError)):
                    raise
                skipped.append(case.shape)
                continue
            cases.append(case)
        self.cases, self.skipped = tuple(cases), tuple(dict.fromkeys(skipped))
        self.not_compared, self.unanswered = self._without_finite_answer()
        score = Score(task, data)
        for case, outputs in self:
            score.add(case, outputs)
        self.metric = score.metric()

    def __iter__(self) -> Iterator[tuple[Case, Arrays]]:
        return zip(self.cases, self._store, strict=True)

    @property
    def corner_shapes(self) -> tuple[str, ...]:
        """The corners' sizes, each once."""
        return tuple(dict.fromkeys(case.shape for case in self.cases if case.part == "corners"))

    def unrepeatable(self, reference: Infer, budget: Budget) -> str | None:
        """Ask the reference something once more; return how far its answer is from its first one, or None.

        A model that draws random numbers cannot be held against itself, and no variant of it against anything.
        """
        case, first = next(iter(self))
        again = _asked(reference, case)
        if all(np.array_equal(first[name], again[name]) for name in first):
            return None
        comparison = self.task.comparison()
        comparison.add(first, again, case.feeds)
        return "; ".join(budget.violations(comparison.metrics(), single=True)) or None

    def _without_finite_answer(self) -> tuple[int, tuple[str, ...]]:
        """Refuse a reference that cannot answer items; corners of made-up tensors may be beyond what it is for."""
        found: dict[tuple[str, str], Comparison] = {}
        for case, outputs in self:
            if case.part in _EXTRA:
                continue
            one = found.setdefault((case.part, case.shape if case.part == "corners" else ""), self.task.comparison())
            one.add(outputs, outputs, case.feeds)
        told = {place: one.metrics() for place, one in found.items()}
        broken, rows = (
            {part: sum(int(one.get(name, 0)) for (where, _), one in told.items() if where == part) for part in _PARTS}
            for name in (REFERENCE_NON_FINITE, "rows")
        )
        if broken["items"] or (broken["corners"] and not rows["corners"] + rows["items"]):
            part = "items" if broken["items"] else "corners"
            made_up = "" if self.data.real else " They were made up: example=… gives one that it can answer."
            raise InvalidInputError(
                f"The source model's own answers are not finite (NaN or infinite values) for {broken[part]} of the "
                f"{broken[part] + rows[part]} rows asked ({part}), so nothing can be verified against them. "
                f"Check its weights and inputs, or give verification data that it can answer: verify_with=….{made_up}"
            )
        without = (at for at, one in told.items() if at[1] and one.get(REFERENCE_NON_FINITE) and not one.get("rows"))
        return broken["corners"], tuple(shape for _, shape in without)


class Score:
    """Gathers a model's answers batch by batch and scores them against the labels, if there are any."""

    def __init__(self, task: Task, data: VerifyData) -> None:
        self._task = task
        self._labels, self._texts = data.labels, data.texts
        self._params = task.check_params(task.scored)
        self._rows: dict[int, Any] = {}

    def add(self, case: Case, outputs: Arrays) -> None:
        """Take in the outputs of one batch."""
        if self._labels is not None and case.answers:
            decoded = self._task.decode(outputs, case.feeds, len(case.indices), self._params)
            self._rows.update(zip(case.indices, decoded, strict=True))

    def metric(self) -> dict[str, float]:
        """Return the task's metrics; empty without labels."""
        if self._labels is None or not self._rows:
            return {}
        answers = {item: one for item, one in self._answers() if item < len(self._labels)}  # the rest was only added
        finished = self._task.finish(list(answers.values()), self._params)
        return self._task.metric(finished, [self._labels[item] for item in answers])

    def _answers(self) -> Iterator[tuple[int, Any]]:
        """Yield the items of which every row is known, and their answers."""
        if not self._texts:  # a request is an item, and a row
            yield from sorted(self._rows.items())
            return
        encoded = self._task.encode(self._task.items(list(self._texts)), self._params)
        for item, span in enumerate(encoded.by_item):
            if all(row in self._rows for row in span):
                yield item, self._task.join([self._rows[row] for row in span], encoded, item, self._params)


def largest_corner(parameters: int, signature: Signature) -> int:
    """Return how many elements the largest corner may have.

    Args:
        parameters: Of the model; 0 where unknown.
        signature: Of the model, whose answers may take more memory than its work takes time (a vocabulary a token).
    """
    largest = MAX_CORNER if parameters <= 0 else max(MIN_CORNER, min(MAX_CORNER, int(CORNER_WORK / parameters)))
    widest = max(math.prod(size for size in spec.shape if isinstance(size, int)) for spec in signature.outputs)
    return max(FEWEST, min(largest, ANSWER_NUMBERS // max(1, widest)))


def corner_sizes(signature: Signature, at: At, largest: int) -> list[dict[str, int]]:
    """Return the sizes to check at a corner of the signature's ranges.

    A corner of more than ``largest`` elements (the product of all named dims) is replaced by one corner per
    dimension that has this dimension at full size and the others as large as still fits.
    """
    names = list(dict.fromkeys(size for spec in signature.inputs for size in spec.shape if isinstance(size, str)))
    whole = {name: signature.dim(name).at(at) for name in names}
    if math.prod(whole.values()) <= largest:
        return [whole]
    found = [_shrunk(signature, whole, name, largest) for name in names]
    return [sizes for index, sizes in enumerate(found) if sizes not in found[:index]]


def _shrunk(signature: Signature, whole: Mapping[str, int], kept: str, largest: int) -> dict[str, int]:
    sizes = dict(whole)
    for name in sizes:
        if name != kept:
            rest = math.prod(size for other, size in sizes.items() if other != name)
            step = _step(signature, name)
            sizes[name] = max(signature.dim(name).min, min(sizes[name], largest // rest // step * step))
    return sizes


def batch_text(signature: Signature, feeds: Arrays) -> str:
    """Return the named sizes of a batch, for example ``batch=8,sequence=128``."""
    return shape_text(signature.sizes(feeds))


def _cases(task: Task, data: VerifyData, largest: int) -> Iterator[Case]:
    yield from _corners(task, data, largest)
    yield from _blanks(task, data)
    items = task.items(list(data.texts)) if data.texts else None
    if items is None:
        for index, request in enumerate(data.requests):
            yield Case("items", batch_text(task.signature, request), request, (index,), answers=True)
        yield from _rows(task, data)
        return
    encoded = task.encode(items)
    for batch in Pipeline(task, never).batches(encoded):
        feeds = encoded.collate(batch)
        yield Case("items", batch_text(task.signature, feeds), feeds, tuple(batch), answers=True)
    for index, texts in enumerate(golden_texts(task, data)):  # what will be replayed must have been checked as it is
        feeds = task.encode(task.items(texts)).whole()
        yield Case("items", batch_text(task.signature, feeds), feeds, (index,))
    step = max(1, len(encoded.lengths) // ALONE)
    for index in range(0, len(encoded.lengths), step):
        feeds = encoded.collate([index])
        yield Case("items", batch_text(task.signature, feeds), feeds, (index,))


def _corners(task: Task, data: VerifyData, largest: int) -> Iterator[Case]:
    seen: list[Arrays] = []
    wanted = list(_wanted_corners(task.signature, largest))
    if task.input_kind == "image":  # all of one size
        wanted = [one for one in wanted if not one[2]]
    if task.input_kind == "tensors":  # texts have every length anyway
        wanted += _between(task.signature, largest)
    for seed, (at, sizes, ragged) in enumerate(wanted):
        feeds = task.example_feeds(at, ragged=ragged, seed=seed, sizes=sizes, items=data.real)
        if not any(_equal(feeds, other) for other in seen):
            seen.append(feeds)
            optional = any(size % _step(task.signature, name) for name, size in sizes.items())
            yield Case("corners", batch_text(task.signature, feeds), feeds, optional=optional)


def _rows(task: Task, data: VerifyData) -> Iterator[Case]:
    """Yield some of the rows that were given, each by itself, where a request may have one: as many of them come so."""
    signature = task.signature
    dim, given = signature.batch_dim, data.requests
    if dim is None or signature.dim(dim).min > 1:
        return
    sizes = [signature.sizes(request)[dim] for request in given]
    rows = [(place, row) for place, count in enumerate(sizes) if count > 1 for row in range(count)]
    for place, row in rows[:: max(1, len(rows) // ALONE)][:ALONE]:
        feeds = {
            spec.name: np.take(given[place][spec.name], [row], axis=spec.shape.index(dim))
            if dim in spec.shape
            else given[place][spec.name]
            for spec in signature.inputs
        }
        yield Case("rows", batch_text(signature, feeds), feeds, optional=True)


def _blanks(task: Task, data: VerifyData) -> Iterator[Case]:
    """Yield small requests of zeros, in all inputs of floats, and in each of them."""
    floats = [
        spec.name
        for spec in task.signature.inputs
        if numpy_dtype(spec.dtype).kind not in "biu" and not is_mask(spec.name)
    ]
    if task.input_kind != "tensors" or not floats:
        return
    (sizes, *_) = corner_sizes(task.signature, "min", MIN_CORNER)
    feeds = task.example_feeds("min", ragged=False, sizes=sizes, items=data.real)
    for names in (floats, *([name] for name in floats[:_MOST_BLANKS] if len(floats) > 1)):
        blank = {name: np.zeros_like(array) if name in names else array for name, array in feeds.items()}
        yield Case("blanks", batch_text(task.signature, blank), blank, optional=True)


def _wanted_corners(signature: Signature, largest: int) -> Iterator[tuple[At, dict[str, int], bool]]:
    """Yield corner, sizes and whether rows differ in length.

    The largest batch is asked once, ragged (its first row is full); dense at most MIN_CORNER of it: the two together
    cover the same code paths for half the time.
    """
    for at, most in _CORNERS:
        for ragged in (False, True):
            for sizes in corner_sizes(signature, at, largest if ragged else min(largest, most)):
                yield at, sizes, ragged


def _between(signature: Signature, largest: int) -> list[tuple[At, dict[str, int], bool]]:
    """Return odd sizes between the corners: a graph may be right at round ones only."""
    found: list[tuple[At, dict[str, int], bool]] = []
    for low, high in (("min", "opt"), ("opt", "max")):
        for middle in (_odd, _even):
            sizes = {dim.name: middle(dim, dim.at(low), dim.at(high)) for dim in signature.dims}  # type: ignore[arg-type]
            for name in sizes:
                if math.prod(sizes.values()) > largest:
                    sizes = _shrunk(signature, sizes, name, largest)
            if middle is _odd or any(dim_step(dim) > 1 for dim in signature.dims):
                found.append(("opt", sizes, True))
    return found


def _odd(dim: Dim, low: int, high: int) -> int:
    middle = (low + high) // 2 | 1
    return middle if low <= middle <= high else high


def _even(dim: Dim, low: int, high: int) -> int:
    """Return a size between two that is a multiple of what the whole range is multiples of."""
    step = dim_step(dim)
    return _odd(dim, low, high) if step == 1 else max(low, (low + high) // 2 // step * step)


def _step(signature: Signature, name: str) -> int:
    return dim_step(signature.dim(name)) if signature.has_dim(name) else 1


def _equal(a: Arrays, b: Arrays) -> bool:
    return all(np.array_equal(array, b[name]) for name, array in a.items())


def never(feeds: Arrays) -> Arrays:
    """Infer for pipelines that only plan batches."""
    raise AssertionError("this pipeline only plans")


def _asked(reference: Infer, case: Case) -> Arrays:
    try:
        return reference(case.feeds)
    except TDeployError:
        raise
    except Exception as error:
        said = f"It said: {type(error).__name__}: {first_line(error)}"
        if case.part == "items":
            raise BuildError(f"The source model fails on a request that was given ({case.shape}). {said}") from error
        raise BuildError(
            f"The source model fails at {case.shape}, a size within the ranges of its signature, on made-up values. "
            f"Narrow the ranges with shapes=…, give bounds that are multiples of what the model needs, or show with "
            f"example=… what it takes. {said}"
        ) from error
