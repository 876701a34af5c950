"""Reading a bundle: records checked, paths safe, files hashed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from mlflow_tdeploy.core import golden
from mlflow_tdeploy.core.errors import IntegrityError, ManifestError, NotFoundError, TDeployError
from mlflow_tdeploy.core.evidence import Evidence
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.manifest import Manifest
from mlflow_tdeploy.core.records import from_json
from mlflow_tdeploy.core.variant import FileRecord, Variant, check_variant_id
from mlflow_tdeploy.store.hashing import HashCache, list_tree, verify_file
from mlflow_tdeploy.store.layout import EVIDENCE, GOLDEN, MANIFEST, ROOT, VARIANTS, safe_path

R = TypeVar("R", Variant, Evidence)


class Bundle:
    """The bundle in a folder. Records are read once; :meth:`reload` reads them again.

    Nothing outside :attr:`root` is ever read, nothing whose name starts with a dot (work in progress
    of a writer), and no file of a variant that has no record.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self._variants: dict[str, Variant] | None = None
        self._evidence: dict[str, tuple[Evidence, ...]] = {}

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open the bundle in a folder.

        Args:
            path: An MLflow model directory or its ``tdeploy`` folder.

        Raises:
            NotFoundError: There is no bundle.
            SchemaVersionError: A newer version of this package wrote it.
            ManifestError: Its manifest is damaged.
        """
        for root in (Path(path) / ROOT, Path(path)):
            if os.path.lexists(root / MANIFEST):
                return cls(root, _read_manifest(root))
        why = "that folder holds none" if Path(path).is_dir() else "that folder does not exist"
        raise NotFoundError(
            f"No bundle at '{path}': {why}. Expected an MLflow model directory with '{ROOT}/{MANIFEST}', as "
            f"mlflow.tdeploy.save_model writes it; for a model in a registry pass its URI to mlflow.tdeploy.load_model."
        )

    @property
    def variants(self) -> dict[str, Variant]:
        """Every variant by id, those over budget included.

        Raises:
            ManifestError: A record is damaged; the message names its file.
        """
        if self._variants is None:
            records = (self._read(Variant, f"{VARIANTS}/{name}") for name in _json_files(self.path(VARIANTS)))
            self._variants = {record.id: record for record in records}
        return self._variants

    def evidence(self, variant_id: str) -> tuple[Evidence, ...]:
        """Return every measurement of a variant's own files, oldest first; empty where there is none.

        What was measured on other files is left out: see :meth:`Evidence.about`.

        Raises:
            ManifestError: A record is damaged; the message names its file.
        """
        folder = f"{EVIDENCE}/{check_variant_id(variant_id)}"
        if variant_id not in self._evidence:
            names = _json_files(self.path(folder))
            found = (self._read(Evidence, f"{folder}/{name}") for name in names)
            variant = self.variants.get(variant_id)
            self._evidence[variant_id] = tuple(item for item in found if variant is None or item.about(variant))
        return self._evidence[variant_id]

    def record_paths(self) -> list[str]:
        """Return the path of every record, the manifest last: without it there is no bundle."""
        folders = [VARIANTS, *(f"{EVIDENCE}/{variant_id}" for variant_id in self.variants)]
        return [*(f"{folder}/{name}" for folder in folders for name in _json_files(self.path(folder))), MANIFEST]

    def path(self, relative: str) -> Path:
        """Return the file that a recorded path names.

        Raises:
            InvalidInputError: The path is not a plain relative one.
            IntegrityError: It leads out of the bundle.
        """
        return safe_path(self.root, relative)

    def present(self, variant: Variant) -> bool:
        """Tell whether all files of a variant are here with the right size; hashes nothing and never raises."""
        try:
            return bool(variant.files) and all(
                self.path(record.path).stat().st_size == record.size for record in variant.files
            )
        except (OSError, TDeployError):
            return False

    def verify(self, variant: Variant, cache: HashCache | None = None) -> None:
        """Check every file of a variant; one without files (over budget) has nothing to check.

        Args:
            variant: A variant of this bundle.
            cache: Digests remembered on this host; None hashes everything.

        Raises:
            IntegrityError: A file is missing, truncated or changed, what the runtime would open is not
                recorded, or its folder holds files that are not recorded.
        """
        self._verify_files(variant.files, cache)
        recorded = {record.path for record in variant.files}
        if not variant.files or variant.entry in recorded:
            return
        if not any(path.startswith(f"{variant.entry}/") for path in recorded):
            raise IntegrityError(f"Variant '{variant.id}': its entry '{variant.entry}' is none of its recorded files.")
        # Whoever opens a folder reads what lies in it, so a planted file (a pickle, code) counts as a change.
        planted = [path for path in list_tree(self.root, variant.entry) if path not in recorded]
        if planted := [path for path in planted if not _is_hidden(path)]:
            raise IntegrityError(
                f"Variant '{variant.id}': '{planted[0]}' lies in its folder and is not recorded. Remove the file."
            )

    def verify_assets(self, cache: HashCache | None = None) -> None:
        """Check the tokenizer and the other assets.

        Raises:
            IntegrityError: One is missing, truncated or changed.
        """
        self._verify_files(self.manifest.assets, cache)

    def golden(self, cache: HashCache | None = None) -> tuple[GoldenRequest, ...]:
        """Return the golden requests, none if the model was logged without.

        Raises:
            IntegrityError: Their files are missing, truncated or changed.
            ManifestError: They cannot be read.
        """
        if not self.manifest.golden:
            return ()
        self._verify_files(self.manifest.golden, cache)
        by_suffix = {Path(record.path).suffix: record.path for record in self.manifest.golden}
        if not {".json", ".npz"} <= set(by_suffix):
            raise ManifestError(f"{MANIFEST}: golden requests are a .json and a .npz file below '{GOLDEN}'.")
        return golden.load(*(self.path(by_suffix[suffix]).read_bytes() for suffix in (".json", ".npz")))

    def reload(self) -> None:
        """Read the records again: another process may have added some."""
        self.manifest = _read_manifest(self.root)
        self._variants = None
        self._evidence = {}

    def _verify_files(self, records: tuple[FileRecord, ...], cache: HashCache | None) -> None:
        for record in records:
            verify_file(self.path(record.path), record, cache)

    def _read(self, cls: type[R], relative: str) -> R:
        record = from_json(cls, _read_bytes(self.root, relative), relative)
        named, stored = Path(relative), record.id if isinstance(record, Variant) else record.variant
        expected = named.stem if isinstance(record, Variant) else named.parent.name
        if stored != expected:
            raise ManifestError(f"{relative}: is about the variant '{stored}', its name says '{expected}'.")
        return record


def _read_manifest(root: Path) -> Manifest:
    return Manifest.read(_read_bytes(root, MANIFEST), MANIFEST)


def _read_bytes(root: Path, relative: str) -> bytes:
    try:
        return safe_path(root, relative).read_bytes()
    except OSError as error:
        raise IntegrityError(f"'{root / relative}' cannot be read ({error.strerror}). Download it again.") from error


def _json_files(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise IntegrityError(f"The folder '{folder}' cannot be read ({error.strerror}).") from error
    return sorted(name for name in names if name.endswith(".json") and not name.startswith("."))


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
