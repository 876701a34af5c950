"""``tdeploy.yaml`` as it is now, for who runs for long."""

from __future__ import annotations

import logging
from pathlib import Path

from mlflow_tdeploy.core.errors import TDeployError, first_line
from mlflow_tdeploy.promotion.spec import Spec

_log = logging.getLogger("mlflow_tdeploy")


class SpecFile:
    """Reads a file again when it has changed; one that became wrong is told, and what it said before counts on.

    Args:
        path: The file.

    Raises:
        TDeployError: It is wrong from the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._stamp()
        self._spec = Spec.read(path)

    def read(self) -> Spec:
        """Return what it says."""
        stamp = self._stamp()
        if stamp != self._state:
            self._state = stamp
            try:
                self._spec = Spec.read(self._path)
                _log.info("'%s' was read again.", self._path, extra={"event": "file read"})
            except TDeployError as error:
                _log.error("What the file said before counts on: %s", first_line(error), extra={"event": "file wrong"})
        return self._spec

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino)
