"""What a model is: written once, when it is logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_tdeploy.core.budget import Budget
from mlflow_tdeploy.core.records import check_version, from_json
from mlflow_tdeploy.core.tensors import Signature
from mlflow_tdeploy.core.variant import FileRecord, check_variant_id

#: Version of the manifest's form. Variants and evidence have their own: they are added later, by other versions.
SCHEMA_VERSION = 1
#: Names beside each other, in a bundle and in the folder of a deployed version.
MANIFEST, ASSETS = "manifest.json", "assets"


@dataclass(frozen=True)
class SourceRecord:
    """Where the model came from.

    Attributes:
        kind: ``transformers``, ``sentence-transformers``, ``torch`` or ``onnx``.
        name: Hub id, folder name or class.
        revision: Commit of the hub repository, when it is known.
        architecture: Class name of the model.
    """

    kind: str
    name: str
    revision: str | None = None
    architecture: str = ""


@dataclass(frozen=True)
class Manifest:
    """The bundle's description.

    Attributes:
        schema_version: Version of the record format.
        task: Name of a task in :mod:`mlflow_tdeploy.core.tasks`.
        task_config: The task's own settings (labels, tokenizer settings, …), JSON values only.
        source: Where the model came from.
        signature: Tensors and dimensions of every variant's graph.
        budget: How far a variant may be from the reference.
        reference: Id of the variant that evidence compares with.
        assets: Tokenizer, labels and the like, below ``assets/``.
        golden: The golden requests' files, below ``golden/``.
        skipped: Why a variant that was wanted could not be made when the model was logged, by id.
        tried: Records of the graphs that were tried for a variant where none was within the budget, by its id.
        created: UTC time in ISO format.
        made_with: Versions of the packages that logged it.
    """

    schema_version: int
    task: str
    task_config: Mapping[str, Any]
    source: SourceRecord
    signature: Signature
    budget: Budget
    reference: str
    assets: tuple[FileRecord, ...] = ()
    golden: tuple[FileRecord, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    tried: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    created: str = ""
    made_with: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_version(self.schema_version)
        for variant_id in (self.reference, *self.skipped, *self.tried):
            check_variant_id(variant_id)

    @classmethod
    def read(cls, text: str | bytes, where: str = "manifest.json") -> Manifest:
        """Parse a manifest.

        Raises:
            SchemaVersionError: A newer version of this package wrote it.
            ManifestError: It is damaged.
        """
        return from_json(cls, text, where, SCHEMA_VERSION)
