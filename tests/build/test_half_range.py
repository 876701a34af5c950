"""Numbers that half precision cannot hold are looked for on real inputs, and what makes or takes them stays fp32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

import mlflow_tdeploy
from mlflow_tdeploy.build.half import to_fp16
from mlflow_tdeploy.build.half_range import LEAST, MARGIN, MOST, beyond_half
from mlflow_tdeploy.core.errors import BuildError
from mlflow_tdeploy.store.bundle import Bundle

ROWS = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)


class Planted(torch.nn.Module):
    """Between two layers numbers are of another size, which two operators take; norms bring them back."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)
        self.norm, self.other = torch.nn.LayerNorm(8, eps=1e-20), torch.nn.LayerNorm(8, eps=1e-20)
        self.out = torch.nn.Linear(8, 2)
        with torch.no_grad():
            self.second.weight *= size
            self.second.bias *= size

    def forward(self, x):
        sized = self.second(torch.tanh(self.first(x)))
        return self.out(torch.tanh(self.norm(sized)) + self.other(sized * 2.0))


def halved(folder, module, rows=ROWS):
    mlflow_tdeploy.save_model(module.eval(), folder, example={"x": rows}, precisions=["fp32", "fp16"])
    bundle = Bundle.open(folder)
    variant = bundle.variants["onnx-fp16"]
    return onnx.load(bundle.path(variant.entry)), variant.precision


def in_half(graph, rows):
    """Answer as a GPU does: ONNX's own evaluator computes in half precision, processors do not."""
    with np.errstate(over="ignore", invalid="ignore"):
        return onnx.reference.ReferenceEvaluator(graph).run(None, {"x": rows})[0]


@pytest.mark.parametrize("size", [3e5, 1e-6])
def test_what_overflows_or_loses_its_digits_stays_fp32_with_all_that_takes_it(tmp_path, size):
    module = Planted(size)
    graph, precision = halved(tmp_path / "m", module)
    expected = module(torch.tensor(ROWS)).detach().numpy()
    np.testing.assert_allclose(in_half(graph, ROWS), expected, atol=0.03)
    (*_, largest) = sorted(precision.settings["beyond_fp16"].values(), key=lambda one: abs(np.log(one)))
    assert largest * MARGIN > MOST or largest < LEAST
    taking = {node.op_type for node in graph.graph.node if node.name in precision.kept}
    assert {"LayerNormalization", "Mul"} <= taking
    assert len(precision.kept) < len(graph.graph.node) / 2


def test_without_that_a_gpu_would_overflow(tmp_path):
    halved(tmp_path / "m", Planted(3e5))
    bundle = Bundle.open(tmp_path / "m")
    to_fp16(bundle.path(bundle.variants["onnx-fp32"].entry), tmp_path / "half.onnx")
    assert not np.isfinite(in_half(onnx.load(tmp_path / "half.onnx"), ROWS)).all()


def test_an_ordinary_model_keeps_nothing(tmp_path):
    _, precision = halved(tmp_path / "m", Planted(1.0))
    assert precision.kept == ()
    assert precision.settings["beyond_fp16"] == {}


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(4, 2)

    def forward(self, x, mask):
        return self.out((x + (1.0 - mask) * -1e30).softmax(-1))


def test_what_only_masks_is_no_overflow(tmp_path):
    mask = (ROWS > -0.5).astype(np.float32)
    mask[:, 0] = 1
    example = {"x": ROWS, "mask": mask}
    mlflow_tdeploy.save_model(Masked().eval(), tmp_path / "m", example=example, precisions=["fp32", "fp16"])
    assert Bundle.open(tmp_path / "m").variants["onnx-fp16"].precision.settings["beyond_fp16"] == {}


class Offset(torch.nn.Module):
    """Numbers beyond minus a hundred thousand that are no mask, beside a mask of something else."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(4, 2, bias=False)
        torch.nn.init.constant_(self.out.weight, -3e4)  # half precision holds that, and not what comes of it

    def forward(self, x):
        large = self.out(x.abs() + 1)
        return large * 1e-6 + (x + torch.where(x > 0, 0.0, -1e5)).softmax(-1).sum()


def test_a_mask_elsewhere_hides_no_large_negative_numbers(tmp_path):
    _, precision = halved(tmp_path / "m", Offset())
    assert max(precision.settings["beyond_fp16"].values()) > 1e5


def test_a_graph_that_fails_on_the_data_says_so(tmp_path):
    module = Planted(1.0)
    halved(tmp_path / "m", module)
    bundle = Bundle.open(tmp_path / "m")
    with pytest.raises(BuildError, match="fails on data"):
        beyond_half(bundle.path(bundle.variants["onnx-fp32"].entry), [{"x": np.zeros((2, 5), np.float32)}])
