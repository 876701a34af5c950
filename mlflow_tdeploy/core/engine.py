"""What is known about a TensorRT engine (a *plan*) without opening it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow_tdeploy.core.errors import IntegrityError, InvalidInputError, shown

#: Smallest, usual and largest shape of one input.
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
#: First bytes of a plan, and the Python module whose builder writes them.
_MAGIC = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
#: More bytes than a header has.
HEADER_SIZE = 64
#: Where the version of the library lies: four bytes, major to build.
_VERSION = slice(24, 28)


@dataclass(frozen=True)
class PlanHeader:
    """The first bytes of a plan.

    NVIDIA documents no format. What is read here was the same in plans of TensorRT 10 and TensorRT-RTX 1.7: four bytes
    that name the library, the version of the serialization, and at byte 24 the library's own.

    Attributes:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        serialization: Version of the serialization.
        version: Version of the library, for example ``10.16.1.11``.
    """

    module: str
    serialization: int
    version: str

    @classmethod
    def read(cls, data: bytes, where: str = "the plan") -> PlanHeader:
        """Read a header.

        Args:
            data: The first 28 bytes of a plan, or more of it.
            where: Name of the file, for messages.

        Raises:
            IntegrityError: It is no plan, or not whole.
        """
        module = _MAGIC.get(bytes(data[:4]))
        if module is None:
            raise IntegrityError(
                f"{where} is no TensorRT engine: it begins with {bytes(data[:4])!r}, a plan with 'ftrt' (TensorRT) or "
                f"'vtrt' (TensorRT-RTX). Take the file that the builder or trtexec --saveEngine wrote."
            )
        if len(data) < _VERSION.stop:
            raise IntegrityError(f"{where} is cut off after {len(data)} bytes. Copy it again.")
        (serialization,) = struct.unpack_from("<I", data, 4)
        return cls(module, serialization, ".".join(map(str, data[_VERSION])))


@dataclass(frozen=True)
class EngineRecord:
    """How an engine was built, as far as it is known: empty is unknown.

    Flags and levels are kept by name, because their numbers differ between major versions of TensorRT.

    Attributes:
        module: The Python module that built it: ``tensorrt`` or ``tensorrt_rtx``.
        version: Version of the library, for example ``10.16.1.11``.
        os: Where it runs, for example ``linux-x86_64``.
        gpu: Name of the GPU that it was built on; empty also where it was built without one.
        compute_capability: Of that GPU, for example ``9.0``.
        driver: Version of NVIDIA's driver there.
        cuda: CUDA version of the library.
        flags: Builder flags, by name.
        hardware_compatibility: ``NONE``, ``AMPERE_PLUS`` or ``SAME_COMPUTE_CAPABILITY``.
        targets: Compute capabilities that a TensorRT-RTX engine was built for; empty for its default ones.
        profiles: Range of each input, per optimization profile.
        onnx_sha256: Digest of the graph that it was built from.
        calibration_sha256: Digest of the data that its quantization was calibrated with.
        plugins: File names of the libraries whose plugins it uses; a host has them, or not.
        weights: Graph that a plan without weights takes them from, relative to ``tdeploy``; empty where it has them.
    """

    module: str
    version: str
    os: str = ""
    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""
    cuda: str = ""
    flags: tuple[str, ...] = ()
    hardware_compatibility: str = "NONE"
    targets: tuple[str, ...] = ()
    profiles: tuple[Mapping[str, Range], ...] = field(default=())
    onnx_sha256: str = ""
    calibration_sha256: str | None = None
    plugins: tuple[str, ...] = ()
    weights: str = ""

    def __post_init__(self) -> None:
        if self.module not in _MAGIC.values():
            raise InvalidInputError(f"{shown(self.module)} builds no engines: use {' or '.join(_MAGIC.values())}.")
        version_numbers(self.version)
        for capability in (*self.targets, *([self.compute_capability] if self.compute_capability else ())):
            version_numbers(capability)

    def contradicts(self, header: PlanHeader) -> str | None:
        """Return how a plan's own header differs from what is recorded of it, or None."""
        if (header.module, header.version) == (self.module, self.version):
            return None
        return f"it says {header.module} {header.version}, its record {self.module} {self.version}"


def version_numbers(version: str) -> tuple[int, ...]:
    """Return a dotted version as numbers, for comparison.

    Raises:
        InvalidInputError: It has other parts than numbers.
    """
    parts = version.split(".")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise InvalidInputError(f"{shown(version)} is no version of numbers and dots, like 10.16.1.11 or 9.0.")
    return tuple(map(int, parts))
