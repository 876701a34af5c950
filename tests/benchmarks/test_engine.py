"""``make bench-engine`` builds for real, each engine in a process of its own."""

import json

import pytest

from benchmarks import engine, engine_graphs
from tests.bundles import SIGNATURE, linear_graph

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def one_graph(monkeypatch, tmp_path):
    def make(model, arguments, folder):
        linear_graph(tmp_path / model / "model.onnx")
        return SIGNATURE, {"fp32": tmp_path / model / "model.onnx"}

    monkeypatch.setattr(engine_graphs, "sources", lambda: [("linear", "linear", {})])
    monkeypatch.setattr(engine_graphs, "make_graphs", make)


def test_main_builds_every_round_and_writes_time_memory_and_size(one_graph, tmp_path, capsys):
    assert engine.main(["--rounds", "2", "--out", str(tmp_path / "engine.json")]) == 0
    section = json.loads((tmp_path / "engine.json").read_text())["engines"]
    figures = {figure["name"]: figure for figure in section["figures"]}
    assert set(figures) == {f"linear, fp32: {what}" for what in ("time to build", "peak memory", "plan")}
    runs = section["details"]["builds"]["linear, fp32"]
    assert len(runs) == 2
    assert all(0 < run["before_mib"] <= run["peak_mib"] and run["seconds"] > 0 for run in runs)
    plan = (tmp_path / "linear" / "model.plan").stat().st_size
    assert figures["linear, fp32: plan"]["value"] == pytest.approx(plan / 1e6)
    assert f"TensorRT-RTX {section['details']['version']}, built" in capsys.readouterr().out


def test_main_says_what_the_builder_said_when_it_fails(one_graph, tmp_path, monkeypatch):
    def damaged(model, arguments, folder):
        (tmp_path / "bad.onnx").write_bytes(b"no graph")
        return SIGNATURE, {"fp32": tmp_path / "bad.onnx"}

    monkeypatch.setattr(engine_graphs, "make_graphs", damaged)
    with pytest.raises(SystemExit, match=r"building .*bad.onnx failed"):
        engine.main(["--rounds", "1", "--out", str(tmp_path / "engine.json")])
    assert not (tmp_path / "engine.json").exists()
