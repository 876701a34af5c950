"""Variants that exist, held against the model's reference once more: on another host, or with other data."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlflow_tdeploy.build.options import BuildOptions
from mlflow_tdeploy.build.parents import Here, open_reference, shaken_reference
from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.stage import Staged, runtime_for
from mlflow_tdeploy.build.workshop import Progress, Workshop
from mlflow_tdeploy.core.errors import InvalidInputError, NoVariantError, TDeployError
from mlflow_tdeploy.core.evidence import Evidence, after
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.thread_lock import one_at_a_time
from mlflow_tdeploy.core.variant import Variant
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.store.bundle import Bundle, Fetch

_log = logging.getLogger("mlflow_tdeploy")


@one_at_a_time()
def recheck_variants(
    bundle: Bundle,
    variant_ids: Iterable[str] | None,
    workdir: Path,
    options: BuildOptions | None = None,
    *,
    fetch: Fetch | None = None,
    progress: Progress | None = None,
) -> list[Evidence]:
    """Check variants of a bundle against its reference, on this host.

    Args:
        bundle: The bundle; it is only read.
        variant_ids: Which; all that this host can open when None.
        workdir: An empty folder.
        options: What to check with; the model's own budget holds.
        fetch: Brings a variant's files where the bundle was downloaded without them.
        progress: Told of every finished step.

    Returns:
        A record of accuracy per variant, and what an engine tells about itself.

    Raises:
        InvalidInputError: There is no such variant, it has no files, or it is the reference itself.
        NoVariantError: No runtime here opens a variant that was named, or any at all.
        BuildError: The reference cannot be opened: nothing else may stand in for it here, as verdicts count everywhere.
        TDeployError: None of the variants can be checked; of several, the others are, with a warning.
    """
    host, manifest = probe.host(), bundle.manifest
    variants = [_named(bundle, name, host) for name in dict.fromkeys(variant_ids)] if variant_ids is not None else None
    wanted = variants if variants is not None else _all(bundle, host)
    shop = Workshop(
        bundle.task(),
        manifest.budget,
        options or BuildOptions(),
        workdir,
        golden=bundle.golden(),
        progress=progress,
    )
    here = Here(bundle, fetch)
    with open_reference(bundle, here, stand_in=False) as (name, infer, weights):
        answers = shop.ask_reference(infer, weights, shaken_reference(bundle, name))
    found, failed = [], None
    for variant in wanted:
        try:
            here.get(variant.id)
            staged = Staged(variant, bundle.root, Graph(bundle.path(variant.entry), variant.precision))
            created = after(bundle.evidence(variant.id))
            records = shop.evidence(staged, shop.check(staged, answers), name)
            found += [replace(record, created=created) for record in records]
        except TDeployError as error:  # one damaged variant says nothing about the others
            _log.warning("Variant %s was not checked: %s", variant.id, error)
            failed = error
    if not found and failed is not None:
        raise failed
    return found


def _named(bundle: Bundle, variant_id: str, host: Fingerprint) -> Variant:
    variant = bundle.variants.get(variant_id)
    if variant is None:
        raise InvalidInputError(
            f"This model has no variant '{variant_id}'. It has: {', '.join(sorted(bundle.variants))}."
        )
    if variant_id == bundle.manifest.reference:
        raise InvalidInputError(f"'{variant_id}' is what the other variants are compared with.")
    if variant.dropped:
        raise InvalidInputError(f"The files of '{variant_id}' were not kept: there is nothing to check.")
    runtime_for(variant, host)  # raises, saying why
    return variant


def _all(bundle: Bundle, host: Fingerprint) -> list[Variant]:
    found, reasons = [], []
    for variant in bundle.variants.values():
        if variant.dropped or variant.id == bundle.manifest.reference:
            continue
        try:
            runtime_for(variant, host)
        except NoVariantError as error:
            reasons.append(str(error).rstrip("."))
            continue
        found.append(variant)
    if not found:
        raise NoVariantError("Nothing to check here. " + ("; ".join(reasons) or "The model has one variant only") + ".")
    return found
