from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from mlflow_tdeploy.build.recipes import Graph
from mlflow_tdeploy.build.tune import choose_fusions
from mlflow_tdeploy.core.errors import SessionError
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


# graphs that cannot be opened


def refusing(*operators: str):
    """A runtime that opens no graph with one of these operators: what ONNX Runtime does with a wrong fusion."""

    def trial(graph: Graph) -> str | None:
        found = {node.op_type for node in onnx.load(graph.path, load_external_data=False).graph.node} & set(operators)
        return f"no kernel for {min(found)}" if found else None

    def measure(graphs, seconds):
        for why in filter(None, map(trial, graphs.values())):
            raise SessionError(why)
        return timings(skip_layer_norm=0.8)(graphs, seconds)

    return trial, measure


@pytest.mark.parametrize("measured", [True, False])
def test_choose_fusions_leaves_attention_out_and_says_why_when_nothing_opens_with_it(portable, tmp_path, measured):
    trial, measure = refusing("Attention", "MultiHeadAttention")
    fused = choose_fusions(portable, tmp_path, measure if measured else None, trial=trial)
    assert trial(Graph(fused.path, Precision())) is None
    assert fused.settings["cannot_be_opened_with"] == {"attention": "no kernel for Attention"}
    assert "attention" not in fused.settings["fused"]
    assert set(fused.settings["left_out"]) == {"attention", "skip_layer_norm"} | (set() if measured else {"bias_gelu"})
    assert "SkipLayerNormFusion" in fused.session["disabled_optimizers"]


def test_choose_fusions_keeps_unpacked_attention_when_only_the_packed_one_cannot_be_opened(portable, tmp_path):
    trial, measure = refusing("Attention")
    fused = choose_fusions(portable, tmp_path, measure, trial=trial)
    assert set(fused.settings["cannot_be_opened_with"]) == {"packed_qkv"}
    assert fused.settings["fused"]["attention"] == 2
    assert [path.parent for path in tmp_path.rglob("*.onnx")] == [fused.path.parent]


def test_choose_fusions_leaves_a_candidate_out_when_only_that_one_cannot_be_opened(portable, tmp_path):
    trial, measure = refusing("MultiHeadAttention")  # what is left where attention is not packed
    fused = choose_fusions(portable, tmp_path, measure, trial=trial)
    assert "cannot_be_opened_with" not in fused.settings
    assert fused.settings["fused"]["packed_qkv"] == 2
    assert set(fused.settings["time_without_over_with"]) == {"attention", "skip_layer_norm", "bias_gelu"}


def test_choose_fusions_raises_when_nothing_can_be_opened(portable, tmp_path):
    trial, measure = refusing("MatMul", "Gemm", "Attention")
    with pytest.raises(SessionError, match="with fused operators nor without"):
        choose_fusions(portable, tmp_path, measure, trial=trial)
