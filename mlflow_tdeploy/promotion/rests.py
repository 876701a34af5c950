"""What a watcher has done, and leaves alone for a while."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mlflow_tdeploy.promotion.outcome import Outcome
from mlflow_tdeploy.promotion.plan import Step

#: What is done: target, stable name, what of it, and more that tells one thing to do from another.
Key = tuple[str, ...]
#: Seconds until something that failed is tried again, and at most: longer each time.
_FIRST_REST_S, _LONGEST_REST_S = 10.0, 600.0
_AGAIN = "again"


@dataclass
class _Rest:
    """What was done, and is left alone for a while.

    Attributes:
        failures: How often it was done.
        until: Until when, on the clock of ``time.monotonic``.
    """

    failures: int = 0
    until: float = 0.0


class Rests:
    """Things that were done lately, by what they are; nothing is remembered on disk."""

    def __init__(self) -> None:
        self._known: dict[Key, _Rest] = {}

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all of it: what failed may be said otherwise now."""
        self._known.clear()

    def drop(self, key: Key) -> None:
        """Forget one thing: the next time is another time."""
        self._known.pop(key, None)

    def waits(self, key: Key) -> float:
        """Return the seconds for which something rests still; 0 where it may be done."""
        rest = self._known.get(key)
        return max(0.0, rest.until - time.monotonic()) if rest is not None else 0.0

    def until_later(self, key: Key, seconds: float) -> None:
        """Leave something alone that somebody else is at."""
        self._known.setdefault(key, _Rest()).until = time.monotonic() + seconds

    def note(self, key: Key, outcomes: Sequence[Outcome]) -> None:
        """Leave what was done alone for a while: where it failed, it would most likely fail again.

        What went well is forgotten as soon as it is seen to be so; where it is not, doing it again would not help. What
        was done before it in that place is another matter by now.
        """
        rest = self._known.setdefault(key, _Rest())
        rest.until = time.monotonic() + min(_LONGEST_REST_S, _FIRST_REST_S * 2.0**rest.failures)
        rest.failures += 1
        if all(one.state == "done" for one in outcomes):
            others = [one for one in tuple(self._known) if one[:2] == key[:2] and one[2] != _AGAIN and one != key]
            for other in others:
                self.drop(other)
        if any(one.worse for one in outcomes):  # people have been asked enough of their requests for it
            rest.until = float("inf")

    def forget(self, places: Collection[tuple[str, str]]) -> None:
        """Forget what rests in places where there is nothing to do any more."""
        for key in [key for key in tuple(self._known) if key[:2] in places]:
            self.drop(key)


def having_back(step: Step) -> Key:
    """Return what tells having back what is deployed on a server from other things to do."""
    return (step.target, step.name, _AGAIN, step.server)


def bringing(steps: Sequence[Step]) -> Key:
    """Return what tells one thing to do from another: a version that failed is tried again in other words at once."""
    first = steps[0]
    return (first.target, first.name, str(first.after), *sorted({one.digest for one in steps}))
