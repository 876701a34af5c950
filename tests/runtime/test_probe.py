import pytest

from mlflow_tdeploy.core import hardware
from mlflow_tdeploy.core.hardware import installed_version
from mlflow_tdeploy.runtime import probe
from mlflow_tdeploy.runtime.base import RUNTIMES


def test_host_names_the_processor_and_versions():
    host = probe.host()
    assert host.cores >= 1
    for name in ("numpy", *(name for runtime in RUNTIMES for name in runtime.distributions)):
        assert host.software.get(name) == installed_version(name)
    assert str(host.cores) in host.kind


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("raise SystemExit('no usable driver')", "no usable driver"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ],
)
def test_run_child_tells_how_the_child_died(script, reason):
    result = probe.run_child(script)
    assert not result.ok
    assert result.reason == reason


def test_run_child_kills_a_child_that_hangs():
    result = probe.run_child("import time; time.sleep(60)", timeout=0.5)
    assert not result.ok
    assert "no answer" in result.reason


def test_gpu_says_why_there_is_none_when_devices_are_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    probe.gpu.cache_clear()
    try:
        assert probe.gpu() == (None, "CUDA_VISIBLE_DEVICES hides every device")
    finally:
        probe.gpu.cache_clear()


def test_gpu_survives_a_driver_that_kills_the_process(monkeypatch, tmp_path):
    node = tmp_path / "nvidia0"
    node.touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(probe, "_DEVICE_NODES", (str(node),))
    driver = tmp_path / "driver.py"
    driver.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(probe, "_GPU_SCRIPT", driver)
    probe.gpu.cache_clear()
    try:
        assert probe.gpu() == (None, "killed by SIGSEGV")
    finally:
        probe.gpu.cache_clear()


@pytest.mark.skipif(probe.gpu()[0] is not None, reason="there is a GPU")
def test_a_host_without_a_driver_says_so_in_a_line():
    result = probe.run_child(probe._GPU_SCRIPT.read_text())
    assert not result.ok
    assert "libcuda.so.1" in result.reason


@pytest.mark.parametrize("name", RUNTIMES.names())
def test_self_test_passes_for_every_runtime_that_is_installed(name):
    if RUNTIMES.get(name)().missing():
        pytest.skip(f"{name} is not installed here")
    if RUNTIMES.get(name).tier == 0 and probe.gpu()[0] is None:
        pytest.skip(f"{name} needs an NVIDIA GPU: {probe.gpu()[1]}")
    result = probe.self_test(name)
    assert result.ok, result.reason
    assert result.output


def test_a_child_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert probe.run_child("import json; print(json.dumps(1))").output == "1"


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1), ("400000", 4), ("-1", 64), ("none", 64)])
def test_a_containers_limit_counts_on_hosts_with_the_first_cgroups_too(tmp_path, monkeypatch, quota, cores):
    (tmp_path / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(hardware, "_CGROUP_1", str(tmp_path))
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(hardware.Path, "read_text", without_the_second(hardware.Path.read_text))
    assert hardware.usable_cores() == cores


def without_the_second(real):
    def read(path, *arguments, **more):
        if path.name == "cpu.max":
            raise FileNotFoundError(path)
        return real(path, *arguments, **more)

    return read
