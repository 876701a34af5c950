"""A model's sessions: files unchanged, a golden request within the budget, each opened once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlflow_tdeploy.core.errors import IntegrityError, SessionError
from mlflow_tdeploy.core.golden import GoldenRequest, check_golden
from mlflow_tdeploy.core.tasks import Task
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime.base import RUNTIMES, Session
from mlflow_tdeploy.runtime.decision import Candidate
from mlflow_tdeploy.runtime.options import SessionOptions
from mlflow_tdeploy.runtime.trial import require_trial
from mlflow_tdeploy.store.bundle import Bundle, Fetch
from mlflow_tdeploy.store.hashing import HashCache

_log = logging.getLogger("mlflow_tdeploy")

Key = tuple[str, str]
_abandoned: list[Session] = []


@dataclass(frozen=True)
class Opener:
    """Opens sessions that answer as they must: files unchanged, a golden request within the budget.

    Attributes:
        bundle: Where the variants lie.
        task: Its task.
        golden: Requests with their answers.
        hashes: Digests that this host remembers.
        tried: Whether this process is the one in which dangerous opening is tried.
    """

    bundle: Bundle
    task: Task
    golden: tuple[GoldenRequest, ...]
    hashes: HashCache
    tried: bool = False

    @classmethod
    def of(cls, bundle: Bundle, *, tried: bool = False) -> Opener:
        """Return one for a bundle, with its own task and golden requests.

        Raises:
            IntegrityError: Files of either are missing, truncated or changed.
        """
        hashes = HashCache()
        return cls(bundle, bundle.task(hashes), bundle.golden(), hashes, tried)

    def open(self, candidate: Candidate, options: SessionOptions) -> Session:
        """Return an opened session of a variant whose files are here.

        Raises:
            IntegrityError: A file was changed.
            SessionError: It cannot be opened or answers wrongly.
        """
        variant = self.bundle.variants[candidate.variant]
        self.bundle.verify(variant, self.hashes)
        runtime = RUNTIMES.get(candidate.runtime)()
        if not self.tried:
            require_trial(self.bundle, candidate, options)
        session = runtime.open(self.bundle.root, variant, self.bundle.manifest.signature, options)
        try:
            self._replay(session)
        except BaseException:
            session.close()
            raise
        return session

    def _replay(self, session: Session) -> None:
        """Run one golden request and hold the answer against the budget."""
        if self.golden:
            why = check_golden(self.task, self.bundle.manifest.budget, self.golden, session.infer)
            if why:
                raise SessionError(f"its answer to a golden request is wrong: {why}")


class Sessions:
    """The sessions of one model, opened when they are first needed; the model lets one thread in at a time.

    Args:
        opener: Opens them.
        options: How.
        fetch: Brings a variant's files into the bundle's folder.
    """

    def __init__(self, opener: Opener, options: SessionOptions, fetch: Fetch | None) -> None:
        self.opener = opener
        self._options = options
        self._fetch = fetch
        self._sessions: dict[Key, Session] = {}

    def get(self, candidate: Candidate) -> Session:
        """Return the session of a candidate.

        Raises:
            IntegrityError: A file was changed.
            SessionError: It cannot be opened or answers wrongly.
            Exception: What the store of the files raises.
        """
        if key_of(candidate) not in self._sessions:
            self._bring(self.opener.bundle.variants[candidate.variant])
            self._sessions[key_of(candidate)] = self.opener.open(candidate, self._options)
        return self._sessions[key_of(candidate)]

    def _bring(self, variant: Variant) -> None:
        """Have the variant's files here, whole; a damaged copy of a remote file is fetched once more."""
        if self._fetch is None:
            return
        if not self.opener.bundle.present(variant):
            self._fetch(variant)
        try:
            self.opener.bundle.verify(variant, self.opener.hashes)
        except IntegrityError as error:
            _log.warning("Fetching variant %s again: %s", variant.id, error)
            self._fetch(variant)

    def after_fork(self) -> None:
        """Go on in a forked process: every session is opened anew.

        Threads of the old ones are not here, and a lock that one of them held at that moment is held for good.
        """
        for (_, runtime), session in self._sessions.items():
            abandon(session)
            RUNTIMES.get(runtime).after_fork()
        self._sessions = {}

    def close(self) -> None:
        """Close every session; closing twice is fine."""
        sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.close()


def check_encoding(task: Task, requests: Iterable[GoldenRequest]) -> None:
    """Make sure that requests reach the graph as they did where the model was logged.

    Raises:
        IntegrityError: Another version of a library makes other arrays of them: no variant would answer as it should.
    """
    for request in requests:
        try:
            feeds = task.encode(task.items(request.inputs)).whole()
        except Exception as error:  # tokenizers raises bare ones
            raise IntegrityError(f"A golden request cannot be read on this host: {error}") from error
        for name, array in request.feeds.items():
            if name not in feeds or not np.array_equal(feeds[name], array, equal_nan=array.dtype.kind == "f"):
                raise IntegrityError(
                    f"A golden request becomes another '{name}' on this host than where the model was logged, so its "
                    f"answers would be others. Install the versions of the model's requirements.txt (tokenizers first)."
                )


def abandon(session: Session | None) -> None:
    """Leave a session of the process that this one was forked from as it is: freeing it waits for its threads."""
    if session is not None:
        _abandoned.append(session)


def key_of(candidate: Candidate) -> Key:
    """Return what tells one session from another."""
    return candidate.variant, candidate.runtime
