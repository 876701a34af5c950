"""What a model version would be on a server: looked at, with nothing brought and nothing asked of the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow.exceptions import MlflowException

from mlflow_tdeploy.core.errors import NotFoundError, TDeployError, first_line
from mlflow_tdeploy.deploy.choose import choose, served
from mlflow_tdeploy.deploy.plan import Settings, key_of
from mlflow_tdeploy.deploy.settings import DeploySettings, as_record
from mlflow_tdeploy.promotion.actual import Observed
from mlflow_tdeploy.promotion.compatible import Asked
from mlflow_tdeploy.promotion.registry import Desired
from mlflow_tdeploy.registry_io import describe, locate, mlflow_errors, open_records
from mlflow_tdeploy.triton.bundle_version import BundleVersion


@dataclass(frozen=True)
class Candidate:
    """A version as it would be deployed.

    Attributes:
        uri: The model version.
        version: Its number.
        variant: Which variant of it; empty where that is not known.
        digest: Of that variant's files.
        key: What it is made of: the same key, nothing to do.
        size: Bytes of that variant.
        asked: What it takes and answers; None for what is no bundle.
        metrics: Its variant's evidence, by name.
        decision: Which variant, and why no other.
        refused: Why it cannot be deployed; empty where it can.
    """

    uri: str
    version: int
    variant: str = ""
    digest: str = ""
    key: str = ""
    size: int = 0
    asked: Asked | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    decision: str = ""
    refused: str = ""


def candidate(wanted: Desired, version: int, observed: Observed) -> Candidate:
    """Return what a version would be on a server whose host is known from what is deployed, or is like this one.

    Args:
        wanted: What should answer there.
        version: Its version.
        observed: What does.
    """
    uri = wanted.uri
    try:
        with mlflow_errors():
            return _looked_at(wanted, version, observed)
    except NotFoundError as error:
        return Candidate(uri, version, refused=f"it holds no bundle: {first_line(error)}")
    except (TDeployError, MlflowException) as error:
        return Candidate(uri, version, refused=first_line(error))


def described(uri: str, variant: str) -> tuple[Asked, dict[str, float]]:
    """Return what a model version takes and answers, and the evidence of one of its variants.

    Raises:
        TDeployError: It is not there any more, or holds no bundle.
        MlflowException: The registry does not know it.
    """
    bundle, _ = open_records(locate(uri))
    manifest, (_, metrics) = bundle.manifest, describe(bundle)
    own = {name.removeprefix(f"{variant}."): one for name, one in metrics.items() if name.startswith(f"{variant}.")}
    return Asked(manifest.task, manifest.task_config, manifest.signature), own


def _looked_at(wanted: Desired, version: int, observed: Observed) -> Candidate:
    settings = DeploySettings.of(wanted.rule.serve)
    open_records(locate(wanted.uri))  # what holds none would be brought here by what comes now
    what = choose(wanted.uri, settings, name=wanted.name, host=lambda: observed.host, fetch=False)
    if not isinstance(what, BundleVersion):
        raise NotFoundError(f"'{wanted.uri}' is no model of the flavor tdeploy")
    options = served(settings, what, observed.described or None)
    record = as_record(dict(wanted.rule.serve))
    how = Settings(settings.keep, settings.keep_loaded, settings.grace, options, record)
    asked, metrics = described(wanted.uri, what.variant.id)
    size = sum(file.size for file in what.variant.files)
    decision = what.about.get("decision", "")
    return Candidate(
        wanted.uri, version, what.variant.id, what.variant.digest, key_of(what, how), size, asked, metrics, decision
    )
