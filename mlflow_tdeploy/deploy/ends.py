"""Notes of loads during which a server went away, beside the models of its repository.

Some loads end the server, and with it all that it serves. Whoever comes next must know, also who was started only
afterwards, and another server must not get what ended this one. So it is noted before a load begins, and the note goes
when that has ended well, or failed without harm. A note that was begun and is there still is of who was killed
meanwhile.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow_tdeploy.deploy.files import RepositoryFiles

_NOTES = ".ends-"


def notes_of(name: str) -> str:
    """Return the path of the notes about a stable name: a file, as Triton takes every folder for a model."""
    return f"{_NOTES}{name}"


def remove_notes(files: RepositoryFiles, name: str, server: str) -> None:
    """Forget all that is noted about a name on a server; other servers of the repository have their own."""
    Notes(files, server, name, "").keep(())


@dataclass(frozen=True)
class Note:
    """What is remembered of a version on a server.

    Attributes:
        times: How often in a row the server went away while it was loaded.
        begun: Whether a load was begun of which nobody has noted the end.
        said: What was said about serving it then: said otherwise, it is another matter.
    """

    times: int
    begun: bool
    said: str


class Notes:
    """Those about one stable name on one server.

    Args:
        files: The server's repository, which may be others' too.
        server: Its address.
        name: The stable name.
        said: What is said about serving it now.
    """

    def __init__(self, files: RepositoryFiles, server: str, name: str, said: str) -> None:
        self._files, self._server, self._path, self._said = files, server, notes_of(name), said

    def __call__(self) -> dict[int, Note]:
        """Return them by version; those of what is said otherwise by now are none, nor is what cannot be read."""
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            known = {int(version): Note(**note) for version, note in self._all().get(self._server, {}).items()}
            return {version: note for version, note in known.items() if note.said == self._said}
        return {}

    def begin(self, version: int, *, gone: bool) -> int:
        """Note that a load begins.

        Args:
            version: What will be loaded.
            gone: Whether the server has not even what is deployed, nor is loading it, or nothing at all: it went away
                under what was begun and nobody saw the end of. Who begins holds the place: nobody else is at it.

        Returns:
            How often in a row the server has gone away with it so far.

        Raises:
            StorageError: The repository refuses: nothing must begin.
        """
        known = resolved(self(), gone=gone)
        times = known[version].times if version in known else 0
        self._write({**known, version: Note(times, True, self._said)})
        return times

    def end(self, version: int, before: int, *, server_gone: bool | None) -> int:
        """Note how a load has ended.

        Args:
            version: What was loaded.
            before: What :meth:`begin` has returned: who has looked on meanwhile may have counted it.
            server_gone: Whether the server went away; None where nobody knows, and what was noted before stays.

        Returns:
            How often in a row the server has gone away with it.
        """
        known = self()
        times = before if server_gone is None else before + 1 if server_gone else 0
        rest = {one: note for one, note in known.items() if one != version}
        self._write({**rest, version: Note(times, False, self._said)} if times else rest)
        return times

    def settle(self) -> None:
        """Count the loads that were begun: the server has nothing, so it went away under them."""
        known = self()
        if any(note.begun for note in known.values()):
            self._write(resolved(known, gone=True))

    def keep(self, versions: Iterable[int | None]) -> None:
        """Forget all others: something else was wanted meanwhile."""
        wanted = set(versions)
        self._write({version: note for version, note in self().items() if version in wanted})

    def _all(self) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            found = json.loads(self._files.read(self._path) or b"{}")
            return found if isinstance(found, dict) else {}
        return {}

    def _write(self, notes: Mapping[int, Note]) -> None:
        servers = {server: known for server, known in self._all().items() if server != self._server}
        if notes:
            servers[self._server] = {str(version): vars(note) for version, note in sorted(notes.items())}
        if servers:
            self._files.write(self._path, json.dumps(servers).encode())
        else:
            self._files.remove(self._path)


def resolved(notes: Mapping[int, Note], *, gone: bool) -> dict[int, Note]:
    """Return notes without any that is only begun: it counts where the server went away under it."""
    found = {
        version: replace(note, times=note.times + (note.begun and gone), begun=False) for version, note in notes.items()
    }
    return {version: note for version, note in found.items() if note.times}
