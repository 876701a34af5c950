"""From a model URI to the folder or artifact store that its files are in."""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from mlflow_tdeploy.core.errors import MissingDependencyError, NotFoundError, first_line
from mlflow_tdeploy.store.layout import ROOT

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

SCHEME = "tdeploy"
_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
_MAX_HOPS = 16


@dataclass(frozen=True)
class Location:
    """Where the files of a model really are.

    Attributes:
        uri: What the user wrote, but for passwords.
        root: URI or path of the model directory in its artifact store: aliases and versions resolved.
        model_id: Id of the logged model, where there is one.
        tracking_uri: MLflow's tracking server that knows it; None for the current one.
    """

    uri: str
    root: str
    model_id: str | None = None
    tracking_uri: str | None = None

    def said(self, error: BaseException) -> str:
        """Return what an error says in one line, with the address in it as others may read it."""
        text, user = first_line(error).replace(self.root, self.uri), urllib.parse.urlsplit(self.root).netloc
        user = user.rpartition("@")[0]
        secret = user.partition(":")[2] or user
        return text.replace(f"{user}@", "").replace(secret, "…") if secret and self.root != self.uri else text

    @property
    def local(self) -> Path | None:
        """The directory, where the artifact store is a folder of this host."""
        scheme = urllib.parse.urlparse(self.root).scheme
        if scheme == "":
            return Path(self.root)  # as it is written: a folder's name may hold % and #
        return Path(local_file_uri_to_path(self.root)) if scheme == "file" else None

    @functools.cached_property
    def repository(self) -> ArtifactRepository:
        """MLflow's access to the artifact store, rooted at the model directory.

        Raises:
            MissingDependencyError: A package that this kind of store needs is not installed.
        """
        try:
            return get_artifact_repository(self.root, tracking_uri=self.tracking_uri)
        except ModuleNotFoundError as error:
            name = str(error.name)
            raise MissingDependencyError(name, f"The store of '{self.uri}'", f"pip install {name}") from error

    def download(self, path: str, folder: Path | str) -> Path:
        """Download one file, without asking first whether it is a folder as ``download_artifacts`` does.

        Args:
            path: The file, below the model directory.
            folder: An existing folder for it.
        """
        target = Path(folder) / path.rpartition("/")[2]
        self.repository._download_file(path, str(target))
        if not target.is_file():  # Unity Catalog's repositories only have the other one, and say nothing
            return Path(self.repository.download_artifacts(path, str(folder)))
        return target


def without_password(uri: str) -> str:
    """Return a URI as others may read it: without a password, and of a web address without user and query."""
    parts = urllib.parse.urlsplit(uri)
    user, at, where = parts.netloc.rpartition("@")
    if parts.scheme in ("http", "https") and (user or parts.query):
        return parts._replace(netloc=where, query="").geturl()
    return parts._replace(netloc=f"{user.partition(':')[0]}{at}{where}").geturl() if ":" in user else uri


def locate(uri: str | Path, client: MlflowClient | None = None, *, source: str = "") -> Location:
    """Find the files that a model URI stands for; downloads nothing.

    Args:
        uri: ``models:/name/1``, ``models:/name@alias``, ``models:/m-…``, ``runs:/…``, the same behind ``tdeploy:``,
            a folder, a ``file:`` URI, or a URI of any artifact store that MLflow knows.
        client: Whose tracking server and registry to ask; the current ones by default.
        source: What the registry says that a registered version is from, where that is known: it is not asked again.

    Raises:
        NotFoundError: There is no such folder or logged model.
        MlflowException: MLflow's own stores do not know the name, version, alias or run.
    """
    text, scheme = str(uri), urllib.parse.urlparse(str(uri)).scheme
    if scheme not in (SCHEME, "models", "runs"):
        return _locate_plain(text, client)  # without a client: making one may create MLflow's default database here
    client = client or MlflowClient()
    if scheme == SCHEME:
        return replace(_locate_version("models" + text[len(SCHEME) :], client), uri=text)
    if scheme == "models":
        return _locate_version(text, client, source)
    return _locate_in_run(text, client)


def _locate_plain(text: str, client: MlflowClient | None) -> Location:
    tracking_uri = client.tracking_uri if client is not None else mlflow.get_tracking_uri()
    location = Location(without_password(text), text, None, tracking_uri)
    if location.local is not None and not location.local.is_dir():
        why = "that is a file, not a model's folder" if location.local.exists() else "that folder does not exist"
        raise NotFoundError(f"No model at '{text}': {why}.")
    return replace(location, model_id=_model_id_of(location, client))


def _locate_version(uri: str, client: MlflowClient, source: str = "") -> Location:
    """Follow a version's sources: a copied version's source is another version, a logged model's is its id."""
    registry = str(client._registry_uri)
    # of another source the registry may say another address, to download from; some hide the source
    direct = urllib.parse.urlparse(source).scheme == "models" and not registry.startswith(("databricks", "uc:"))
    model_id, root = None, source if direct else uri
    for _ in range(_MAX_HOPS):
        parsed = _parse_models_uri(root)
        if parsed.model_id:
            model_id = parsed.model_id
            root = client.get_logged_model(model_id).artifact_location
        elif registry.startswith(("databricks", "uc:")):
            break  # these registries hide their storage: MLflow's own repository for models:/ reads it
        else:
            root = _version_source(client, parsed)
        if urllib.parse.urlparse(root).scheme == "runs":
            return replace(_locate_in_run(root, client), uri=uri)
        if urllib.parse.urlparse(root).scheme != "models":
            break
    location = Location(uri, root, model_id, client.tracking_uri)
    return location if model_id else replace(location, model_id=_model_id_of(location, client))


def _parse_models_uri(uri: str) -> Any:
    from mlflow.store.artifact.utils.models import _parse_model_uri

    return _parse_model_uri(uri)


def registered_version(uri: str, client: MlflowClient | None = None, *, known: bool = False) -> tuple[str, int] | None:
    """Return name and number of the registered version that a URI stands for; None for any other URI.

    Args:
        uri: Any URI.
        client: Whose registry to ask; the current one by default.
        known: It is known to be there: where the URI says a number, nobody is asked.

    Raises:
        NotFoundError: The registered model has no such version.
        MlflowException: MLflow's registry does not know the name, version or alias.
    """
    scheme, _, rest = str(uri).partition(":")
    if scheme not in (SCHEME, "models"):
        return None
    parsed = _parse_models_uri(f"models:{rest}")
    if parsed.model_id:
        return None
    if known and parsed.version:
        return str(parsed.name), int(parsed.version)
    version = _registered(client or MlflowClient(), parsed)
    return str(version.name), int(version.version)


def _registered(client: MlflowClient, parsed: Any) -> Any:
    if parsed.alias:
        return client.get_model_version_by_alias(parsed.name, parsed.alias)
    if parsed.version:
        return client.get_model_version(parsed.name, parsed.version)
    found = client.get_latest_versions(parsed.name, [parsed.stage] if parsed.stage else None)
    if not found:
        stage = f" in stage '{parsed.stage}'" if parsed.stage else ""
        raise NotFoundError(f"The registered model '{parsed.name}' has no version{stage}.")
    return max(found, key=lambda entry: int(entry.version))


def _version_source(client: MlflowClient, parsed: Any) -> str:
    version = _registered(client, parsed)
    if urllib.parse.urlparse(version.source or "").scheme == "models":
        return str(version.source)  # names the logged model, which a download URI does not
    return str(client.get_model_version_download_uri(version.name, version.version))


def _locate_in_run(uri: str, client: MlflowClient) -> Location:
    run_id, _, path = urllib.parse.urlparse(uri).path.lstrip("/").partition("/")
    name, _, rest = path.partition("/")
    run = client.get_run(run_id)
    if name and not rest and "'" not in name:
        found = client.search_logged_models(
            [run.info.experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{run_id}'", max_results=1
        )
        if found:
            return Location(uri, found[0].artifact_location, found[0].model_id, client.tracking_uri)
    return Location(uri, f"{run.info.artifact_uri.rstrip('/')}/{path}".rstrip("/"), None, client.tracking_uri)


def is_model_id(text: str) -> bool:
    """Tell whether a text is the id of a logged model."""
    return _MODEL_ID.fullmatch(text) is not None


def _model_id_of(location: Location, client: MlflowClient | None) -> str | None:
    """Return the id of the logged model whose files are these very ones; a copy's path may hold an id, too."""
    for model_id in dict.fromkeys(_MODEL_ID.findall(location.root)):
        if client is None and _is_missing_database(location.tracking_uri or ""):
            return None
        try:
            model = (client or MlflowClient(location.tracking_uri)).get_logged_model(model_id)
        except MlflowException:
            continue  # not known there
        if _places(location) & _places(Location("", model.artifact_location)):
            return model_id
    return None


def _places(location: Location) -> set[str]:
    """Return the folder, also where its part that is ours was named, in a form that can be compared."""
    root = location.root.rstrip("/") if location.local is None else os.path.realpath(location.local)
    return {root, root.removesuffix(f"/{ROOT}")}


def _is_missing_database(tracking_uri: str) -> bool:
    """Tell whether asking would create MLflow's database, as its default does in the current folder."""
    path = tracking_uri.removeprefix("sqlite:///")
    return path != tracking_uri and not os.path.exists(path)
