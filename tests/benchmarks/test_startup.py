"""Child processes are timed from their start, with their own peak memory."""

import pytest

from benchmarks import startup


def test_run_child_times_the_whole_process():
    seconds, _ = startup.run_child("import time; time.sleep(0.3)")
    assert 0.3 < seconds < 5


def test_run_child_reports_its_own_memory_when_the_parent_is_larger():
    ballast = bytearray(b"x" * 200_000_000)
    _, small = startup.run_child("pass")
    _, large = startup.run_child("data = bytearray(b'x' * 100_000_000)")
    assert small < 60
    assert large > small + 90
    del ballast


def test_run_child_counts_memory_only_when_it_is_used():
    _, mapped = startup.run_child("import mmap; data = mmap.mmap(-1, 500_000_000)")
    assert mapped < 60


def test_run_child_says_why_when_the_child_fails():
    with pytest.raises(RuntimeError, match="no module named"):
        startup.run_child("raise SystemExit('no module named x')")


def test_figures_hold_the_goals():
    samples = startup.Samples()
    seconds = {"import mlflow.pyfunc": 1.0, "ours fp32": 1.6, "ours int8": 1.4, "ours without MLflow": 0.5}
    for name, value in seconds.items():
        samples.add(name, value, 250.0)
    verdicts = {figure.name: figure.met for figure in samples.figures("here") if figure.goal}
    assert list(verdicts.values()) == [False, True, True, True, True]


def test_beyond_compares_runs_of_one_round():
    samples = startup.Samples()
    for base in (1.0, 2.0, 3.0):  # the machine slows down
        samples.add("import mlflow.pyfunc", base, 100.0)
        samples.add("ours fp32", base + 0.4, 100.0)
    assert samples.beyond()["ours fp32"] == pytest.approx(0.4)


def test_run_child_runs_the_interpreter_of_its_place(tmp_path):
    with pytest.raises(RuntimeError, match="found in"):
        startup.run_child("import os; raise SystemExit('found in ' + os.getcwd())", startup.Place("x", folder=tmp_path))
