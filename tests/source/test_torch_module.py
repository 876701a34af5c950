from __future__ import annotations

import numpy as np
import pytest
import torch

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.source.resolve import resolve
from tests.served import task_of


class Mixer(torch.nn.Module):
    """Two inputs, three outputs: one per token, one per row, one whose size depends on the batch in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, ids):
        hidden = self.drop(self.linear(x))
        return {"hidden": hidden, "pooled": hidden.sum(1) + ids.sum(1, keepdim=True), "pairs": hidden.flatten(0, 1)}


def _example(batch=2, length=5):
    random = np.random.default_rng(0)
    return {
        "x": random.standard_normal((batch, length, 4)).astype(np.float32),
        "ids": random.integers(0, 9, (batch, length)),
    }


SHAPES = {"batch": (1, 2, 16), "x.1": "sequence", "ids.1": "sequence", "sequence": (1, 8, 32)}


def test_resolve_finds_names_and_dims_of_the_outputs_by_running_the_module():
    source = resolve(Mixer(), example=_example(), shapes=SHAPES)
    assert source.task == "tensors"
    assert [str(spec) for spec in source.signature.inputs] == [
        "x: float32[batch, sequence, 4]",
        "ids: int64[batch, sequence]",
    ]
    assert [str(spec) for spec in source.signature.outputs] == [
        "hidden: float32[batch, sequence, 3]",
        "pooled: float32[batch, 3]",
        "pairs: float32[pairs_0, 3]",
    ]
    assert source.task_config == {}  # ids are numbers here
    assert (source.record.kind, source.record.name) == ("torch", "Mixer")


def test_reference_equals_the_module_in_evaluation_mode(tmp_path):
    module = Mixer().train()
    source = resolve(module, example=_example(), shapes=SHAPES)
    assert module.training
    feeds = task_of(source, tmp_path).example_feeds("max", ragged=False)
    with torch.inference_mode():
        want = module.eval()(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    got = source.reference(feeds)
    assert list(got) == ["hidden", "pooled", "pairs"]
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor.numpy(), atol=1e-6)


def test_resolve_makes_the_batch_the_only_dimension_when_shapes_says_nothing():
    source = resolve(torch.nn.Linear(4, 2), example={"input": torch.zeros(3, 4)})
    assert [str(dim) for dim in source.signature.dims] == ["batch 1..64 (opt 8)"]
    assert [str(spec) for spec in source.signature.outputs] == ["output_0: float32[batch, 2]"]


def test_resolve_makes_an_axis_its_own_dimension_when_shapes_gives_it_a_range():
    source = resolve(
        torch.nn.Conv1d(2, 3, 1), example={"input": np.zeros((1, 2, 7), np.float32)}, shapes={"input.2": (1, 8, 99)}
    )
    assert str(source.signature.inputs[0]) == "input: float32[batch, 2, input_2]"
    assert source.signature.outputs[0].shape == ("batch", 3, "input_2")
    assert source.signature.dim("input_2").max == 99


def test_resolve_fixes_an_axis_when_shapes_says_so():
    class Product(torch.nn.Module):
        def forward(self, x, matrix):
            return (x @ matrix,)

    example = {"x": np.ones((2, 3), np.float32), "matrix": np.ones((3, 4), np.float32)}
    with pytest.raises(InvalidInputError, match=r"'matrix\.0': 3"):
        resolve(Product(), example=example)
    source = resolve(Product(), example=example, shapes={"matrix.0": 3})
    assert source.signature.inputs[1].shape == (3, 4)
    assert source.signature.outputs[0].shape == ("batch", 4)


def test_reference_computes_in_fp32_when_the_module_is_half():
    source = resolve(torch.nn.Linear(4, 2).half(), example={"input": np.ones((2, 4), np.float16)})
    assert source.signature.inputs[0].dtype == "float16"
    assert source.signature.outputs[0].dtype == "float32"
    assert "float16" in source.notes[0]


def test_resolve_takes_a_transformers_model_as_tensors_when_asked(encoder, tokenizer):
    example = dict(tokenizer(["a text", "b text"], return_tensors="np"))
    source = resolve(encoder, task="tensors", example=example)
    assert [spec.name for spec in source.signature.outputs] == ["last_hidden_state", "pooler_output"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x.7": "sequence"}, r"'x\.7', which no example input has.*x\.0\.\.2, ids\.0\.\.1"),
        ({"y.0": 3}, r"'y\.0'"),
        ({"x.1": "length"}, "'length' and gives it no range"),
        ({"x.1": (1, 2, 4)}, "'x' has 5 in dimension 'x_1'.*1..4"),
        ({"x.1": 6}, r"fixes 'x\.1' to 6, its example has 5"),
        ({"sequence": (1, 2, 3)}, "'sequence', which this model has not. It has: batch"),
        ({"batch": (3, 4, 5)}, r"'x' has 2 in dimension 'batch'.*3\.\.5"),
        ({"batch": (4, 2, 5)}, "min <= opt <= max"),
    ],
)
def test_resolve_refuses_shapes_when_they_do_not_fit_the_example(shapes, message):
    with pytest.raises(InvalidInputError, match=message):
        resolve(Mixer(), example=_example(), shapes=shapes)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "needs example inputs"),
        ({}, "needs example inputs"),
        ({"x": [1.0]}, "'x' must be an array"),
        ({"x": np.array(["a"])}, "'x' must be an array"),
        ({"x": np.zeros((0, 4), np.float32)}, "empty"),
        ({"wrong": np.zeros((1, 4), np.float32)}, r"Linear fails.*\(wrong: float32\). Its forward takes \(input\)"),
        ({"input": np.zeros((1, 5), np.float32)}, "Linear fails on its example inputs"),
    ],
)
def test_resolve_refuses_an_example_when_the_module_cannot_use_it(example, message):
    with pytest.raises(InvalidInputError, match=message):
        resolve(torch.nn.Linear(4, 2), example=example)


def test_resolve_says_at_which_size_when_the_module_cannot_vary():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(2, 8)

    with pytest.raises(InvalidInputError, match=r"Fixed fails with batch=3.*to fix a size"):
        resolve(Fixed(), example={"x": np.zeros((2, 8), np.float32)})


def test_resolve_refuses_outputs_when_they_are_no_tensors_or_clash():
    class Texts(torch.nn.Module):
        def forward(self, x):
            return {"x2": x, "label": "yes"}

    class Echo(torch.nn.Module):
        def forward(self, x):
            return {"x": x}

    example = {"x": np.zeros((2, 8), np.float32)}
    with pytest.raises(InvalidInputError, match="returns str as 'label'"):
        resolve(Texts(), example=example)
    with pytest.raises(InvalidInputError, match="both an input and an output"):
        resolve(Echo(), example=example)


def test_resolve_refuses_torchscript_and_says_what_to_pass():
    scripted = torch.jit.script(torch.nn.Linear(4, 2))
    with pytest.raises(InvalidInputError, match=r"Pass the torch\.nn\.Module itself"):
        resolve(scripted, example={"input": np.zeros((1, 4), np.float32)})


def test_resolve_refuses_a_text_task_when_the_model_is_a_plain_module():
    with pytest.raises(InvalidInputError, match=r"Linear cannot be logged for task 'sentence-embedding'"):
        resolve(torch.nn.Linear(4, 2), task="sentence-embedding", example={"input": np.zeros((1, 4), np.float32)})


def test_write_source_keeps_nothing_of_a_plain_module(tmp_path):
    source = resolve(torch.nn.Linear(4, 2), example={"input": np.zeros((1, 4), np.float32)})
    assert source.write_source(tmp_path / "source") is False


@pytest.mark.parametrize("form", [tuple, list])
def test_resolve_takes_positional_examples_under_the_names_of_forward(form):
    example = _example()
    named = resolve(Mixer(), example=example, shapes=SHAPES)
    positional = resolve(Mixer(), example=form(example.values()), shapes=SHAPES)
    assert positional.signature == named.signature


def test_resolve_takes_a_lone_tensor_as_the_example_and_refuses_too_many():
    assert str(resolve(torch.nn.Linear(4, 2), example=torch.zeros(3, 4)).signature.inputs[0]).startswith("input: ")
    with pytest.raises(InvalidInputError, match="2 example inputs for a forward with 1 named parameters"):
        resolve(torch.nn.Linear(4, 2), example=(torch.zeros(3, 4), torch.zeros(3, 4)))


def test_a_module_that_returns_bfloat16_is_told_to_return_floats():
    class Brain(torch.nn.Module):
        def forward(self, x):
            return x.to(torch.bfloat16)

    with pytest.raises(InvalidInputError, match=r"Brain returns 'output_0' in bfloat16.*output_0.float"):
        resolve(Brain(), example={"x": np.ones((2, 3), np.float32)})


class Halving(torch.nn.Module):
    """Halves and doubles three times, as a U-Net does: takes multiples of 8."""

    def forward(self, x):
        small = torch.nn.functional.avg_pool1d(x, 8)
        return x + torch.nn.functional.interpolate(small, scale_factor=8)


def test_resolve_varies_a_size_by_what_its_bounds_are_multiples_of_when_by_one_fails():
    source = resolve(
        Halving(), example={"x": np.ones((2, 3, 16), np.float32)}, shapes={"x.2": "width", "width": (8, 16, 64)}
    )
    assert [str(spec) for spec in source.signature.outputs] == ["output_0: float32[batch, 3, width]"]
    with pytest.raises(InvalidInputError, match="width=17"):
        resolve(
            Halving(), example={"x": np.ones((2, 3, 16), np.float32)}, shapes={"x.2": "width", "width": (1, 16, 64)}
        )


class Visits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.page, self.hour = torch.nn.Embedding(50, 4), torch.nn.Embedding(24, 4)

    def forward(self, page, hour):
        return self.page(input=page) + self.hour(hour - 1)


def test_resolve_reads_the_table_of_what_is_looked_up_as_it_is():
    """Hours from 1 to 24 are looked up one below: of those no more is known than the example says."""
    example = {"page": np.array([3, 7]), "hour": np.array([1, 24])}
    assert resolve(Visits(), example=example).task_config == {"integer_ranges": {"page": 50}}
