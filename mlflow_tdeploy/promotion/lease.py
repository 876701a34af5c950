"""One at a time changes what a target serves: a watcher, a person, or another watcher."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

from mlflow_tdeploy.core.errors import ConflictError, first_line
from mlflow_tdeploy.deploy.files import open_files
from mlflow_tdeploy.promotion.spec import Spec

#: No deployment can be called so.
_LEASE = "~promotion"
#: Seconds to wait for whoever is at it, and between two looks.
WAIT_S, _PAUSE_S = 120.0, 0.2


@contextlib.contextmanager
def targets_held(spec: Spec, targets: Iterable[str], wait: float = WAIT_S) -> Iterator[None]:
    """Be the only one to promote to targets, while the body runs; who comes later waits.

    The lease is a file in a repository of each target, taken in one order by everybody. A dead holder's is taken over,
    see :meth:`RepositoryFiles.lease`; each deployment has a lease of its own besides, which tells who lost this one.

    Args:
        spec: What should be served where.
        targets: Their names.
        wait: Seconds to wait for another one.

    Raises:
        ConflictError: Another one is at it for longer than that.
        StorageError: The repository cannot be written.
    """
    repositories = {_repository(spec, target): target for target in sorted(targets)}
    with contextlib.ExitStack() as held:
        for url in sorted(repositories):
            held.enter_context(_taken(url, repositories[url], wait))
        yield


def _repository(spec: Spec, target: str) -> str:
    if (found := spec.targets.get(target)) is None:
        raise ConflictError(f"There is no target '{target}' any more. Plan again.")
    return min(open_files(found.repository_of(server)).url for server in found.servers)


@contextlib.contextmanager
def _taken(url: str, target: str, wait: float) -> Iterator[None]:
    end = time.monotonic() + wait
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(open_files(url).lease(_LEASE))
                break
            except ConflictError as error:
                if time.monotonic() >= end:
                    raise ConflictError(f"Target '{target}' is being changed: {first_line(error)}") from error
            time.sleep(_PAUSE_S)
        yield
