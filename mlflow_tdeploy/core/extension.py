"""One registry behind every extension point: tasks, runtimes, recipes."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Generic, TypeVar

from mlflow_tdeploy.core.errors import BrokenDependencyError, ConflictError, InvalidInputError, TDeployError, shown
from mlflow_tdeploy.core.thread_lock import ThreadLock

T = TypeVar("T")
_discovering = ThreadLock()
_log = logging.getLogger("mlflow_tdeploy")


class Registry(Generic[T]):
    """Named things of one kind, each registered once.

    A package given as ``discover`` is imported module by module on first use (modules whose name
    starts with ``_`` are shared helpers and are skipped): adding a task, a runtime or a recipe is
    adding one file.

    Args:
        kind: What the things are called in messages, for example ``"task"``.
        discover: Dotted name of the package whose modules register themselves.
    """

    def __init__(self, kind: str, discover: str | None = None) -> None:
        self.kind = kind
        self._discover = discover
        self._items: dict[str, T] = {}
        self._broken: BrokenDependencyError | None = None

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers the decorated thing under ``name``.

        Raises:
            ConflictError: ``name`` is taken by something else.
        """

        def add(item: T) -> T:
            if name in self._items:
                raise ConflictError(
                    f"Cannot register the {self.kind} '{name}': that name is taken by {self._items[name]!r}. "
                    f"Choose another name, or unregister the first."
                )
            self._items[name] = item
            return item

        return add

    def unregister(self, name: str) -> None:
        """Remove ``name``; absent names are ignored."""
        self._items.pop(name, None)

    def get(self, name: str) -> T:
        """Return the thing called ``name``.

        Raises:
            InvalidInputError: Nothing has that name; the message lists what exists.
            BrokenDependencyError: It may be in a module that cannot be imported.
        """
        self._load()
        try:
            return self._items[name]
        except (KeyError, TypeError):
            if self._broken is not None:
                raise self._broken from self._broken.__cause__
            raise InvalidInputError(
                f"Unknown {self.kind} {shown(name)}. Available: {', '.join(sorted(self._items)) or 'none'}."
            ) from None

    def names(self) -> tuple[str, ...]:
        """Return every registered name, sorted."""
        self._load()
        return tuple(sorted(self._items))

    def __iter__(self) -> Iterator[T]:
        self._load()
        return iter([self._items[name] for name in sorted(self._items)])

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def _load(self) -> None:
        if self._discover is None:
            return
        with _discovering.held():
            if self._discover is not None:  # else another thread has found everything in the meantime
                self._import_all(self._discover)

    def _import_all(self, folder: str) -> None:
        package: ModuleType = importlib.import_module(folder)
        names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
        broken = [error for name in names if (error := self._import(f"{folder}.{name}")) is not None]
        self._broken = next(iter(broken), None)
        if not broken:  # else it is tried again: somebody may have mended it
            self._discover = None

    def _import(self, name: str) -> BrokenDependencyError | None:
        """Import a module; one whose packages are broken takes the others with it no more than it must."""
        before = dict(self._items)
        try:
            importlib.import_module(name)
        except TDeployError:
            raise
        except Exception as error:  # whatever a broken library raises
            self._items = before  # what it registered before it failed is half of it
            broken = BrokenDependencyError(f"The {self.kind} in '{name}'", error)
            broken.__cause__ = error
            if self._broken is None:
                _log.warning("%s", broken)
            return broken
        return None
