"""From a model's URI to a version that can be rendered: which variant goes to a server, and its files."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.records import to_plain
from mlflow_tdeploy.deploy.found import LoggedBundle, find
from mlflow_tdeploy.deploy.settings import SHAPES, DeploySettings
from mlflow_tdeploy.registry_io import locate, registered_version
from mlflow_tdeploy.registry_io.location import without_password
from mlflow_tdeploy.runtime.base import RUNTIMES
from mlflow_tdeploy.runtime.decision import Decision
from mlflow_tdeploy.runtime.select import decide_bundle
from mlflow_tdeploy.runtime.sessions import check_encoding
from mlflow_tdeploy.store.hashing import HashCache
from mlflow_tdeploy.triton.bundle_version import BundleVersion
from mlflow_tdeploy.triton.library import check_packages
from mlflow_tdeploy.triton.names import check_name, check_version
from mlflow_tdeploy.triton.options import TritonOptions
from mlflow_tdeploy.triton.ready_version import ReadyVersion
from mlflow_tdeploy.triton.repository import Deployable

#: Copies of a graph on a CPU where nobody says so: one per processor, up to these.
_MOST_INSTANCES = 2


def choose(
    uri: str,
    settings: DeploySettings,
    *,
    name: str = "",
    version: int = 0,
    flavor: str = "",
    host: Callable[[], Fingerprint | None] = lambda: None,
    known: LoggedBundle | None = None,
    look: bool = False,
) -> Deployable:
    """Return the version that a URI stands for, of a bundle with the variant that suits a server; its files are here.

    Args:
        uri: The model, see :func:`mlflow_tdeploy.extend_model`.
        settings: What is said about the server and the choice.
        name: Name to deploy under; the registered model's otherwise.
        version: Number to use where neither the settings nor the URI say one.
        flavor: What to take the model for, see :mod:`mlflow_tdeploy.deploy.found`; empty for what it is.
        host: Returns what the server says that its host is, None for one like this; asked where there is a choice.
        known: The bundle that the URI stands for, where somebody has its records. Where nothing brings its files the
            version can be looked at and not rendered.
        look: It is only looked at: golden requests are not made tokens of, which would take a tokenizer's loading.

    Raises:
        InvalidInputError: Neither says a name, or the settings contradict the model.
        NotFoundError: There is nothing that can be deployed.
        NoVariantError: No variant serves there.
        IntegrityError: Assets are damaged, or golden requests become other tokens with the library that is here.
    """
    registered = registered_version(uri, known=known is not None)
    wanted = check_name(name or plain_name(registered[0] if registered else ""))
    number = check_version(settings.version or (registered[1] if registered else version or 1))
    # an alias is followed once: it may be moved meanwhile
    pinned = f"models:/{registered[0]}/{registered[1]}" if registered else str(uri)
    if known is not None:
        about = {"model_uri": without_password(pinned), "flavor": known.flavor}
        return _of_bundle(known, settings, host(), wanted, number, about, look=look)
    location = locate(pinned)
    if location.local is not None and not urllib.parse.urlsplit(pinned).scheme:
        pinned = str(location.local.absolute())  # whoever comes back to it may be somewhere else
    found = find(location, flavor, settings.shapes, insist=SHAPES in settings.now)
    about = {"model_uri": without_password(pinned), "flavor": found.flavor}
    if isinstance(found, LoggedBundle):
        return _of_bundle(found, settings, host(), wanted, number, about, look=look)
    about |= {"variant": "triton", "decision": "triton (a Triton model, as it is)"}
    return ReadyVersion(wanted, number, about, found.folder)


def _of_bundle(
    found: LoggedBundle,
    settings: DeploySettings,
    reported: Fingerprint | None,
    name: str,
    number: int,
    about: Mapping[str, str],
    *,
    look: bool = False,
) -> BundleVersion:
    bundle, host = found.bundle, settings.host(reported)
    budget = Budget.of(settings.budget) if settings.budget else None
    decision = decide_bundle(bundle, host, settings.policy(bundle), triton=True, budget=budget)
    chosen = decision.chosen
    if chosen is None:
        raise decision.none_left()
    variant, task = bundle.variants[chosen.variant], bundle.task(HashCache())
    check_packages(task.packages)
    if found.fetch is not None:
        found.fetch(variant)
    if not look:
        check_encoding(task, bundle.golden())
    more = {"variant": variant.id, "decision": _brief(decision), "host": json.dumps(to_plain(host))}
    cores = host.cores if settings.cores or reported else 0  # else they are those of whoever deploys
    return BundleVersion(name, number, {**about, **more}, bundle, variant, RUNTIMES.get(chosen.runtime), host, cores)


def served(settings: DeploySettings, what: Deployable, before: Mapping[str, Any] | None = None) -> TritonOptions:
    """Return how Triton serves a version: as the user says, else with as many copies as suit the server.

    Args:
        settings: What the user says.
        what: The version.
        before: What is deployed: the same variant keeps its copies, whichever host it is updated from.
    """
    if not isinstance(what, BundleVersion):
        return settings.options if settings.options_said() else TritonOptions()
    suits = 1 if what.runtime.tier == 0 else max(1, min(_MOST_INSTANCES, what.host.cores))
    if before and before.get("variant") == what.variant.id and not settings.cores:
        suits = int(before.get("instances") or suits)
    options = replace(settings.options, instances=settings.options.instances or suits)
    return _as_far_as_it_can(what, options, settings.now)


def _as_far_as_it_can(what: BundleVersion, options: TritonOptions, now: Collection[str]) -> TritonOptions:
    """Return options of which those that were said of another model count only as far as this one goes."""
    rows = what.rows_dim(options)
    most = what.bundle.manifest.signature.dim(rows).max if rows else 0
    if "max_batch_size" not in now:
        options = replace(options, max_batch_size=min(options.max_batch_size, most))
    if "preferred_batch_sizes" not in now:
        fit = tuple(size for size in options.preferred_batch_sizes if size <= (options.max_batch_size or most))
        options = replace(options, preferred_batch_sizes=fit)
    return options


def plain_name(name: str) -> str:
    """Return a registered model's name as a folder's."""
    if not name:
        raise InvalidInputError("Give the deployment a name: this URI is of no registered model.")
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _brief(decision: Decision) -> str:
    """Say why in one line."""
    chosen = decision.chosen
    others = [f"{one.variant}: {one.reason}" for one in decision.candidates if chosen and one.variant != chosen.variant]
    why = f"{chosen.variant} ({chosen.reason})" if chosen else ""
    return "; ".join([why, *dict.fromkeys(others)])[:1000]
