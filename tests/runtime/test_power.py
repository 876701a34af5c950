"""Energy counters: RAPL's files as Linux shows them; NVML by a stand-in (no GPU was asked)."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from mlflow_tdeploy.runtime import power
from mlflow_tdeploy.runtime.power import Meter, measured, meters, nvml, rapl


def zone(root, folder, name, energy=0, most=262_143_328_850):
    (root / folder).mkdir()
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (root / folder / file).write_text(f"{value}\n")
    return root / folder / "energy_uj"


def test_packages_and_memory_are_counted_once(tmp_path):
    counters = [zone(tmp_path, "intel-rapl:0", "package-0"), zone(tmp_path, "intel-rapl:0:1", "dram")]
    for folder, name in (("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        zone(tmp_path, folder, name)
    found, why = rapl(tmp_path)
    assert [meter.name for meter in found] == ["package-0 (intel-rapl:0)", "dram (intel-rapl:0:1)"]
    assert why == ""
    for counter, used in zip(counters, (3_000_000, 500_000), strict=True):
        counter.write_text(str(used))
    assert [meter.joules() for meter in found] == [3.0, 0.5]


def test_a_counter_that_wraps_around_goes_on(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", energy=9_000_000, most=9_999_999)
    (meter,), _ = rapl(tmp_path)
    for value, total in ((9_500_000, 0.5), (500_000, 1.5), (0, 11.0)):
        counter.write_text(str(value))
        assert meter.joules() == pytest.approx(total)


def test_it_is_told_why_there_is_no_meter(tmp_path):
    assert rapl(tmp_path / "none") == ([], "this host shows no energy counters of its processors (RAPL)")
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:1", "package-1").unlink()  # half of the processors is no sum of anything
    found, why = rapl(tmp_path)
    assert (found, "cannot be read" in why) == ([], True)


class Counter(Meter):
    name = "a"

    def __init__(self, watts):
        self._watts, self._started = watts, time.perf_counter()

    def joules(self):
        return self._watts * (time.perf_counter() - self._started)


class Stepping(Counter):
    """Two joules more each time it is asked."""

    def __init__(self):
        self._joules = 0.0

    def joules(self):
        self._joules += 2.0
        return self._joules


def test_power_is_energy_by_time():
    with measured([Stepping()]) as spent:
        time.sleep(0.05)
    assert spent.joules == {"a": 2.0}
    assert spent.watts == pytest.approx(2.0 / spent.seconds)
    assert spent.seconds >= 0.05
    with measured([]) as spent:
        pass
    assert spent.watts is None
    assert not [one for one in threading.enumerate() if one.name == "tdeploy-meters"]


def test_counters_are_looked_at_before_they_wrap_twice(monkeypatch):
    monkeypatch.setattr(power, "_LOOK", 0.01)
    asked = []

    class Watched(Counter):
        def joules(self):
            asked.append(1)
            return 0.0

    with measured([Watched(1.0)]):
        time.sleep(0.2)
    assert len(asked) > 4


def test_a_meter_that_fails_counts_nothing_and_says_so(caplog):
    class Failing(Counter):
        def joules(self):
            raise RuntimeError("GPU is lost")

    with measured([Counter(1.0), Failing(1.0)]) as spent:
        time.sleep(0.01)
    assert spent.watts is None
    assert "GPU is lost" in caplog.text


def stand_in(*, total=None, watts=None):
    def energy(device):
        if total is None:
            raise RuntimeError("Not Supported")
        return total[device]

    def power_of(device):
        try:
            return 1e3 * next(told)
        except StopIteration:
            raise RuntimeError("Not Supported") from None

    told = iter(watts or ())
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetName=lambda device: b"GPU",
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetPowerUsage=power_of,
    )


def test_the_gpu_that_the_process_sees_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(total={0: 1000.0, 2: 7000.0, "GPU-x": 9000.0}))
    for visible, joules in (("0", 1.0), ("2,3", 7.0), ("GPU-x", 9.0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        (meter,), why = nvml()
        assert (meter.name, meter.joules(), why) == ("GPU", joules, "")


def test_an_old_gpu_is_sampled(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(watts=itertools.repeat(50.0)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (meter,), _ = nvml()
    with measured([meter]) as spent:
        time.sleep(0.4)
    meter.close()
    assert spent.joules["GPU"] == pytest.approx(50.0 * spent.seconds, rel=0.3)
    assert not [one for one in threading.enumerate() if one.name == "tdeploy-power"]


def test_a_gpu_that_tells_neither_energy_nor_power_has_no_meter(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    found, why = nvml()
    assert (found, "tells neither energy nor power" in why) == ([], True)


def test_a_gpu_that_stops_telling_its_power_counts_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(watts=[50.0] * 4))
    (meter,), _ = nvml()
    with measured([meter]) as spent:
        time.sleep(0.3)
    meter.close()
    assert spent.joules == {}


def test_a_gpu_is_found_by_what_cuda_calls_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(total={0: 1.0, "GPU-a": 5000.0, "MIG-b": 3000.0}))
    assert [nvml(uuid)[0][0].joules() for uuid in ("a",)] == [5.0]
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetHandleByUUID", part_only)
    assert nvml("b")[0][0].joules() == 3.0


def part_only(uuid):
    if uuid.startswith("GPU-"):
        raise RuntimeError("Not Found")
    return uuid


def test_a_missing_package_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml() == ([], "NVML is not asked: pip install nvidia-ml-py")
    _, why = meters(gpu="")
    assert "nvidia-ml-py" in why
