"""Reading a bundle: records checked, paths safe, files hashed."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlflow_tdeploy.core import golden
from mlflow_tdeploy.core.errors import (
    IntegrityError,
    ManifestError,
    NotFoundError,
    SchemaVersionError,
    TDeployError,
    shown,
)
from mlflow_tdeploy.core.evidence import EVIDENCE_SCHEMA, Evidence
from mlflow_tdeploy.core.golden import GoldenRequest
from mlflow_tdeploy.core.manifest import Manifest
from mlflow_tdeploy.core.records import from_json
from mlflow_tdeploy.core.tasks import TASKS, Task
from mlflow_tdeploy.core.variant import VARIANT_SCHEMA, FileRecord, Variant, check_variant_id
from mlflow_tdeploy.store.hashing import HashCache, list_tree, verify_file
from mlflow_tdeploy.store.layout import ASSETS, EVIDENCE, GOLDEN, MANIFEST, ROOT, VARIANTS, safe_path

R = TypeVar("R", Variant, Evidence)
_log = logging.getLogger("mlflow_tdeploy")
#: Longest reason why a record is left out.
_REASON = 300
#: Brings the files of a variant into its bundle's folder.
Fetch = Callable[[Variant], None]
_KIND = re.compile(rb'"kind"\s*:\s*"(\w+)"')


class Bundle:
    """The bundle in a folder. Records are read once; :meth:`reload` reads them again.

    Hosts with other versions of this package add records, so one that cannot be read is left out, loudly, and says
    nothing about the others; only the manifest must be read.

    Nothing outside :attr:`root` is ever read, nothing whose name starts with a dot (work in progress
    of a writer), and no file of a variant that has no record.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self._variants: dict[str, Variant] | None = None
        self._unreadable: dict[str, str] = {}
        self._damaged: frozenset[str] = frozenset()
        self._evidence: dict[str, tuple[Evidence, ...]] = {}
        self._doubts: dict[str, str] = {}

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
        whole = Path(os.path.abspath(path))  # the working directory may be another one when files are opened
        for root in (whole / ROOT, whole):
            if os.path.lexists(root / MANIFEST):
                manifest = _read_manifest(root)
                if not os.path.lexists(root / VARIANTS):
                    raise IntegrityError(f"The bundle '{root}' has lost its folder '{VARIANTS}'. Download it again.")
                return cls(root, manifest)
        why = "that folder holds none" if Path(path).is_dir() else "that folder does not exist"
        raise NotFoundError(
            f"No bundle at '{path}': {why}. Expected an MLflow model directory with '{ROOT}/{MANIFEST}', as "
            f"mlflow.tdeploy.save_model writes it; for a model in a registry pass its URI to mlflow.tdeploy.load_model."
        )

    @property
    def variants(self) -> dict[str, Variant]:
        """Every variant by id whose record can be read, those over budget included.

        Raises:
            IntegrityError: The folder of the records leads out of the bundle or cannot be read.
        """
        if self._variants is None:
            found: dict[str, Variant] = {}
            unreadable: dict[str, str] = {}
            damaged: set[str] = set()
            for name in _json_files(self.path(VARIANTS)):
                try:
                    record = self._read(Variant, f"{VARIANTS}/{name}", VARIANT_SCHEMA)
                    found[record.id] = record
                except TDeployError as error:
                    named = Path(name).stem if Path(name).stem.isprintable() else shown(Path(name).stem)
                    unreadable[named] = _left_out(f"{VARIANTS}/{name}", error)
                    if not isinstance(error, SchemaVersionError):
                        damaged.add(named)
            self._variants, self._unreadable, self._damaged = found, unreadable, frozenset(damaged)
        return self._variants

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Why each variant whose record cannot be read is not one of :attr:`variants`, by id."""
        _ = self.variants
        return self._unreadable

    @property
    def damaged(self) -> frozenset[str]:
        """Those of :attr:`unreadable` whose records are damaged, not merely newer: nobody can tell what they were."""
        _ = self.variants
        return self._damaged

    @property
    def not_made(self) -> Mapping[str, str]:
        """Why variants wanted when the model was logged could not be made, by id; without those added since."""
        there = {*self.variants, *self.unreadable}
        return {name: why for name, why in self.manifest.skipped.items() if name not in there}

    @property
    def absent(self) -> Mapping[str, str]:
        """Why variants that one may look for are not among :attr:`variants`, by id: not made, or not readable here."""
        return {**{name: f"could not be made: {why}" for name, why in self.not_made.items()}, **self.unreadable}

    def evidence(self, variant_id: str) -> tuple[Evidence, ...]:
        """Return every measurement of a variant's own files, oldest first; empty where there is none.

        What was measured on other files is left out, see :meth:`Evidence.about`, and what cannot be read, with a
        warning that names its file; :meth:`doubt` says whether a verdict was among that.
        """
        folder = f"{EVIDENCE}/{check_variant_id(variant_id)}"
        if variant_id not in self._evidence:
            self._evidence[variant_id] = self._read_evidence(variant_id, folder)
        return self._evidence[variant_id]

    def doubt(self, variant_id: str) -> str | None:
        """Return why the newest verdict on a variant's accuracy cannot be read, or None where it can or there is none.

        An older verdict does not stand in for it: the newer one may say that the variant is over budget.
        """
        self.evidence(variant_id)
        return self._doubts.get(variant_id)

    def _read_evidence(self, variant_id: str, folder: str) -> tuple[Evidence, ...]:
        variant = self.variants.get(variant_id)
        found: list[Evidence] = []
        doubt = None
        for name in _json_files(self.path(folder)):  # their names sort by time
            relative = f"{folder}/{name}"
            try:
                item = self._read(Evidence, relative, EVIDENCE_SCHEMA)
                if variant is None or item.about(variant):
                    found.append(item)
                    doubt = None if item.kind == "accuracy" else doubt
            except TDeployError as error:
                why = _left_out(relative, error)
                doubt = f"{relative} is {why}" if self._is_verdict(relative) else doubt
        if variant is not None and doubt is None:
            doubt = self._lost(variant, found)
        if doubt is not None:
            self._doubts[variant_id] = doubt
        return tuple(found)

    def _lost(self, variant: Variant, found: Collection[Evidence]) -> str | None:
        """Return what shows that evidence of a variant is gone, or None: every graph is checked before it is kept."""
        checked = variant.format in ("onnx", "ort") and variant.id != self.manifest.reference and not variant.dropped
        return "nothing is left of what was measured about it" if checked and not found else None

    def _is_verdict(self, relative: str) -> bool:
        """Tell whether evidence that cannot be read may be about accuracy: what is cut off before it says so may be."""
        try:
            text = _read_bytes(self.root, relative)
        except TDeployError:
            return True
        try:
            plain: Any = json.loads(text)
        except (ValueError, RecursionError):
            said = _KIND.search(text)
            return said is None or said[1] == b"accuracy"
        return isinstance(plain, dict) and plain.get("kind") == "accuracy"

    def record_paths(self) -> list[str]:
        """Return the path of every variant's record and evidence, the manifest last: without it there is no bundle.

        Records of variants that cannot be read are left out: nobody here can tell which files belong to them.
        """
        folders = [f"{EVIDENCE}/{variant_id}" for variant_id in self.variants]
        evidence = [f"{folder}/{name}" for folder in folders for name in _json_files(self.path(folder))]
        return [*(f"{VARIANTS}/{variant_id}.json" for variant_id in self.variants), *evidence, MANIFEST]

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
                self.path(record.path).stat().st_size == record.size for record in variant.needed
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
        self._verify_files(variant.needed, cache)
        recorded = {record.path for record in variant.files}
        if not variant.files:
            return
        whole = variant.entry not in recorded
        if whole and not any(path.startswith(f"{variant.entry}/") for path in recorded):
            raise IntegrityError(f"Variant '{variant.id}': its entry '{variant.entry}' is none of its recorded files.")
        # Whoever opens a folder reads what lies in it, and a graph the weights beside it, so a planted file (a pickle,
        # code, other weights) counts as a change.
        folder = variant.entry if whole else variant.entry.rpartition("/")[0]
        if planted := self._planted(folder, recorded) if folder else []:
            raise IntegrityError(
                f"Variant '{variant.id}': '{planted[0]}' lies in its folder and is not recorded. Remove the file."
            )

    def verify_assets(self, cache: HashCache | None = None) -> None:
        """Check the tokenizer and the other assets.

        Raises:
            IntegrityError: One is missing, truncated or changed, or a file lies in a folder of theirs that is none.
        """
        self._verify_files(self.manifest.assets, cache)
        recorded = {record.path for record in self.manifest.assets}
        # as of variants: a tokenizer of several files is read by whoever opens its folder
        for folder in sorted({path.rpartition("/")[0] for path in recorded} - {ASSETS}):
            if planted := self._planted(folder, recorded):
                raise IntegrityError(
                    f"'{planted[0]}' lies among the model's assets and is not recorded. Remove the file."
                )

    def task(self, cache: HashCache | None = None) -> Task:
        """Return the model's task, as its settings and assets say.

        Args:
            cache: Digests remembered on this host; None hashes the assets.

        Raises:
            InvalidInputError: This version knows no such task.
            IntegrityError: An asset, such as the tokenizer, is missing, truncated or changed.
        """
        manifest = self.manifest
        self.verify_assets(cache)
        return TASKS.get(manifest.task)(manifest.task_config, manifest.signature, self.root / ASSETS)

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
        self._unreadable = {}
        self._evidence = {}
        self._doubts = {}

    def _planted(self, folder: str, recorded: set[str]) -> list[str]:
        """Return the files below a folder that no record is about, hidden ones left out."""
        return [path for path in list_tree(self.root, folder) if path not in recorded and not _is_hidden(path)]

    def _verify_files(self, records: tuple[FileRecord, ...], cache: HashCache | None) -> None:
        for record in records:
            verify_file(self.path(record.path), record, cache)

    def _read(self, cls: type[R], relative: str, newest: int) -> R:
        record = from_json(cls, _read_bytes(self.root, relative), relative, newest)
        named, stored = Path(relative), record.id if isinstance(record, Variant) else record.variant
        expected = named.stem if isinstance(record, Variant) else named.parent.name
        if stored != expected:
            raise ManifestError(f"{relative}: is about the variant '{stored}', its name says '{expected}'.")
        return record


def _left_out(relative: str, error: TDeployError) -> str:
    """Warn of a record that cannot be read, and return why, on one line that can be shown."""
    text = f"damaged: {error}"
    if isinstance(error, SchemaVersionError):
        text = f"written by a newer mlflow-tdeploy (schema {error.version}): pip install -U mlflow-tdeploy"
    # what a file holds or is called may be no text that a terminal takes
    why = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)[:_REASON]
    _log.warning("The record %s is left out: %s", ascii(relative)[1:-1], why)
    return why


def _read_manifest(root: Path) -> Manifest:
    return Manifest.read(_read_bytes(root, MANIFEST), str(root / MANIFEST))


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
