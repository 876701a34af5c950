from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.tune import choose_fusions
from mlflow_tdeploy.core.precision import Precision

SESSION = {"skip_layer_norm": "SkipLayerNormFusion", "bias_gelu": "BiasGeluFusion"}


@pytest.fixture(scope="module")
def portable(tiny_bundle: Path) -> Graph:
    return Graph(tiny_bundle / "tdeploy" / "files" / "onnx-fp32" / "model.onnx", Precision())


def timings(**slow: float):
    """A stand-in for the clock: graphs without a fusion take the given multiple of the time with all of them."""

    def measure(graphs, seconds):
        del seconds
        times = {}
        for name, graph in graphs.items():
            disabled = graph.session.get("disabled_optimizers", [])
            left_out = {kind for kind, optimizer in SESSION.items() if optimizer in disabled}
            left_out |= {"attention"} if "AttentionFusion" in disabled else set()
            factor = 1.0
            for kind in left_out:
                factor *= slow.get(kind, 1.0)
            if len(left_out) > 1:
                factor *= slow.get("together", 1.0)
            times[name] = [0.01 * factor] * 3
        return {"short": times, "opt": times}

    return measure


def test_choose_fusions_leaves_out_what_is_slow_and_keeps_the_session_from_fusing_it(portable, tmp_path):
    fused = choose_fusions(portable, tmp_path, timings(skip_layer_norm=0.8, attention=1.3))
    assert fused.session == {"disabled_optimizers": ["SkipLayerNormFusion"]}
    assert fused.settings["left_out"] == ["skip_layer_norm"]
    assert fused.settings["fused"]["attention"] == 2
    assert fused.settings["time_without_over_with"]["skip_layer_norm"] == {"short": 0.8, "opt": 0.8}


def test_choose_fusions_keeps_everything_when_nothing_is_clearly_faster_without(portable, tmp_path):
    fused = choose_fusions(portable, tmp_path, timings(skip_layer_norm=0.99, bias_gelu=1.5, attention=1.1))
    assert fused.session == {}
    assert fused.settings["left_out"] == []


def test_choose_fusions_leaves_attention_out_of_the_graph_when_it_is_slower_with_it(portable, tmp_path):
    fused = choose_fusions(portable, tmp_path, timings(attention=0.5))
    assert fused.settings["left_out"] == ["attention"]
    assert not {"attention", "packed_qkv"} & set(fused.settings["fused"])


def test_choose_fusions_leaves_out_one_only_when_both_together_do_not_pay(portable, tmp_path):
    slow = {"skip_layer_norm": 0.8, "bias_gelu": 0.9}
    assert choose_fusions(portable, tmp_path / "a", timings(**slow)).settings["left_out"] == [
        "bias_gelu",
        "skip_layer_norm",
    ]
    one = choose_fusions(portable, tmp_path / "b", timings(**slow, together=1.5))
    assert one.settings["left_out"] == ["skip_layer_norm"]


def test_choose_fusions_uses_what_is_known_when_nothing_is_measured(portable, tmp_path):
    fused = choose_fusions(portable, tmp_path, None)
    assert set(fused.session["disabled_optimizers"]) == set(SESSION.values())
    assert fused.settings["measured"] is False


def test_choose_fusions_leaves_one_graph_only(portable, tmp_path):
    fused = choose_fusions(portable, tmp_path, timings(attention=0.5))
    assert [path.parent for path in tmp_path.rglob("*.onnx")] == [fused.path.parent]
