"""Graphs whose opening ends the process: ONNX Runtime 1.31 does that for some in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.build.half import to_fp16
from mlflow_tdeploy.core.evidence import latest_accuracy
from mlflow_tdeploy.source import _survival
from mlflow_tdeploy.store.bundle import Bundle

RANDOM = np.random.default_rng(0)


def test_a_graph_that_ends_the_process_which_opens_it_is_left_out(tmp_path, monkeypatch):
    """ONNX Runtime 1.31 does that on a CPU for some graphs in half precision; here a child's end stands for it."""
    monkeypatch.setattr(_survival, "_OPEN", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    example = {"input": RANDOM.standard_normal((5, 4)).astype(np.float32)}
    mlflow_tdeploy.save_model(torch.nn.Linear(4, 3), tmp_path / "m", example=example)
    bundle = Bundle.open(tmp_path / "m" / "tdeploy")
    assert "onnx-fp16" not in bundle.variants
    assert "does not survive opening it (killed by SIGSEGV)" in bundle.absent["onnx-fp16"]


class Attending(torch.nn.Module):
    """Causal attention, whose graph in half precision is such a one."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(60, 16), torch.nn.Linear(16, 60)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids):
        n, h = ids.shape[1], self.embed(ids)
        mask = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)
        y, _ = self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)
        return self.head(h + y)


def test_causal_attention_is_logged_and_the_process_lives(tmp_path):
    example = {"ids": RANDOM.integers(0, 60, (4, 9))}
    shapes = {"ids.1": "t", "t": (1, 9, 24)}
    mlflow_tdeploy.save_model(Attending(), tmp_path / "m", example=example, shapes=shapes)
    bundle = Bundle.open(tmp_path / "m" / "tdeploy")
    assert latest_accuracy(bundle.evidence("onnx-fp32")).passed
    whole, half = bundle.path(bundle.variants["onnx-fp32"].entry), tmp_path / "half.onnx"
    to_fp16(whole, half)
    if not _survival.deadly(half):
        pytest.skip("this ONNX Runtime survives it")
    with pytest.raises(MlflowException, match="does not survive opening 'half.onnx'"):
        mlflow_tdeploy.save_model(str(half), tmp_path / "alone", example=example, shapes={"t": (1, 9, 24)})
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.slow
def test_torchs_own_encoder_has_a_graph_in_half_precision(tmp_path, norm_first):
    """ONNX Runtime 1.31 dies of it on a CPU where it may lay tensors out for convolutions, of which there are none."""

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
            self.embed, self.layers = torch.nn.Embedding(300, 32), torch.nn.TransformerEncoder(layer, 2)
            self.head = torch.nn.Linear(32, 3)

        def forward(self, ids):
            return self.head(self.layers(self.embed(ids)).mean(1))

    torch.manual_seed(0)
    module, example = Classifier().eval(), {"ids": RANDOM.integers(0, 300, (8, 12))}
    shapes = {"ids.1": "t", "t": (1, 12, 64)}
    mlflow_tdeploy.save_model(module, tmp_path / "m", example=example, shapes=shapes, precisions=["fp32", "fp16"])
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.from_numpy(example["ids"])).detach().numpy()
    np.testing.assert_allclose(model.infer(example)["output_0"], expected, atol=5e-3)
