"""What a model version would be on a server: looked at, with nothing brought and nothing asked of the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow_tdeploy.core.errors import NotFoundError, first_line
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.deploy.choose import choose, served
from mlflow_tdeploy.deploy.found import TDEPLOY, LoggedBundle
from mlflow_tdeploy.deploy.plan import Settings, key_of
from mlflow_tdeploy.deploy.settings import DeploySettings, as_record
from mlflow_tdeploy.promotion.actual import Observed, sum_of_manifest
from mlflow_tdeploy.promotion.compatible import Asked
from mlflow_tdeploy.promotion.records import FRESH_S, opened
from mlflow_tdeploy.promotion.registry import Desired
from mlflow_tdeploy.registry_io import Location, describe
from mlflow_tdeploy.store.bundle import Bundle
from mlflow_tdeploy.store.layout import MANIFEST, ROOT
from mlflow_tdeploy.triton.bundle_version import BundleVersion


@dataclass(frozen=True)
class Candidate:
    """A version as it would be deployed.

    Attributes:
        variant: Which variant of it; empty where that is not known.
        digest: Of that variant's files.
        key: What it is made of: the same key, nothing to do.
        size: Bytes of that variant.
        asked: What it takes and answers; None for what is no bundle.
        metrics: Its variant's evidence, by name.
        decision: Which variant, and why no other.
        refused: Why it cannot be deployed; empty where it can.
        manifest: What tells the model as it was logged from another one.
        digests: Of the files of each of its variants.
        incomplete: Which file of the variant is not in the artifact store as its record says; empty where all are.
    """

    variant: str = ""
    digest: str = ""
    key: str = ""
    size: int = 0
    asked: Asked | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    decision: str = ""
    refused: str = ""
    incomplete: str = ""
    manifest: str = ""
    digests: frozenset[str] = frozenset()

    def is_model(self, manifest: str, digest: str) -> bool:
        """Tell whether what lies in a repository is this very model: by its manifest there and its variant's files."""
        return manifest == self.manifest != "" and digest in self.digests

    def as_it_came(self, came: Mapping[str, Any], metrics: Mapping[str, float]) -> Candidate:
        """Return it as it lies in a repository, where it is not made anew.

        Args:
            came: What its graph says of itself there.
            metrics: The evidence of that variant.
        """
        variant, digest, key = (str(came.get(name, "")) for name in ("variant", "digest", "key"))
        return replace(
            self, variant=variant, digest=digest, key=key, size=0, metrics=metrics, incomplete="",
            decision=f"{variant} (as it came)",
        )  # fmt: skip


def candidate(wanted: Desired, observed: Observed, within: float = FRESH_S) -> Candidate:
    """Return what a version would be on a server whose host is known from what is deployed, or is like this one.

    Args:
        wanted: What should answer there.
        observed: What does.
        within: Seconds for which its records are good enough, see :func:`opened`.
    """
    try:
        return _looked_at(wanted, observed, within)
    except Exception as error:  # whatever is wrong with this version stops no other
        return Candidate(refused=first_line(error))


def evidence(uri: str, variant: str) -> dict[str, float]:
    """Return the evidence of one of a model version's variants.

    Raises:
        TDeployError: It is not there any more, or holds no bundle.
        MlflowException: The registry does not know it.
    """
    return _evidence(opened(uri, within=math.inf).bundle, variant)


def _looked_at(wanted: Desired, observed: Observed, within: float) -> Candidate:
    settings = DeploySettings.of(wanted.rule.serve)
    try:
        found = opened(wanted.uri, within, wanted.updated, wanted.source)
    except NotFoundError as error:
        raise NotFoundError(
            f"{first_line(error)} Plans are made of models that this package has logged; others go to a server by "
            f"mlflow deployments create -t tdeploy."
        ) from error
    what = choose(
        wanted.uri, settings, name=wanted.name, host=lambda: observed.host, look=True,
        known=LoggedBundle(TDEPLOY, found.bundle),
    )  # fmt: skip
    assert isinstance(what, BundleVersion)
    record = as_record(wanted.rule.serve)
    options = served(settings, what, observed.described or None)
    how = Settings(settings.keep, settings.keep_loaded, settings.grace, options, record)
    manifest = what.bundle.manifest
    return Candidate(
        what.variant.id,
        what.variant.digest,
        key_of(what, how),
        sum(file.size for file in what.variant.files),
        Asked(manifest.task, manifest.task_config, manifest.signature),
        _evidence(what.bundle, what.variant.id),
        what.about["decision"],
        incomplete=_incomplete(found.location, what.variant),
        manifest=sum_of_manifest((what.bundle.root / MANIFEST).read_bytes()),
        digests=digests_of(what.bundle),
    )


def digests_of(bundle: Bundle) -> frozenset[str]:
    """Return what tells the files of each of a bundle's variants from others."""
    return frozenset(one.digest for one in bundle.variants.values() if one.files)


def is_model(bundle: Bundle, manifest: str, digest: str) -> bool:
    """Tell whether what lies in a repository is a bundle's model.

    Args:
        bundle: The bundle.
        manifest: The sum of its manifest there, see :func:`sum_of_manifest`.
        digest: Of its variant's files there.
    """
    return manifest == sum_of_manifest((bundle.root / MANIFEST).read_bytes()) and digest in digests_of(bundle)


def _incomplete(location: Location, variant: Variant) -> str:
    """Return which file of a variant is gone or of another size; what is in it is hashed when it is brought."""
    folders = dict.fromkeys(record.path.rpartition("/")[0] for record in variant.files)
    try:
        there = {
            entry.path: entry.file_size
            for folder in folders
            for entry in location.repository.list_artifacts(f"{ROOT}/{folder}")
        }
    except Exception as error:  # as the store says
        return f"The files of '{variant.id}' cannot be listed: {location.said(error)}"
    for record in variant.files:
        size = there.get(f"{ROOT}/{record.path}", -1)
        if size is not None and int(size) != record.size:
            return f"'{record.path}' of '{variant.id}' is {'gone' if int(size) < 0 else 'damaged'}: log it again."
    return ""


def _evidence(bundle: Bundle, variant: str) -> dict[str, float]:
    _, metrics = describe(bundle)
    return {name.removeprefix(f"{variant}."): one for name, one in metrics.items() if name.startswith(f"{variant}.")}
