from __future__ import annotations

import pytest
import torch

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.runtime.torch_tensors import are_tensors, through_host


def test_bfloat16_goes_through_the_host_and_back_unchanged():
    x = torch.tensor([[1.5, -0.25, float("inf")]], dtype=torch.bfloat16)
    seen = {}

    def infer(feeds):
        seen.update(feeds)
        return {"y": feeds["x"]}

    answer = through_host(infer, {"x": x})["y"]
    assert seen["x"].dtype.name == "bfloat16"
    assert seen["x"].astype("float32").tolist() == x.float().tolist()
    assert answer.dtype == torch.bfloat16
    assert torch.equal(answer, x)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.empty(2, 3, device="meta"), "on the meta device"),
        (torch.eye(3).to_sparse(), "of layout torch.sparse_coo"),
    ],
)
def test_tensors_that_hold_no_dense_numbers_are_refused(tensor, kind):
    with pytest.raises(InvalidInputError, match=f"Input 'x' is a tensor {kind}"):
        are_tensors({"x": tensor})
