"""A version of a model as Triton models: what it is loaded as once, and the stable name in front of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow_tdeploy.store.disk import storage_errors
from mlflow_tdeploy.store.staging import staged_directory
from mlflow_tdeploy.triton.names import CONFIG, check_name, check_version
from mlflow_tdeploy.triton.options import TritonOptions


@dataclass(frozen=True)
class Deployable(ABC):
    """A version that may be rendered.

    Attributes:
        name: The stable name.
        version: Its number.
        about: What it is and where it is from, for its configuration.
    """

    name: str
    version: int
    about: Mapping[str, str]

    @property
    def graph_name(self) -> str:
        """Name of the Triton model that is this version's graph."""
        return f"{self.name}.v{self.version}"

    @abstractmethod
    def made_of(self, options: TritonOptions) -> str:
        """Return what the version's files and configuration follow from, whatever its name and number are."""

    @abstractmethod
    def write_graph(self, folder: Path, options: TritonOptions) -> None:
        """Write the Triton model that is loaded once, to a new folder.

        Raises:
            NoVariantError: Triton does not open it.
            IntegrityError: A file of it was changed.
        """

    @abstractmethod
    def write_front(self, folder: Path, options: TritonOptions) -> None:
        """Write what the version adds to the stable name's model, all but the configuration, which says the route.

        Below the version's number there is :data:`~mlflow_tdeploy.triton.names.ROUTED` with :meth:`route_text`.
        """

    @abstractmethod
    def route_text(self, options: TritonOptions) -> str:
        """Return the configuration of the stable name that has requests answered by this version."""


def render(what: Deployable, out: Path, options: TritonOptions | None = None) -> None:
    """Write a version and the stable name in front of it as a Triton repository.

    Files of this package's cache are hard links where that is possible: of a model from a remote store, a repository on
    the same file system takes no room. Files of anybody else are copied, as they may be changed.

    Args:
        what: The version.
        out: Folder to write; new or empty.
        options: How it is served.

    Raises:
        InvalidInputError: A name, version or option cannot be used.
        NoVariantError: Triton does not open the variant.
        IntegrityError: A file of it was changed.
        ConflictError: The folder is not empty.
        StorageError: The disk is full or refuses.
    """
    options = options or TritonOptions()
    check_name(what.name)
    check_version(what.version)
    with staged_directory(out) as fresh, storage_errors(f"write '{out}'"):
        what.write_graph(fresh / what.graph_name, options)
        what.write_front(fresh / what.name, options)
        (fresh / what.name / CONFIG).write_text(what.route_text(options))
