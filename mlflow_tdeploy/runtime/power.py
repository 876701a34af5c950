"""Energy that a host has used, where its hardware counts it: CPUs by RAPL, NVIDIA GPUs by NVML.

RAPL: https://docs.kernel.org/power/powercap/powercap.html, NVML: nvmlDeviceGetTotalEnergyConsumption (Volta and later;
before that power is sampled and added up).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mlflow_tdeploy.core.errors import first_line

_log = logging.getLogger("mlflow_tdeploy")
#: Where Linux shows the counters.
POWERCAP = Path("/sys/class/powercap")
#: Seconds between two samples of a GPU that counts no energy, and between two looks at a counter that wraps around.
_SAMPLE, _LOOK = 0.02, 10.0


class Meter(ABC):
    """Counts the energy that a part of the host uses.

    Attributes:
        name: The part, for example ``package-0 (intel-rapl:0)``.
        of_gpu: Whether that is a GPU.
    """

    name: str
    of_gpu: ClassVar[bool] = False

    @abstractmethod
    def joules(self) -> float:
        """Return what was used since some moment in the past; it never falls. Whatever it raises: it counts no more."""

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

    of_gpu = True

    def __init__(self, nvml: Any, device: Any, name: str) -> None:
        self._nvml, self._device, self.name = nvml, device, name


class Nvml(_OfGpu):
    """A GPU that counts its energy."""

    def joules(self) -> float:
        """Return what was used, by the driver's own count."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3  # mJ


class NvmlSampled(_OfGpu):
    """A GPU that tells its power only: energy is what a thread adds up, by the mean of two samples.

    Raises:
        Exception: As NVML says: it tells no power either, as parts of a GPU (MIG, vGPU) may not.
    """

    def __init__(self, nvml: Any, device: Any, name: str) -> None:
        super().__init__(nvml, device, name)
        self._watts()
        self._joules, self._stop = 0.0, threading.Event()
        self._ended: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="tdeploy-power", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Return what was used since this was made, as far as it was sampled."""
        if self._ended is not None:
            raise self._ended
        return self._joules

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            then, before = time.perf_counter(), self._watts()
            while not self._stop.wait(_SAMPLE):
                now, watts = time.perf_counter(), self._watts()
                self._joules += (now - then) * (watts + before) / 2
                then, before = now, watts
        except Exception as error:  # a sum that rises no more would be taken for no energy
            self._ended = error

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
    """Return the meters of this host's processors (packages and memory), and why one is not there.

    All of them or none: a sum without one of two sockets is no energy of anything.

    Zones within a package (``core``, ``uncore``) are part of it, and ``psys`` is all of the board.
    """
    found: list[Meter] = []
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        try:
            if (zone / "name").read_text().strip().startswith(("package", "dram")):
                found.append(Rapl(zone))
        except (OSError, ValueError) as error:
            return [], f"energy counters of the processors cannot be read ({error}): only root may"
    return found, "" if found else "this host shows no energy counters of its processors (RAPL)"


def nvml(uuid: str = "") -> tuple[list[Meter], str]:
    """Return the meter of the GPU that this process would use, or none and why.

    Args:
        uuid: Of the GPU, as CUDA's driver says; empty for the first that this process may see.
    """
    try:
        module = importlib.import_module("pynvml")
    except ImportError:
        return [], "NVML is not asked: pip install nvidia-ml-py"
    try:
        module.nvmlInit()
        device = _first(module, uuid)
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


def _first(module: Any, uuid: str) -> Any:
    """Return the handle of a GPU: CUDA and NVML may number them otherwise, so a number is only a last resort."""
    if uuid:
        try:
            return module.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except Exception:  # that of a part of one (MIG)
            return module.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    if visible.isdecimal():
        return module.nvmlDeviceGetHandleByIndex(int(visible))
    return module.nvmlDeviceGetHandleByUUID(visible)


def meters(gpu: str | None) -> tuple[list[Meter], str]:
    """Return all meters of this host, and why some are not there; to be closed.

    Args:
        gpu: UUID of the GPU that is used, empty for one whose driver does not say; None for none.
    """
    found, why = rapl()
    whys = [why]
    if gpu is not None:
        of_gpu, why = nvml(gpu)
        found, whys = found + of_gpu, [*whys, why]
    return found, "; ".join(filter(None, whys))


@contextlib.contextmanager
def measured(by: Sequence[Meter]) -> Iterator[Spent]:
    """Measure a block; what is yielded is filled in at its end. A thread looks at counters before they wrap twice.

    Where one of them fails, nothing is counted, and a warning says so.
    """
    spent, before, done = Spent(), _read(by), threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            _read(by)

    looker = threading.Thread(target=look, name="tdeploy-meters", daemon=True)
    looker.start()
    started = time.perf_counter()
    try:
        yield spent
    finally:
        spent.seconds = time.perf_counter() - started
        done.set()
        looker.join()
        after = _read(by)
        if before is not None and after is not None:
            spent.joules = {name: used - before[name] for name, used in after.items()}


def _read(by: Sequence[Meter]) -> dict[str, float] | None:
    """Return what meters say by name; None where one of them fails."""
    found = {}
    for meter in by:
        try:
            found[meter.name] = meter.joules()
        except Exception as error:  # as its hardware's library says
            _log.warning("'%s' does not count its energy any more: %s", meter.name, first_line(error))
            return None
    return found
