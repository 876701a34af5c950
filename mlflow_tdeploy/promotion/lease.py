"""One at a time changes what answers to a name on a target: a watcher, a person, or another watcher."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

from mlflow_tdeploy.core.errors import ConflictError, first_line
from mlflow_tdeploy.deploy.files import open_files
from mlflow_tdeploy.promotion.spec import Spec

#: Begins the name of a lease: no deployment can be called so.
_LEASE = "~promotion."
#: Seconds to wait for whoever is at it, and between two looks.
WAIT_S, _PAUSE_S = 120.0, 0.2


@contextlib.contextmanager
def places_held(spec: Spec, places: Iterable[tuple[str, str]], wait: float = WAIT_S) -> Iterator[None]:
    """Be the only one to promote to names on targets, while the body runs; who comes later waits.

    The lease is a file in a repository of each target, taken in one order by everybody. A dead holder's is taken over,
    see :meth:`RepositoryFiles.lease`; each deployment has a lease of its own besides, which tells who lost this one.

    Args:
        spec: What should be served where.
        places: Targets and stable names.
        wait: Seconds to wait for another one.

    Raises:
        ConflictError: Another one is at it for longer than that.
        StorageError: The repository cannot be written.
    """
    found = {(_repository(spec, target), name): target for target, name in sorted(places)}
    with contextlib.ExitStack() as held:
        for (url, name), target in sorted(found.items()):
            held.enter_context(_taken(url, name, target, wait))
        yield


def _repository(spec: Spec, target: str) -> str:
    if (found := spec.targets.get(target)) is None:
        raise ConflictError(f"There is no target '{target}' any more. Plan again.")
    return min(open_files(found.repository_of(server)).url for server in found.servers)


@contextlib.contextmanager
def _taken(url: str, name: str, target: str, wait: float) -> Iterator[None]:
    end = time.monotonic() + wait
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(open_files(url).lease(f"{_LEASE}{name}"))
                break
            except ConflictError as error:
                if time.monotonic() >= end:
                    raise ConflictError(
                        f"'{name}' on target '{target}' is being changed, or a version is tried out there, which ends "
                        f"when its alias or stage is moved back or who tries it out is ended: {first_line(error)}"
                    ) from error
            time.sleep(_PAUSE_S)
        yield
