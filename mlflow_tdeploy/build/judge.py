"""How good a graph in the making is, for recipes that look for one."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.reference import Case, ReferenceAnswers
from mlflow_tdeploy.build.stage import open_candidate
from mlflow_tdeploy.build.verify import Verified, verify
from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import SessionError, first_line
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.tensors import Arrays
from mlflow_tdeploy.runtime.base import Session
from mlflow_tdeploy.runtime.options import SessionOptions

#: Batches that distances are taken of.
_SAMPLE = 4


class Judge:
    """Holds graphs against the answers of the source.

    Args:
        answers: The source's answers.
        budget: How far a variant may be from them.
        golden: The golden requests.
        host: This host.
    """

    def __init__(
        self, answers: ReferenceAnswers, budget: Budget, golden: Sequence[GoldenRequest], host: Fingerprint
    ) -> None:
        self._answers, self._golden, self._host = answers, tuple(golden), host
        self.budget = budget

    @functools.cached_property
    def _sample(self) -> list[tuple[Arrays, Arrays]]:
        """Some batches with their answers: many answers lie on disk, and few recipes ask for these."""
        return _some(self._answers)

    def verdict(self, graph: Graph) -> Verified:
        """Return what a check of it as a variant would find: the same questions, the same budget."""
        try:
            with self._opened(graph) as session:
                return verify(self._answers, session.infer, self.budget, self._golden)
        except SessionError as error:  # this one graph; another one of the search may be opened
            return Verified({}, (f"an error: {first_line(error)}",), self._answers.data.record, failed=True)

    def distance(self, graph: Graph) -> float:
        """Return how far its answers to a few batches are from the source's, beside how large those are.

        Infinite where it cannot be opened, fails, or answers what is no number.
        """
        try:
            found = self._distance(graph)
        except SessionError:
            return math.inf
        return found if math.isfinite(found) else math.inf

    def _distance(self, graph: Graph) -> float:
        off = size = 0.0
        with self._opened(graph) as session:
            for feeds, reference in self._sample:
                got = session.infer(feeds)
                for name, wanted in reference.items():
                    off += float(np.square(got[name].astype(np.float64) - wanted).sum())
                    size += float(np.square(wanted.astype(np.float64)).sum())
        return float(np.sqrt(off / size)) if size else off

    @contextmanager
    def _opened(self, graph: Graph) -> Iterator[Session]:
        options = SessionOptions(intra_op_threads=self._host.cores)
        session = open_candidate(graph, self._answers.task, self._host, options)
        try:
            yield session
        finally:
            session.close()


def _some(answers: ReferenceAnswers) -> list[tuple[Arrays, Arrays]]:
    """Return some batches of what was given, with the source's answers; corners where nothing was."""
    usable = [index for index, (_, outputs) in enumerate(answers) if _is_finite(outputs)]
    by_itself = answers.task.input_kind == "tensors"  # a request is a batch
    given = [index for index in usable if _is_given(answers.cases[index], by_itself)]
    chosen = given or usable
    step = max(1, len(chosen) // _SAMPLE)
    wanted = set(chosen[::step][:_SAMPLE])  # one by one: all answers may be too large for memory
    return [(case.feeds, outputs) for index, (case, outputs) in enumerate(answers) if index in wanted]


def _is_given(case: Case, by_itself: bool) -> bool:
    return case.part == "items" and (by_itself or len(case.indices) > 1)


def _is_finite(outputs: Arrays) -> bool:
    return all(np.isfinite(array).all() for array in outputs.values())
