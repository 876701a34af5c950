"""Energy that a host has used, where its hardware counts it: CPUs by RAPL, NVIDIA GPUs by NVML.

RAPL: https://docs.kernel.org/power/powercap/powercap.html, NVML: nvmlDeviceGetTotalEnergyConsumption (Volta and later;
before that power is sampled and added up).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Where Linux shows the counters.
POWERCAP = Path("/sys/class/powercap")
#: Seconds between two samples of a GPU that counts no energy, and between two looks at a counter that wraps around.
_SAMPLE, _LOOK = 0.02, 10.0


class Meter(ABC):
    """Counts the energy that a part of the host uses.

    Attributes:
        name: The part, for example ``package-0 (intel-rapl:0)``.
    """

    name: str

    @abstractmethod
    def joules(self) -> float:
        """Return what was used since some moment in the past; it never falls."""

    def close(self) -> None:
        """Stop counting."""
        return


class Rapl(Meter):
    """A zone of a processor: a package with its cores, or memory.

    Args:
        zone: Its folder.

    Raises:
        OSError: It cannot be read: since Linux 5.10 only root may.
    """

    def __init__(self, zone: Path) -> None:
        self.name = f"{(zone / 'name').read_text().strip()} ({zone.name})"
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text()) + 1
        self._last, self._used = self._read(), 0

    def joules(self) -> float:
        """Return what was used since this was made; to be asked at least once in a turn of the counter (minutes)."""
        now = self._read()
        self._used += (now - self._last) % self._range
        self._last = now
        return self._used / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


class _OfGpu(Meter):
    """A GPU.

    Args:
        nvml: The module ``pynvml``.
        device: Its handle.
        name: What to call it.
    """

    def __init__(self, nvml: Any, device: Any, name: str) -> None:
        self._nvml, self._device, self.name = nvml, device, name


class Nvml(_OfGpu):
    """A GPU that counts its energy."""

    def joules(self) -> float:
        """Return what was used, by the driver's own count."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3  # mJ


class NvmlSampled(_OfGpu):
    """A GPU that tells its power only: energy is what a thread adds up, by the mean of two samples."""

    def __init__(self, nvml: Any, device: Any, name: str) -> None:
        super().__init__(nvml, device, name)
        self._joules, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, name="tdeploy-power", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Return what was used since this was made, as far as it was sampled."""
        return self._joules

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        then, before = time.perf_counter(), self._watts()
        while not self._stop.wait(_SAMPLE):
            now, watts = time.perf_counter(), self._watts()
            self._joules += (now - then) * (watts + before) / 2
            then, before = now, watts

    def _watts(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._device)) / 1e3  # mW


@dataclass
class Spent:
    """What was used during a block.

    Attributes:
        seconds: How long it took.
        joules: By the meter's name; empty where nothing is counted.
    """

    seconds: float = 0.0
    joules: dict[str, float] = field(default_factory=dict)

    @property
    def watts(self) -> float | None:
        """The mean power of all meters together, E / t; None where nothing is counted."""
        return sum(self.joules.values()) / self.seconds if self.joules and self.seconds > 0 else None


def rapl(root: Path = POWERCAP) -> tuple[list[Meter], str]:
    """Return the meters of this host's processors (packages and memory), or none and why.

    Zones within a package (``core``, ``uncore``) are part of it, and ``psys`` is all of the board.
    """
    found: list[Meter] = []
    why = "this host shows no energy counters of its processors (RAPL)"
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        try:
            if (zone / "name").read_text().strip().startswith(("package", "dram")):
                found.append(Rapl(zone))
        except (OSError, ValueError) as error:
            why = f"energy counters of the processors cannot be read ({error}): only root may"
    return found, "" if found else why


def nvml() -> tuple[list[Meter], str]:
    """Return the meter of the GPU that this process would use, or none and why."""
    try:
        module = importlib.import_module("pynvml")
    except ImportError:
        return [], "NVML is not asked: pip install nvidia-ml-py"
    try:
        module.nvmlInit()
        device = _first(module)
        name = module.nvmlDeviceGetName(device)
        name = name.decode() if isinstance(name, bytes) else str(name)
    except Exception as error:  # as its library says: no driver, no device
        return [], f"no GPU answers to NVML: {error}"
    try:
        module.nvmlDeviceGetTotalEnergyConsumption(device)
    except Exception:  # before Volta
        try:
            return [NvmlSampled(module, device, name)], ""
        except Exception as error:
            return [], f"'{name}' tells neither energy nor power: {error}"
    return [Nvml(module, device, name)], ""


def _first(module: Any) -> Any:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    if visible.isdecimal():
        return module.nvmlDeviceGetHandleByIndex(int(visible))
    return module.nvmlDeviceGetHandleByUUID(visible)


def meters(*, gpu: bool) -> tuple[list[Meter], str]:
    """Return all meters of this host, and why some are not there; to be closed.

    Args:
        gpu: Whether the host has a GPU that is used.
    """
    found, why = rapl()
    whys = [why]
    if gpu:
        of_gpu, why = nvml()
        found, whys = found + of_gpu, [*whys, why]
    return found, "; ".join(filter(None, whys))


@contextlib.contextmanager
def measured(by: Sequence[Meter]) -> Iterator[Spent]:
    """Measure a block; what is yielded is filled in at its end. A thread looks at counters before they wrap twice."""
    spent, before, done = Spent(), [meter.joules() for meter in by], threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            for meter in by:
                meter.joules()

    looker = threading.Thread(target=look, name="tdeploy-meters", daemon=True)
    looker.start()
    started = time.perf_counter()
    try:
        yield spent
    finally:
        spent.seconds = time.perf_counter() - started
        done.set()
        looker.join()
        spent.joules = {meter.name: meter.joules() - then for meter, then in zip(by, before, strict=True)}
