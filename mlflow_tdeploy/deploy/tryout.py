"""A version tried out on everybody's requests before it answers all of them: for how long, and what is too bad.

What the servers do meanwhile is in :mod:`mlflow_tdeploy.core.rollout`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlflow_tdeploy.core.errors import TDeployError, TryoutError
from mlflow_tdeploy.core.rollout import MOST_LATE, Kind
from mlflow_tdeploy.deploy.files import RepositoryFiles
from mlflow_tdeploy.deploy.publish import publish, remove
from mlflow_tdeploy.store.staging import workspace
from mlflow_tdeploy.triton.client import TritonClient
from mlflow_tdeploy.triton.helper_model import VERSION
from mlflow_tdeploy.triton.names import tally_model_of
from mlflow_tdeploy.triton.tally_model import COUNTING, Tally, question, tally_of

#: Seconds between two looks at what was seen.
_PAUSE_S = 1.0
#: Seconds that a version may take longer at any rate: it is asked through one model more than the one that serves.
_HOP_S = 0.005


@dataclass(frozen=True)
class Tryout:
    """How a version is tried out.

    Attributes:
        kind: ``canary``: it answers a share of the requests. ``shadow``: it gets copies, and answers nobody.
        share: That share, 0 to 1.
        seconds: For how long.
        requests: How many of them it has to have been asked; from so many on, what is too bad ends it at once.
        errors: Share of those to which it may have no answer while the version that serves has.
        slower: How many times as long its 95th percentile may be, and 5 ms for the way.
        agreement: Share of them that both versions have to answer alike.
        go_on: Called again and again; what it raises ends it.
    """

    kind: Kind
    share: float
    seconds: float
    requests: int
    errors: float
    slower: float
    agreement: float
    go_on: Callable[[], None] = lambda: None

    def fault(self, seen: Tally) -> str:
        """Return what is too bad about what was seen; empty for nothing."""
        if seen.stopped:
            return f"it hangs, or was late {MOST_LATE} times in a row: {seen.why}"
        if seen.failed > self.errors * seen.requests:
            return f"{seen.failed} of {seen.requests} requests failed, such as: {seen.why}"
        answered = seen.requests - seen.failed
        if seen.alike < self.agreement * answered:
            return f"{seen.alike} of {answered} requests were answered alike, {self.agreement:.0%} have to be"
        if seen.after > self.slower * seen.before + _HOP_S:
            return (
                f"it took {seen.after * 1000:.1f} ms (95th percentile) where the version that serves took "
                f"{seen.before * 1000:.1f} ms, more than {self.slower:g} times as long"
            )
        return ""

    def watched(self, ask: Callable[[], Tally]) -> Tally:
        """Wait until it is over, or bad; return what was seen.

        Args:
            ask: Returns what was seen so far.

        Raises:
            TryoutError: It is too bad, or was not asked often enough for anybody to know.
        """
        end = time.monotonic() + self.seconds
        while True:
            over = time.monotonic() >= end
            seen = ask()
            enough = seen.requests >= self.requests or seen.stopped  # nobody would see much more
            if enough and (why := self.fault(seen)):
                raise TryoutError(f"The {self.kind} was ended: {why}.")
            if over:
                break
            self.go_on()
            time.sleep(max(0.0, min(_PAUSE_S, end - time.monotonic())))
        if seen.requests < self.requests:
            raise TryoutError(
                f"The {self.kind} was asked {seen.requests} requests in {self.seconds:g} s, and {self.requests} are "
                f"needed to know: ask for fewer, for a larger share, or for longer."
            )
        return seen


@contextlib.contextmanager
def counted(client: TritonClient, files: RepositoryFiles, name: str) -> Iterator[Callable[[], Tally]]:
    """Have requests counted on a server while somebody is tried out; yields what says what was seen.

    Args:
        client: The server.
        files: Its repository.
        name: The deployment, whose lease the caller holds.
    """
    model = tally_model_of(name)
    try:
        with workspace() as work:
            COUNTING.write(work / model)
            publish(files, model, work / model)
        client.bring_up(model, VERSION)
        yield lambda: tally_of(client.infer(model, question()), client.connection.url)
    finally:
        with contextlib.suppress(TDeployError):  # what is left is taken away by the next deployment
            client.unload(model)
            remove(files, model)
