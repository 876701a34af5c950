"""``make bench-gpu`` as far as a CPU goes: its contestants answer rightly, and what fails costs its own rows only."""

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu_contestants import CONTESTANTS
from benchmarks.gpu_models import ENCODERS, TINY

SHAPES = [(1, 16), (2, 24)]


def _bench(tmp_path, monkeypatch, contestants, minutes=5.0):
    monkeypatch.setattr(gpu, "CONTESTANTS", dict.fromkeys(contestants))
    bench = gpu.Bench(tmp_path, "cpu", SHAPES, minutes)
    bench.run(TINY)
    return bench


@pytest.mark.slow
def test_contestants_answer_as_full_precision_does_and_others_are_listed_with_the_reason(tmp_path, monkeypatch):
    bench = _bench(tmp_path, monkeypatch, ["PyTorch fp32", "ORT-CUDA fp32", "TensorRT fp16", "no such contestant"])
    assert {(name, shape) for _, name, shape in bench.rows} == {
        (name, shape) for name in ("PyTorch fp32", "ORT-CUDA fp32") for shape in SHAPES
    }
    for row in bench.rows.values():
        assert row["worst_cosine"] > 0.99999
        assert row["p50_ms"] > 0
        assert row["count"] >= 3
    assert bench.missing["tiny", "TensorRT fp16"] == "RuntimeError: TensorRT runs on a GPU only"
    assert "no such contestant" in bench.missing["tiny", "no such contestant"]


def test_without_a_graph_pytorch_is_still_measured(tmp_path, monkeypatch):
    def refuse(encoder, folder):
        raise ImportError("No module named 'onnx_ir'")

    monkeypatch.setattr(gpu, "make_graphs", refuse)
    bench = _bench(tmp_path, monkeypatch, ["PyTorch fp32", "ORT-CUDA fp32"])
    assert {name for _, name, _ in bench.rows} == {"PyTorch fp32"}
    assert bench.missing["tiny", "ORT-CUDA fp32"] == "no graph: ImportError: No module named 'onnx_ir'"


def test_when_the_time_is_over_the_rest_is_not_measured(tmp_path, monkeypatch):
    bench = _bench(tmp_path, monkeypatch, ["PyTorch fp32"], minutes=0)
    assert bench.rows == {}
    assert bench.missing == {("tiny", "PyTorch fp32"): "the time was over"}


def test_figures_hold_ratio_goal_roofline_and_what_the_session_adds(tmp_path):
    encoder, shape = ENCODERS[1], (1, 16)
    bench = gpu.Bench(tmp_path, "cuda", [shape], 1)
    same = {"worst_cosine": 1.0}
    bench.rows = {
        (encoder.name, "PyTorch fp32", shape): {"p50_ms": 6.0, **same},
        (encoder.name, "TensorRT-RTX fp16", shape): {"p50_ms": 0.5, "bare_p50_ms": 0.47, **same},
        (encoder.name, "ORT-CUDA fp16", shape): {"p50_ms": 2.0, **same},
    }
    figures = {f.name: f for f in gpu.figures_of([encoder], bench, {"fp16": 5e14, "fp32": 5e13, "bytes": 4e12})}
    faster, slower, added = (
        figures[f"BERT-base shape, 1 x 16, {name}"]
        for name in (
            "TensorRT-RTX fp16: faster than PyTorch fp32",
            "ORT-CUDA fp16: faster than PyTorch fp32",
            "TensorRT-RTX fp16: our session adds",
        )
    )
    assert (faster.value, faster.goal, faster.met) == (12.0, 10, True)
    assert (slower.value, slower.goal, slower.met) == (3.0, 4, False)
    assert (added.value, added.goal, added.met) == (pytest.approx(30.0), 20.0, False)
    # 85 million weights of two bytes over 4 TB/s outweigh 2.7 GFLOP over 500 TFLOP/s
    assert "roofline 0.042 ms, 8 % of it reached" in figures["BERT-base shape, 1 x 16, TensorRT-RTX fp16"].note
    assert "ceilings" in json.dumps(gpu.details_of(bench, {}))


def test_operations_are_those_of_the_matrix_products():
    """BERT-base: 7.1 million products per layer and token, and attention's two per pair of tokens."""
    base = ENCODERS[1]
    assert base.products == 12 * 7_077_888
    assert base.operations((1, 128)) == 2 * 128 * (12 * 7_077_888 + 2 * 12 * 128 * 768)


def test_every_contestant_says_how_wide_its_numbers_are():
    assert {width for _, _, width in CONTESTANTS.values()} == {2, 4}


def test_main_measures_nothing_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.probe, "gpu", lambda: (None, "no NVIDIA device on this host"))
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    assert "not measured: no NVIDIA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()
