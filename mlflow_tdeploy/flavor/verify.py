"""``verify_model``: variants of a logged model, checked on this host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.flavor.extend import update_tags
from mlflow_tdeploy.flavor.source import BundleRequest, Progress
from mlflow_tdeploy.registry_io import append_evidence, locate, mlflow_errors, open_records
from mlflow_tdeploy.store.staging import workspace


@mlflow_errors()
def verify_model(
    model_uri: str,
    variants: Iterable[str] | None = None,
    *,
    verify_with: Any = None,
    progress: Progress | None = None,
) -> dict[str, Evidence]:
    """Check variants of a logged or registered model on this host, and add what was found to that very version.

    The newest verdict counts, wherever it was found: a variant that fails here serves nowhere any more, one of lower
    precision on no such device (CPU or GPU) any more, and an engine that was built without a GPU serves once a host
    with one has verified it.

    Args:
        model_uri: The model, see :func:`extend_model`.
        variants: Ids of variants; all that this host can open when None.
        verify_with: Data to check with, see :func:`save_model`.
        progress: Called with each finished step.

    Returns:
        The new record of each variant; ``passed`` says whether the model's budget holds.

    Raises:
        MlflowException: There is no such model or variant, or this host cannot open it.
    """
    from mlflow_tdeploy.build.recheck import recheck_variants

    request = BundleRequest(verify_with=verify_with)
    location = locate(model_uri)
    bundle, fetch = open_records(location)
    with workspace() as folder:
        found = recheck_variants(bundle, variants, folder, request.options, fetch=fetch, progress=progress)
    append_evidence(location, found)
    update_tags(location)
    return {record.variant: record for record in found if record.kind == "accuracy"}
