"""What a host is, as far as it decides what runs there and how fast."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: CPU flags that decide how fast inference kernels are; others only make hosts look different.
_CPU_FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16"),
)


#: Where a container's limit is on hosts with the first version of cgroups.
_CGROUP_1 = "/sys/fs/cgroup/cpu"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver reports it.

    Attributes:
        name: Product name.
        compute_capability: For example ``"9.0"``.
        memory: Bytes of device memory.
        driver: Version of NVIDIA's driver, for example ``"580.65.06"``; empty where unknown.
        cuda: Latest CUDA version that the driver supports, for example ``"13.0"``.
    """

    name: str
    compute_capability: str
    memory: int = 0
    driver: str = ""
    cuda: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """A host.

    Attributes:
        os: Operating system and machine, for example ``linux-x86_64``.
        cpu: Model name of the processor.
        cpu_features: Instruction sets that matter for inference, sorted.
        cores: Processors this process may use.
        memory: Bytes of main memory; 0 where unknown.
        gpu: The first GPU, if the host has one that answers.
        software: Versions of the libraries that run models, by package name; absent ones are left out.
    """

    os: str
    cpu: str = ""
    cpu_features: tuple[str, ...] = ()
    cores: int = 1
    memory: int = 0
    gpu: Gpu | None = None
    software: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Name of the kind of host: latency measured on one host counts on another of the same kind."""
        gpu = f"/{self.gpu.name}-sm{self.gpu.compute_capability}" if self.gpu else ""
        return f"{self.os}/{self.cpu or 'cpu'}/{self.cores}c/{'+'.join(self.cpu_features) or 'base'}{gpu}"


@functools.cache
def host_cpu() -> Fingerprint:
    """Return this host's fingerprint without its GPU and library versions; starts no process."""
    cpu, flags = _cpuinfo()
    return Fingerprint(
        os=f"{platform.system()}-{platform.machine()}".lower(),
        cpu=cpu or platform.processor(),
        cpu_features=tuple(sorted(flag for flag in _CPU_FEATURES if flag in flags)),
        cores=usable_cores(),
        memory=_memory(),
    )


def installed_version(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed, or None; imports none of them."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def usable_cores() -> int:
    """Return how many processors this process may use: its affinity, limited by a cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2: the affinity stands, or what the first one says
    try:
        limit, each = (int(Path(_CGROUP_1, f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if limit > 0:  # -1 is none
            cores = min(cores, max(1, limit // each))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no cgroup v1 either
    return max(1, cores)


def _cpuinfo() -> tuple[str, frozenset[str]]:
    model, flags = "", frozenset[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name" and not model:
                model = value
            elif key.lower() in ("flags", "features") and not flags:
                flags = frozenset(value.split())
    except OSError:
        pass  # not Linux: the platform module's answer is used
    return model, flags


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
