"""What a watcher has done, and leaves alone for a while."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from mlflow_tdeploy.promotion.outcome import Outcome
from mlflow_tdeploy.promotion.plan import Step

#: What is done: target, stable name, what of it, and more that tells one thing to do from another.
Key = tuple[str, ...]
#: Seconds until something that failed is tried again, and at most: longer each time.
_FIRST_REST_S, _LONGEST_REST_S = 10.0, 600.0
#: How often in a row a server may go away while a version comes, which others may be to blame for.
_MOST_ENDS = 2
_LEFT_ALONE = (
    "That was the second time in a row that a server went away while this version came, and with it all that it has: "
    "the version is left alone until something else is wanted there, or said, or the watcher is started anew."
)
_AGAIN = "again"


@dataclass
class _Rest:
    """What was done, and is left alone for a while.

    Attributes:
        failures: How often it was done.
        ends: How often in a row the server went away meanwhile.
        until: Until when, on the clock of ``time.monotonic``.
    """

    failures: int = 0
    ends: int = 0
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

    def has_ended_a_server(self, key: Key) -> bool:
        """Tell whether a server went away the last time that this version came, of whichever variant."""
        return any(rest.ends for other, rest in tuple(self._known.items()) if other[:3] == key[:3])

    def until_later(self, key: Key, seconds: float) -> None:
        """Leave something alone that somebody else is at."""
        self._known.setdefault(key, _Rest()).until = time.monotonic() + seconds

    def note(self, key: Key, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Leave what was done alone for a while: where it failed, it would most likely fail again.

        What went well is forgotten as soon as it is seen to be so; where it is not, doing it again would not help. What
        was done before it in that place is another matter by now.

        Returns:
            The outcomes, which say so where it is left alone for good.
        """
        rest = self._known.setdefault(key, _Rest())
        rest.until = time.monotonic() + min(_LONGEST_REST_S, _FIRST_REST_S * 2.0**rest.failures)
        rest.failures += 1
        rest.ends = rest.ends + 1 if any(one.ended for one in outcomes) else 0
        if all(one.state == "done" for one in outcomes):
            others = [one for one in tuple(self._known) if one[:2] == key[:2] and one[2] != _AGAIN and one != key]
            for other in others:
                self.drop(other)
        if any(one.worse for one in outcomes):  # people have been asked enough of their requests for it
            rest.until = float("inf")
        if rest.ends < _MOST_ENDS:
            return list(outcomes)
        rest.until = float("inf")  # all that this server has is gone each time
        return [replace(one, why=f"{one.why.rstrip('.')}. {_LEFT_ALONE}") if one.ended else one for one in outcomes]

    def forget(self, places: Collection[tuple[str, str]]) -> None:
        """Forget what rests in places where there is nothing to do any more."""
        for key in [key for key in tuple(self._known) if key[:2] in places]:
            self.drop(key)


def having_back(step: Step) -> Key:
    """Return what tells having back what is deployed on a server from other things to do."""
    return (step.target, step.name, _AGAIN, step.server)


def bringing(steps: Sequence[Step]) -> Key:
    """Return what tells one thing to do from another: a version that failed is tried again in other words at once.

    Of a target's servers those that are away are not among the steps: what ended one of them would end the next.
    """
    first = steps[0]
    return (first.target, first.name, str(first.after), *sorted({one.digest for one in steps}))
