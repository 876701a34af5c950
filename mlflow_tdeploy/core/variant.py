"""One deployable form of a model, and the files it consists of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow_tdeploy.core.engine import EngineRecord
from mlflow_tdeploy.core.errors import InvalidInputError, shown
from mlflow_tdeploy.core.hardware import Fingerprint
from mlflow_tdeploy.core.precision import Precision
from mlflow_tdeploy.core.records import check_version

#: Latest form of a variant's record that this package reads; it writes the earliest that holds what there is to say.
VARIANT_SCHEMA = 1
#: A name that runtimes know (``hf``, ``onnx``, ``ort``); which ones there are is theirs to say.
Format = str
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


#: Optimizers of ONNX Runtime that lay tensors out for processors, at its last level only.
LAYOUT_OPTIMIZERS = ("NchwcTransformer",)


@dataclass(frozen=True)
class FileRecord:
    """A file of a bundle.

    Attributes:
        path: Relative to the bundle's ``tdeploy`` folder, with forward slashes, never outside it.
        sha256: Hex digest of its content.
        size: Bytes.
    """

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        check_relative(self.path)
        if not _SHA256.fullmatch(self.sha256):
            raise InvalidInputError(f"File '{self.path}': {self.sha256!r} is not a sha256 digest.")
        if self.size < 0:
            raise InvalidInputError(f"File '{self.path}': negative size {self.size}.")


def check_relative(path: str) -> str:
    """Return ``path`` if it is a plain relative path that stays below its root.

    Raises:
        InvalidInputError: It is absolute, empty, has ``..``, a backslash, a drive or a control character.
    """
    parts = path.split("/")
    bad = not path or "\\" in path or ":" in parts[0] or any(part in ("", ".", "..") for part in parts)
    # a lone surrogate is no text that a file system call accepts
    if bad or any(ord(char) < 32 or 0xD800 <= ord(char) <= 0xDFFF for char in path):
        raise InvalidInputError(f"Unsafe path {path!r}: a bundle holds plain relative paths only.")
    return path


def check_variant_id(variant_id: str) -> str:
    """Return the id if it is usable as a folder name.

    Raises:
        InvalidInputError: It is not of the form ``ort-cpu-int8``.
    """
    if not isinstance(variant_id, str) or not _ID.fullmatch(variant_id) or ".." in variant_id:
        raise InvalidInputError(
            f"Invalid variant id {variant_id!r}: use 1 to 64 of a-z, 0-9, '.', '_', '-', "
            f"starting with a letter or digit."
        )
    return variant_id


@dataclass(frozen=True)
class Variant:
    """One immutable record per variant, written after its files.

    Attributes:
        id: Reads well: ``onnx-fp32``, ``ort-cpu-int8``, ``trt-fp16-sm90``.
        format: Which runtimes can open it: ``hf``, ``onnx``, ``ort``, or one that only newer versions know.
        precision: What it computes with and the recipe that made it.
        device: What it was made for: ``any``, ``cpu``, ``cuda``, or one that only newer versions know.
        entry: The file (or folder, for ``hf``) that a runtime opens, relative to ``tdeploy``.
        files: Its own files, all that it needs but for ``shared``. Empty when the variant failed its budget and its
            files were dropped.
        parent: Id of the variant it was made from.
        requires: Least versions and the like: ``{"onnxruntime": "1.18", "opset": "18", "ir_version": "10"}``.
        session: Hints for the runtime that belong to the graph, such as optimizers that would undo a measured choice.
        dtypes: Tensors whose dtype in this graph differs from the signature's; sessions convert.
        built_for: The host it was built on or tuned for; ``None`` for portable ones.
        engine: How it was built, for TensorRT engines.
        shared: Files of other variants that it needs besides: the graph whose weights an engine takes.
        folders: Empty folders that belong to it, which no artifact store keeps.
        executables: Those of its files that are programs, which no artifact store remembers.
        created: UTC time in ISO format.
        made_with: Versions of the packages that made it.
        schema_version: Version of the record's form.
    """

    id: str
    format: Format
    precision: Precision
    device: str
    entry: str
    files: tuple[FileRecord, ...]
    parent: str | None = None
    requires: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    built_for: Fingerprint | None = None
    engine: EngineRecord | None = None
    shared: tuple[FileRecord, ...] = ()
    folders: tuple[str, ...] = ()
    executables: tuple[str, ...] = ()
    created: str = ""
    made_with: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = 1

    def __post_init__(self) -> None:
        check_version(self.schema_version)
        check_variant_id(self.id)
        for path in (self.entry, *self.folders, *self.executables):
            check_relative(path)
        if self.parent is not None:
            check_variant_id(self.parent)
        for what, name in (("format", self.format), ("device", self.device)):
            if not _NAME.fullmatch(name):
                raise InvalidInputError(
                    f"Variant '{self.id}': {shown(name)} is no name of a {what}: use 1 to 32 of a-z, 0-9, '.', '_', "
                    f"'-', starting with a letter or digit, like {'onnx' if what == 'format' else 'cpu'}."
                )

    @property
    def size(self) -> int:
        """Bytes of its own files."""
        return sum(file.size for file in self.files)

    @property
    def needed(self) -> tuple[FileRecord, ...]:
        """Every file that has to be there before it is opened."""
        return (*self.files, *self.shared) if self.files else ()

    @property
    def digest(self) -> str:
        """Digest of the names, sizes and contents of all it needs, wherever in the bundle; empty without files."""
        if not self.files:
            return ""
        lines = sorted(f"{file.sha256} {file.size} {file.path.rsplit('/', 1)[-1]}\n" for file in self.needed)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def token_budget(self) -> int:
        """Padded tokens of a batch that suit its graph; 0 where its ``session`` hints say nothing usable."""
        hint = self.session.get("token_budget")
        return hint if type(hint) is int and hint > 0 else 0

    @property
    def dropped(self) -> bool:
        """Whether its files were not kept because it is over the model's budget."""
        return not self.files
