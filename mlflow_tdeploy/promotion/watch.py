"""The registry and the servers, looked at again and again, and made to agree.

Nothing is remembered that decides anything: who is killed and started again looks, and goes on. A poll finds whatever
has changed; a webhook only has the next look come at once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import ConflictError, TDeployError, first_line
from mlflow_tdeploy.core.evidence import now
from mlflow_tdeploy.promotion.apply import retire, together, wanted_still
from mlflow_tdeploy.promotion.ends import forget, is_left_alone, settle
from mlflow_tdeploy.promotion.history import Event, History
from mlflow_tdeploy.promotion.lease import places_held
from mlflow_tdeploy.promotion.look import make_plan, plan_for
from mlflow_tdeploy.promotion.outcome import Outcome, by_place, events_of, refusals
from mlflow_tdeploy.promotion.plan import Step
from mlflow_tdeploy.promotion.registry import desired, named
from mlflow_tdeploy.promotion.rests import Rests, bringing, having_back
from mlflow_tdeploy.promotion.revive import revived
from mlflow_tdeploy.promotion.spec import Spec
from mlflow_tdeploy.promotion.status import Standing, status_of

_log = logging.getLogger("mlflow_tdeploy")
#: Seconds until another look where somebody else was at a target.
_SOON_S = 2.0
#: Seconds to wait for somebody else at a place, who may be removing what is not kept any more.
_BRIEFLY_S = 1.0
#: Seconds until another look where what is to be done takes long.
_BUSY_S = 30.0
#: Seconds between two looks of who hurries.
_HURRY_S = 2.0
#: Seconds for which the records of a version that is refused, or rests, are good enough to look; not to do anything.
_RECORDS_S = 300.0
_ACTIONS = 50
#: Share of the time to the next look that passes without one, however long a look takes.
_REST = 0.25


@dataclass(frozen=True)
class View:
    """What was seen at the last look, for whoever asks.

    Attributes:
        at: When that was, UTC in ISO format; empty before the first one.
        standings: How names stand on the servers.
        error: Why there was nothing to see; empty where all went well. What was seen before it stays.
        seconds: How long it took.
        looks: How many there were.
        actions: What was done and refused since the start, the newest first.
    """

    at: str = ""
    standings: tuple[Standing, ...] = ()
    error: str = ""
    seconds: float = 0.0
    looks: int = 0
    actions: tuple[Event, ...] = ()


class Watch:
    """Keeps what serves equal to what the registry says.

    Args:
        read: Returns what is to be served where; called before each look, and may raise.
        interval: Seconds from one look to the next; a quarter of it lies between them, however long one takes.
        client: Whose registry; the current one by default.
        told: Called with each event.
    """

    def __init__(
        self,
        read: Callable[[], Spec],
        *,
        interval: float,
        client: MlflowClient | None = None,
        told: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._read, self._interval, self._told = read, interval, told
        self._client = client or MlflowClient()
        self._history = History(self._client)
        self._woken, self._stopped = SimpleQueue[None](), False
        self._rests = Rests()
        self._refused: set[tuple[str, str, int, str]] = set()
        self._trying: dict[tuple[str, str], threading.Thread] = {}
        self._retiring: dict[tuple[str, str], threading.Thread] = {}
        self._telling = threading.Lock()
        self._actions: deque[Event] = deque(maxlen=_ACTIONS)
        self._succeeded = time.monotonic()
        self._hurry_until = 0.0
        self._spec: Spec | None = None
        self.view = View()

    def run(self) -> None:
        """Look until :meth:`stop`; what is being done then is done to its end, but for what is tried out: it goes."""
        while not self._stopped:
            begun = time.monotonic()
            pause = self.look()
            pause = max(pause - (time.monotonic() - begun), _REST * pause)  # from one look to the next, as is said
            hurries = time.monotonic() < self._hurry_until
            with contextlib.suppress(Empty):
                self._woken.get(timeout=min(pause, _HURRY_S) if hurries else pause)
                while True:  # however often it was woken, one look is enough
                    self._woken.get_nowait()
        self.finish()

    def finish(self) -> bool:
        """Wait until nothing is tried out any more, and what is not kept is gone; tell whether anything was tried."""
        trying = tuple(self._trying.values())
        for one in trying:
            one.join()
        for one in tuple(self._retiring.values()):  # with those of what was tried out
            one.join()
        return bool(trying)

    def hurry(self, seconds: float) -> None:
        """Look often for a while, as what else would say when to look may not do so yet."""
        self._hurry_until = time.monotonic() + seconds

    def wake(self) -> None:
        """Have the next look come at once."""
        self._woken.put(None)

    def stop(self) -> None:
        """End :meth:`run`, soon.

        Also from a handler of signals: it may come while :meth:`run` itself holds the lock of an event, for ever then.
        """
        self._stopped = True
        self.wake()

    @property
    def ready(self) -> bool:
        """Whether a look has gone well lately."""
        lately = time.monotonic() - self._succeeded < 3 * self._interval + self.view.seconds + _SOON_S
        return bool(self.view.at) and lately

    def look(self) -> float:
        """Look once and do what is to be done; whatever goes wrong is told.

        Returns:
            Seconds until the next look.
        """
        started = time.perf_counter()
        try:
            spec = self._read()
            if spec is not self._spec:
                self._spec = spec
                self._rests.clear()  # what failed may be said otherwise now
            plan = make_plan(spec, self._client, within=_RECORDS_S)
            if self._have_back(spec, plan.steps):
                plan = make_plan(spec, self._client, within=_RECORDS_S)
            self._forget(spec, plan.steps)
            self._tell_refused(refusals(plan, "watch"))
            due = [steps for steps in by_place(plan.changes).values() if self._is_due(steps)]
            busy = [not self._begun(spec, steps) for steps in due]
            if due and not all(busy):
                plan = make_plan(spec, self._client, within=_RECORDS_S)
                self._forget(spec, plan.steps)
            self._seen(status_of(plan), "", started)
            self._succeeded = time.monotonic()
        except Exception as error:  # a registry that is away, a file that is wrong: what serves serves on
            why = first_line(error)
            if why != self.view.error:
                trace = None if isinstance(error, (TDeployError, MlflowException)) else error
                _log.warning("Nothing can be compared: %s", why, extra={"event": "look failed"}, exc_info=trace)
            self._seen(self.view.standings, why, started)
            self._have_back_what_is_known()
            return self._interval
        waits = (self._waits(steps) for steps in by_place(plan.changes).values())  # some may have come meanwhile
        return min(self._interval, _SOON_S if any(busy) else self._interval, *(max(_SOON_S, one) for one in waits))

    def _have_back(self, spec: Spec, steps: Iterable[Step], *, noted: bool = True) -> bool:
        """Have what is deployed answer again where nothing does; tell whether anything was done.

        Args:
            spec: What is to be served where.
            steps: How names stand.
            noted: Write it down in the registry; not where that is away, as each name would wait for it.
        """
        found_there = tuple(steps)
        settle(found_there, spec)
        due = [
            one
            for one in found_there
            if one.silent and not (is_left_alone(one) or self._is_trying([one]) or self._rests.waits(having_back(one)))
        ]
        found = [one for of in by_place(due).values() if not self._stopped for one in self._revive(spec, of)]
        self._tell([event for one in found for event in events_of([one], "watch")], noted=noted)  # when all are back
        return any(one.state == "done" for one in found)

    def _have_back_what_is_known(self) -> None:
        """Do the same while the registry is away: what is deployed needs none."""
        if self._spec is None:
            return
        try:
            known = named(self._spec, (one.model for one in self.view.standings))
            self._have_back(self._spec, plan_for(self._spec, known).steps, noted=False)
        except Exception as error:
            _log.warning("What is deployed cannot be looked at: %s", first_line(error))

    def _revive(self, spec: Spec, steps: Sequence[Step]) -> tuple[Outcome, ...]:
        try:
            with places_held(spec, {(steps[0].target, steps[0].name)}, wait=_BRIEFLY_S):
                outcomes = revived(steps, spec)
        except Exception as error:  # somebody else is at it, or the repository refuses: the others are others
            _log.warning("%s", first_line(error), extra={"event": "busy", "target": steps[0].target})
            return ()
        for one in outcomes:
            if one.state == "done":  # the next time it is empty is another time
                self._rests.drop(having_back(one.step))
            else:
                self._rests.note(having_back(one.step), [one])
        return outcomes

    def _seen(self, standings: tuple[Standing, ...], error: str, started: float) -> None:
        seconds, looks = time.perf_counter() - started, self.view.looks + 1
        at = now() if not error else self.view.at
        self.view = View(at, standings, error, seconds, looks, tuple(self._actions))

    def _begun(self, spec: Spec, steps: Sequence[Step]) -> bool:
        """Do what is to be done, in a thread where a version is tried out: that takes long, and the others are others.

        Returns:
            False where somebody else is at it.
        """
        if not any(one.strategy for one in steps):
            return self._bring(spec, steps)

        def bring() -> None:
            if self._bring(spec, steps):
                self.wake()
            else:  # another one tries it out, for long
                self._rests.until_later(bringing(steps), _BUSY_S)

        place = (steps[0].target, steps[0].name)
        self._trying[place] = threading.Thread(target=bring, name=f"tdeploy-{'-'.join(place)}")
        self._trying[place].start()
        return True

    def _bring(self, spec: Spec, steps: Sequence[Step]) -> bool:
        """Do what is to be done about a name on a target, as it is by now; False where somebody else is at it."""
        target, name = steps[0].target, steps[0].name
        try:
            with places_held(spec, {(target, name)}, wait=_BRIEFLY_S):
                # also where else the model is served: what has ended a server there does not come here
                wanted = [one for one in desired(spec, self._client) if one.model == steps[0].model]
                fresh = by_place(plan_for(spec, wanted).changes).get((target, name), [])
                outcomes = together(fresh, spec, go_on=self._unless_stopped(wanted_still(spec, self._client, fresh)))
        except ConflictError as error:
            _log.info("%s", first_line(error), extra={"event": "busy", "target": target})
            return False
        except Exception as error:  # this repository refuses, or the registry went away: the others are others
            _log.warning("%s %s: %s", target, name, first_line(error), extra={"event": "failed", "target": target})
            self._rests.note(bringing(steps), [Outcome(one, "failed", why=first_line(error)) for one in steps])
            return True
        self._retire(spec, outcomes)
        if fresh:
            self._rests.note(bringing(fresh), outcomes)
        self._tell(events_of(outcomes, "watch"))
        return not any(one.state == "left" for one in outcomes) or any(one.state == "failed" for one in outcomes)

    def _retire(self, spec: Spec, outcomes: Sequence[Outcome]) -> None:
        """Remove what is not kept any more, in a thread: it takes seconds, and the next version need not wait.

        Of one place one after the other: each of them waits for the requests that all have.
        """
        done = [one for one in outcomes if one.state == "done"]
        if not done:
            return
        place = (done[0].step.target, done[0].step.name)
        before = self._retiring.get(place)

        def last() -> None:
            if before is not None:
                before.join()
            retire(done, spec)

        self._retiring[place] = threading.Thread(target=last, name=f"tdeploy-retire-{'-'.join(place)}")
        self._retiring[place].start()

    def _unless_stopped(self, go_on: Callable[[], None]) -> Callable[[], None]:
        def asked() -> None:
            if self._stopped:
                raise ConflictError("The watcher is being stopped. It is tried out anew when that is there again.")
            go_on()

        return asked

    def _forget(self, spec: Spec, steps: Sequence[Step]) -> None:
        """Forget what rests where there is nothing to do any more, and what ended a server and is not wanted now."""
        forget(steps, spec)
        places = by_place(steps).items()
        settled = {
            place for place, of in places if all(one.action in ("none", "keep") and not one.silent for one in of)
        }
        self._rests.forget(settled)

    def _is_due(self, steps: Sequence[Step]) -> bool:
        return not (self._is_trying(steps) or self._rests.waits(bringing(steps)))

    def _is_trying(self, steps: Sequence[Step]) -> bool:
        trying = self._trying.get((steps[0].target, steps[0].name))
        return trying is not None and trying.is_alive()

    def _waits(self, steps: Sequence[Step]) -> float:
        """Return the seconds until it can be done; those of a look where it is tried out: then it says when it ends."""
        if self._is_trying(steps):
            return self._interval
        return self._rests.waits(bringing(steps))

    def _tell_refused(self, events: Iterable[Event]) -> None:
        """Tell of refusals, each once: the registry is not asked for tags at every look."""
        found = {(one.target, one.name, one.version, one.why): one for one in events}
        self._tell(one for key, one in found.items() if key not in self._refused)
        self._refused = set(found)

    def _tell(self, events: Iterable[Event], *, noted: bool = True) -> None:
        with self._telling:
            self._tell_each(events, noted)

    def _tell_each(self, events: Iterable[Event], noted: bool) -> None:
        for event in events:
            self._actions.appendleft(event)
            _log.info(
                "%s %s: version %s %s. %s", event.target, event.name, event.version, event.decision, event.why,
                extra={"event": event.decision, "target": event.target, "name_": event.name, "version": event.version,
                       "before": event.before, "seconds": event.seconds, "why": event.why},
            )  # fmt: skip
            self._told(event)
            if noted:
                self._history.add([event])
        self.view = replace(self.view, actions=tuple(self._actions))
