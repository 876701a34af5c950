"""What half precision does to the values that come in: epsilons, scales, places, masks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

import mlflow_tdeploy
from mlflow_tdeploy.build.export import export_module
from mlflow_tdeploy.build.graphs import simplify
from mlflow_tdeploy.build.half import to_fp16
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((64, 3)).astype(np.float32)


class Floors(torch.nn.Module):
    """An epsilon of another form: one for each band, or one with axes."""

    def __init__(self, floors):
        super().__init__()
        self.out = torch.nn.Linear(3, 2)
        self.register_buffer("floors", floors)

    def forward(self, x):
        return self.out(torch.log10(x * x + self.floors))


class Sound(torch.nn.Module):
    """Whole numbers of 16 bits as numbers up to 1."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.out(x / 32768.0)


class Scaled(torch.nn.Module):
    """What comes in is brought into range in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.out, self.how = torch.nn.Linear(3, 2), how

    def forward(self, x):
        return torch.tanh(self.out(self.how(x)))


class Recommender(torch.nn.Module):
    """Attends to what is present of a history."""

    def __init__(self):
        super().__init__()
        self.table, self.query, self.out = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8), torch.nn.Linear(16, 1)

    def forward(self, history, present, item):
        past, wanted = self.table(history), self.table(item)
        scores = (past * self.query(wanted)[:, None]).sum(-1) + (1 - present) * -1e9
        user = (scores.softmax(1)[..., None] * past).sum(1)
        return torch.sigmoid(self.out(torch.cat([user, wanted], 1)))


def in_half(module, rows, folder, **others):
    """Return what answers rows in half precision as a GPU does: processors compute in fp32, ONNX's evaluator does not.

    Args:
        module: Of one output.
        rows: Examples.
        folder: For its graphs.
        others: Of other inputs, by name.
    """
    example = {"x": rows, **others}
    answer = module(*map(torch.tensor, example.values()))
    inputs = tuple(TensorSpec(name, str(one.dtype), ("batch", one.shape[1])) for name, one in example.items())
    signature = Signature((Dim("batch", 1, 8, 64),), inputs, (TensorSpec("y", "float32", ("batch", answer.shape[1])),))
    export_module(module, example, signature, folder / "fp32.onnx")
    simplify(folder / "fp32.onnx", folder / "simple.onnx")
    to_fp16(folder / "simple.onnx", folder / "fp16.onnx")
    graph = onnx.load(folder / "fp16.onnx")
    onnx.checker.check_model(graph, full_check=True)
    half = onnx.reference.ReferenceEvaluator(graph)
    return lambda rows, **others: half.run(None, {"x": rows, **others})[0]


@pytest.mark.parametrize(
    "floors", [torch.tensor([[1e-10]]), torch.tensor([1e-10, 1e-9, 1e-8]), torch.full((1, 3), 1e-9)]
)
def test_an_epsilon_of_any_form_is_none_of_half_precision(tmp_path, floors):
    module = Floors(floors).eval()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": ROWS}, precisions=["fp32", "fp16"])
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.zeros(2, 3)).detach().numpy()
    np.testing.assert_allclose(model.infer({"x": np.zeros((2, 3), np.float32)})["output_0"], expected, rtol=0.01)


def test_a_scale_beyond_what_masks_are_limited_to_stays(tmp_path):
    module, waves = Sound().eval(), (3000 * ROWS).round()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": waves}, precisions=["fp32", "fp16"])
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.tensor(waves)).detach().numpy()
    np.testing.assert_allclose(model.infer({"x": waves})["output_0"], expected, atol=2e-3)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        (lambda x: x / 65535.0, 65535),
        (lambda x: (x - torch.tensor([45.0, 30000.0, 5.0])) / torch.tensor([15.0, 12000.0, 2.0]), 80000),
        (lambda x: (x - 8000.0) / 9000.0, 80000),
        (lambda x: (x.unsqueeze(1).transpose(1, 2) * 1e-4).flatten(1), 80000),
        (lambda x: (x[:, [2, 1, 0]] - torch.tensor([5.0, 30000.0, 45.0])) / torch.tensor([2.0, 12000.0, 15.0]), 80000),
        (lambda x: (x - torch.tensor([45.0, -30000.0, 5.0])) / torch.tensor([15.0, 12000.0, 2.0]), 80000),
    ],
)
def test_what_half_precision_does_not_hold_is_scaled_before(tmp_path, how, most):
    module, rows = Scaled(how).eval(), (np.abs(ROWS) % 1 * 50000).round()
    half = in_half(module, rows, tmp_path)
    rows[:, 1] = most
    np.testing.assert_allclose(half(rows), module(torch.tensor(rows)).detach().numpy(), atol=5e-3)


def test_what_is_scaled_before_half_precision_is_served(tmp_path):
    module, rows = Scaled(lambda x: x / 65535.0).eval(), (np.abs(ROWS) % 1 * 50000).round()
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": rows}, precisions=["fp32", "fp16"])
    rows[:, 1] = 65535
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(torch.tensor(rows)).detach().numpy()
    np.testing.assert_allclose(model.infer({"x": rows})["output_0"], expected, atol=5e-3)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        (lambda x: x.float() / 65535.0, 65535),
        (lambda x: (x.float() - torch.tensor([45.0, 30000.0, 5.0])) / torch.tensor([15.0, 12000.0, 2.0]), 80000),
        (lambda x: x.float() - x.float().mean(1, keepdim=True), 80),
        (lambda x: x / x.sum(1, keepdim=True).clamp(min=1), 81),
        (lambda x: (x > 10000).float() / (x > 10000).sum(1, keepdim=True).clamp(min=1), 80000),
        (lambda x: x.float().topk(3, dim=1).indices.float() / 3.0 + x.float() * 1e-5, 80000),
    ],
)
def test_whole_numbers_are_brought_into_range_before_half_precision(tmp_path, how, most):
    module, rows = Scaled(how).eval(), (np.abs(ROWS) % 1 * min(most, 50000)).astype(np.int32 if most % 2 else np.int64)
    half = in_half(module, rows, tmp_path)
    rows[:, 1] = most
    np.testing.assert_allclose(half(rows), module(torch.tensor(rows)).detach().numpy(), atol=1e-2)


def test_answers_of_another_size_are_made_after_half_precision(tmp_path):
    """A target that is standardized while training, or a logarithm of it."""

    class Prices(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

        def forward(self, x):
            return (torch.exp(self.out(x) * 3.0 + 11.0).clamp(min=1.0) + 1013.0)[:, None].squeeze(1)

    module = Prices().eval()
    expected = module(torch.from_numpy(ROWS)).detach().numpy()
    assert expected.max() > 65504
    np.testing.assert_allclose(in_half(module, ROWS, tmp_path)(ROWS), expected, rtol=2e-2)


class Answers(torch.nn.Module):
    """What two heads have computed is brought into the range of answers, and joined."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.how = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh()), how
        self.first, self.second = torch.nn.Linear(16, 1), torch.nn.Linear(16, 1)

    def forward(self, x):
        h = self.body(x)
        return self.how(self.first(h), self.second(h))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(lambda a, b: torch.cat([a * 9 + 15, b * 9 + 1013], 1), id="joined"),
        pytest.param(lambda a, b: torch.stack([torch.exp(a + 12)[:, 0], torch.exp(b + 4)[:, 0]], 1), id="stacked"),
        pytest.param(lambda a, b: torch.nn.functional.softplus(a) * torch.exp(b + 12), id="multiplied"),
        pytest.param(lambda a, b: torch.where(a > 0, torch.exp(b + 12), b * 9 + 1013), id="chosen"),
        pytest.param(lambda a, b: a * 9 + b * 10000 + 100000, id="added"),
    ],
)
def test_answers_of_several_parts_are_made_after_half_precision(tmp_path, how):
    module = Answers(how).eval()
    expected = module(torch.from_numpy(ROWS)).detach().numpy()
    got = in_half(module, ROWS, tmp_path)(ROWS)
    # of a number that is standardized to a deviation of 9 nothing more is lost than of the number itself
    np.testing.assert_allclose(got, expected, rtol=5e-3, atol=2e-2)


def test_residuals_stay_in_half_precision(tmp_path):
    """Answers that are sums of sums of what layers give: no such is a matter of their range."""

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(3, 8)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))

        def forward(self, x):
            x = self.first(x)
            for layer in self.layers:
                x = torch.relu(x + layer(x))
            return x

    in_half(Residual().eval(), ROWS, tmp_path)
    graph = onnx.load(tmp_path / "fp16.onnx").graph
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert len(casts) <= 6, "each residual makes the way through fp32"


@pytest.mark.parametrize("masked", [lambda a, m: a - 1e9 * (1 - m), lambda a, m: a + (m - 1) * 1e9])
def test_a_mask_of_a_large_positive_number_leaves_no_row_without_an_answer(tmp_path, masked):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.score, self.out = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)

        def forward(self, x, mask):
            return self.out(torch.softmax(masked(self.score(x), mask), 1))

    module, mask = Masked().eval(), (np.arange(5) < np.arange(len(ROWS))[:, None] % 6).astype(np.float32)
    expected = module(torch.from_numpy(ROWS), torch.from_numpy(mask)).detach().numpy()
    got = in_half(module, ROWS, tmp_path, mask=mask)(ROWS, mask=mask)
    np.testing.assert_allclose(got, expected, atol=2e-2)


class Rotary(torch.nn.Module):
    """Angles of places, as models with rotary embeddings have them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("often", 10000.0 ** -(torch.arange(0, 8, 2).float() / 8))
        self.out = torch.nn.Linear(8, 2)

    def forward(self, x):
        places = torch.arange(x.shape[1])[None, :, None].float()
        angles = (places @ self.often[None, None, :]).transpose(1, 2)
        way = torch.cat([angles.cos(), angles.sin()], 1)
        return self.out((x[:, None, :] * way).sum(2))


def test_angles_of_places_are_computed_exactly(tmp_path):
    module = Rotary().eval()
    rows = RANDOM.standard_normal((8, 3000)).astype(np.float32) * (np.arange(3000) > 2900)
    expected = module(torch.from_numpy(rows.astype(np.float32))).detach().numpy()
    got = in_half(module, rows.astype(np.float32), tmp_path)(rows.astype(np.float32))
    np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max())


class Places(torch.nn.Module):
    """Columns of one type, the first of them the number of a thing or of its range; it goes out, too."""

    def __init__(self, of):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out, self.of = torch.nn.Embedding(20000, 8), torch.nn.Linear(10, 2), of

    def forward(self, x):
        return {"number": x[:, 0], "score": self.out(torch.cat([self.table(self.of(x[:, 0])), x[:, 1:]], 1))}


@pytest.mark.parametrize(
    ("of", "asked"),
    [
        (lambda x: x.long(), [5, 2049, 5003, 12345]),
        (lambda x: (x / 1000.0).long(), [99990, 109990, 75000, 149950]),
        (lambda x: (x > 2048).long() + 2 * (x == 5003).long(), [2048, 2049, 5003, 5004]),
    ],
)
def test_numbers_that_are_places_are_no_half_numbers(tmp_path, of, asked):
    module = Places(of).eval()
    random = np.random.default_rng(0)
    rows = np.concatenate([random.integers(0, 2000, (64, 1)), random.standard_normal((64, 2))], 1).astype(np.float32)
    mlflow_tdeploy.save_model(module, tmp_path / "m", example={"x": rows}, precisions=["fp32", "fp16"])
    rows = np.concatenate([np.array([asked]).T, rows[:4, 1:]], 1).astype(np.float32)
    got = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"}).infer({"x": rows})
    expected = module(torch.tensor(rows))
    np.testing.assert_array_equal(got["number"], rows[:, 0])
    np.testing.assert_allclose(got["score"], expected["score"].detach().numpy(), atol=1e-2)


class Joined(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def forward(self, age, income):
        rows = torch.cat([age, income], 1)
        return self.out((rows - torch.tensor([45.0, 30000.0])) / torch.tensor([15.0, 12000.0]))


def test_inputs_that_are_joined_are_brought_into_range_before_half_precision(tmp_path):
    module, random = Joined().eval(), np.random.default_rng(0)
    given = {"age": random.uniform(18, 80, (64, 1)), "income": random.uniform(5000, 50000, (64, 1))}
    given = {name: array.astype(np.float32) for name, array in given.items()}
    mlflow_tdeploy.save_model(module, tmp_path / "m", example=given, precisions=["fp32", "fp16"])
    given["income"][:] = 80000
    got = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"}).infer(given)
    expected = module(*map(torch.tensor, given.values())).detach().numpy()
    np.testing.assert_allclose(got["output_0"], expected, atol=1e-2)


def test_a_mask_that_is_multiplied_stays_finite_in_half_precision(tmp_path):
    torch.manual_seed(0)  # of others, what is near at zeros in fp16 may be over the budget
    module, random = Recommender().eval(), np.random.default_rng(0)
    present = (np.arange(10) < random.integers(1, 11, 32)[:, None]).astype(np.float32)
    example = {"history": random.integers(0, 50, (32, 10)), "present": present, "item": random.integers(0, 50, 32)}
    mlflow_tdeploy.save_model(module, tmp_path / "m", example=example, precisions=["fp32", "fp16"])
    model = mlflow_tdeploy.load_model(tmp_path / "m", model_config={"variant": "onnx-fp16"})
    expected = module(**{name: torch.tensor(array) for name, array in example.items()}).detach().numpy()
    np.testing.assert_allclose(model.infer(example)["output_0"], expected, atol=2e-3)
    example["present"] = np.zeros_like(present)  # who has seen nothing yet
    assert np.isfinite(model.infer(example)["output_0"]).all()


class Normalized(torch.nn.Module):
    """Numbers as they come are brought into range by themselves, or by what was learned."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.out, self.how = torch.nn.Linear(12, 4), how

    def forward(self, x):
        return self.out(self.how(x))


def learned(mean, variance):
    layer = torch.nn.BatchNorm1d(12)
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(variance)
    return layer


def between_its_own(x):
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return (x - low) / (high - low + 1e-6)


def scored(x):
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


@pytest.mark.parametrize(
    ("how", "most"),
    [
        pytest.param(torch.nn.LayerNorm(12), 90_000, id="LayerNorm"),
        pytest.param(torch.nn.RMSNorm(12), 90_000, id="RMSNorm"),
        pytest.param(learned(60.0, 8000.0), 70_000, id="BatchNorm"),
        pytest.param(lambda x: x / x.sum(1, keepdim=True), 15_000, id="share"),
        pytest.param(lambda x: torch.nn.functional.normalize(x, dim=1), 40_000, id="length"),
        pytest.param(between_its_own, 80_000, id="extremes"),
        pytest.param(scored, 80_000, id="score"),
        pytest.param(lambda x: torch.log1p(torch.relu(x)), 90_000, id="logarithm"),
        pytest.param(lambda x: torch.cat([torch.log(x[:, :4] + 1), x[:, 4:] / 1e5], 1), 90_000, id="some columns"),
        pytest.param(lambda x: (torch.nan_to_num(x) - 1077.0) / 7385.0, 90_000, id="imputed"),
        pytest.param(lambda x: (torch.where(x > 0, x, 1077.0) - 1077.0) / 7385.0, 90_000, id="replaced"),
        pytest.param(lambda x: (x - x[:, -1:]) / 1e4, 90_000, id="beside the last"),
        pytest.param(lambda x: torch.log(x / x[:, :1]), 90_000, id="returns"),
        pytest.param(lambda x: (x - x.mean(0)) / (x.std(0) + 1e-5), 90_000, id="over the batch"),
    ],
)
def test_what_is_normalized_by_itself_stays_in_range(tmp_path, how, most):
    rng = np.random.default_rng(0)
    module, few = Normalized(how).eval(), rng.uniform(1, 200, (16, 12)).astype(np.float32)
    half = in_half(module, few, tmp_path)
    for rows in (few, rng.uniform(most / 2, most, (8, 12)).astype(np.float32)):
        expected = module(torch.from_numpy(rows)).detach().numpy()
        np.testing.assert_allclose(half(rows), expected, atol=4e-3 * np.abs(expected).max())
