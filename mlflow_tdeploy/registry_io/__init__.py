"""The one seam to MLflow's stores: a model URI to its bundle, one variant down, one variant up, tags and metrics.

Everything else in this package works on folders.
"""

from __future__ import annotations

from mlflow_tdeploy.registry_io.append import append, append_evidence
from mlflow_tdeploy.registry_io.errors import mlflow_errors
from mlflow_tdeploy.registry_io.fetch import fetch_variant, open_records
from mlflow_tdeploy.registry_io.index import describe, tag_logged_model
from mlflow_tdeploy.registry_io.location import SCHEME, Location, is_model_id, locate, registered_version
from mlflow_tdeploy.registry_io.searches import searches

__all__ = [
    "SCHEME",
    "Location",
    "append",
    "append_evidence",
    "describe",
    "fetch_variant",
    "is_model_id",
    "locate",
    "mlflow_errors",
    "open_records",
    "registered_version",
    "searches",
    "tag_logged_model",
]
