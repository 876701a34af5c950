"""The URI scheme ``tdeploy:/name@alias``: a model version with only the variant that this host serves.

``models:/`` downloads every variant. MLflow finds this class through an entry point, so
``mlflow models serve -m tdeploy:/name@alias`` and ``mlflow.pyfunc.load_model("tdeploy:/name/7")`` work.
"""

from __future__ import annotations

import shutil
import tempfile
import urllib.parse
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.flavor.config import policy_of
from mlflow_tdeploy.flavor.origin import write_origin
from mlflow_tdeploy.registry_io import (
    SCHEME,
    Location,
    is_model_id,
    locate,
    mlflow_errors,
    open_records,
)
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.store.bundle import Bundle


class TDeployArtifactRepository(ArtifactRepository):
    """Reads a registered model version; MLflow passes the part of the URI before the last ``/``, then the rest."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self._locations: dict[str, Location] = {}

    def download_artifacts(self, artifact_path: str | None, dst_path: str | None = None) -> str:
        """Download the model with the variant chosen for this host, or one file or folder of it.

        Args:
            artifact_path: Rest of the URI.
            dst_path: Existing folder to download to; by default a folder of this host's cache.

        Returns:
            The local path.
        """
        with mlflow_errors():
            location, inner = self._resolve(artifact_path)
            if inner:
                return str(location.repository.download_artifacts(inner, dst_path))
            bundle, fetch = open_records(location, Path(dst_path) if dst_path is not None else None)
            if fetch is not None:
                fetch(_choose(bundle))
                write_origin(bundle, location)
            return str(bundle.root.parent)

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """List what is directly below a path of the model, every variant's files included."""
        with mlflow_errors():
            location, inner = self._resolve(path)
            outer = (path or "").removesuffix(inner).rstrip("/")  # MLflow expects paths below the repository's own URI
            found = location.repository.list_artifacts(inner or None)
            return [
                FileInfo(f"{outer}/{entry.path}" if outer else entry.path, entry.is_dir, entry.file_size)
                for entry in found
            ]

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        with mlflow_errors(), tempfile.TemporaryDirectory() as folder:
            location, inner = self._resolve(remote_file_path)
            shutil.move(location.repository.download_artifacts(inner, folder), local_path)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Refuse: use ``mlflow.tdeploy.extend_model`` to add a variant."""
        self._refuse()

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Refuse: use ``mlflow.tdeploy.extend_model`` to add a variant."""
        self._refuse()

    def _refuse(self) -> None:
        raise MlflowException.invalid_parameter_value(
            f"'{self.artifact_uri}' is read-only. Add a variant with mlflow.tdeploy.extend_model, or log a new version."
        )

    def _resolve(self, path: str | None) -> tuple[Location, str]:
        version, inner = split_uri(self.artifact_uri.rstrip("/") + f"/{path or ''}")
        if version not in self._locations:
            client = MlflowClient(self.tracking_uri, self.registry_uri)
            self._locations[version] = locate(version, client)
        return self._locations[version], inner


def split_uri(uri: str) -> tuple[str, str]:
    """Split ``tdeploy:/name/7/MLmodel`` into the version's URI and the path inside the model.

    Raises:
        InvalidInputError: The URI names no version.
    """
    parts = [part for part in urllib.parse.urlparse(uri).path.split("/") if part]
    width = 1 if parts and ("@" in parts[0] or is_model_id(parts[0])) else 2
    if len(parts) < width:
        raise InvalidInputError(
            f"'{uri}' names no model version. Write {SCHEME}:/name@alias, {SCHEME}:/name/7 or {SCHEME}:/m-<id>."
        )
    return f"{SCHEME}:/" + "/".join(parts[:width]), "/".join(parts[width:])


def _choose(bundle: Bundle) -> Variant:
    decision = decide_bundle(bundle, probe.host(), policy_of(bundle))
    if decision.chosen is None:
        raise decision.none_left()
    return bundle.variants[decision.chosen.variant]
