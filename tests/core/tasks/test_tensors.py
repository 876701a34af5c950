from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mlflow_tdeploy.core.budget import Budget, Limit
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec, numpy_dtype
from mlflow_tdeploy.source.resolve import resolve
from tests.served import pipeline_of


class Score(torch.nn.Module):
    def forward(self, x, mask):
        return {"score": (x * mask).sum(1)}


@pytest.fixture(scope="module")
def module():
    return Score()


@pytest.fixture(scope="module")
def pipeline(module, tmp_path_factory):
    example = {"x": np.ones((2, 3), np.float32), "mask": np.ones((2, 3), np.int64)}
    source = resolve(module, example=example, shapes={"batch": (1, 2, 4)})
    return pipeline_of(source, tmp_path_factory.mktemp("assets"))


X = np.arange(6, dtype=np.float32).reshape(2, 3)
MASK = np.array([[1, 1, 0], [1, 0, 0]])


def test_predict_equals_the_module(pipeline, module):
    got = pipeline({"x": X, "mask": MASK})
    assert list(got) == ["score"]
    np.testing.assert_allclose(got["score"], module(torch.from_numpy(X), torch.from_numpy(MASK))["score"].numpy())


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": X.tolist(), "mask": MASK.tolist()},
        pd.DataFrame({"x": list(X), "mask": list(MASK)}),
        pd.DataFrame({"x": X.tolist(), "mask": MASK.tolist()}),
    ],
)
def test_predict_takes_lists_and_tables(pipeline, inputs):
    np.testing.assert_allclose(pipeline(inputs)["score"], [1, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[:0], "mask": MASK[:0]}, "empty"),
        ({"x": np.full((2, 3), np.nan, np.float32)}, "'x' has NaN"),
        ({"x": X.astype(np.float64)}, r"'x' must be float32, got float64.*astype"),
        ({"x": X[0]}, "2 dimensions"),
        (
            {"x": np.ones((5, 3), np.float32), "mask": np.ones((5, 3), np.int64)},
            r"'x', dimension 'batch'.* is 5.*1\.\.4",
        ),
        ({"x": X[:1]}, "'batch' is 1 in one input and 2 in 'mask'"),
        ({"x": np.ones((2, 4), np.float32)}, "axis 1 must be 3, got 4"),
        ({"y": X}, "Unknown input tensor 'y'"),
        ({"mask": None}, "'mask' is None"),
        ({"x": [[1.0, 2.0], [3.0]]}, "not a regular array of numbers: rows of different lengths"),
        ({"x": [["a", "b", "c"]] * 2}, "not a regular array of numbers: it has texts"),
        ({"x": [[1.0, None, 2.0]] * 2}, "not a regular array of numbers: it has None"),
        ({"mask": [[2**63] * 3] * 2}, r"'mask' has the value 9223372036854775808, outside int64's range"),
        ({"mask": [[0.5, 0, 0]] * 2}, "'mask' must be int64, got numbers with a fraction"),
        ({"mask": [[2**70, 0, 0]] * 2}, "'mask'"),
        ({"x": [[1e39, 0, 0]] * 2}, r"'x' has the value 1e\+39, which is too large for float32"),
        ({"\ud800": X}, r"Unknown input tensor '\\ud800'"),
    ],
)
def test_predict_refuses_arrays_before_inference_when_they_do_not_fit(pipeline, change, message):
    with pytest.raises(InvalidInputError, match=message):
        pipeline({"x": X, "mask": MASK, **change})


def test_predict_asks_for_names_when_there_are_several_inputs(pipeline):
    with pytest.raises(InvalidInputError, match=r"several inputs.*\(x, mask\)"):
        pipeline(X)


def test_predict_takes_a_bare_array_when_there_is_one_input(tmp_path):
    source = resolve(torch.nn.Identity(), example={"input": np.ones((1, 2), np.float32)})
    np.testing.assert_array_equal(pipeline_of(source, tmp_path)(X[:, :2])["output_0"], X[:, :2])


def test_example_feeds_are_of_the_whole_table_when_integers_are_looked_up_in_one(tmp_path):
    table = torch.nn.Embedding(10, 4)
    source = resolve(table, example={"input": np.array([[5, 3]])})
    feeds = pipeline_of(source, tmp_path).task.example_feeds("max", ragged=False)
    assert feeds["input"].shape == (64, 2)
    assert 5 < feeds["input"].max() < 10
    source.reference(feeds)


def _outputs(*specs):
    dims = (Dim("batch", 1, 4, 8),)
    inputs = (TensorSpec("x", "float32", ("batch", 4)),)
    signature = Signature(dims, inputs, tuple(TensorSpec(name, "float32", shape) for name, shape in specs))
    return TASKS.get("tensors")({}, signature, Path())


def _violations(task, reference, got):
    comparison = task.comparison()
    comparison.add(reference, got, {})
    return task.default_budget.violations(comparison.metrics())


def test_comparison_sees_every_output(pipeline):
    comparison = pipeline.task.comparison()
    comparison.add({"a": np.ones((2, 2)), "b": np.ones(3)}, {"a": np.ones((2, 2)), "b": np.array([1, 1, 3.0])}, {})
    metrics = comparison.metrics()
    assert metrics["max_difference"] == 2.0
    assert metrics["rows"] == 3


@pytest.mark.parametrize("wrong", ["boxes", "area", "logit"])
def test_an_output_is_not_hidden_by_others_of_another_scale(wrong):
    """A detector's boxes are hundreds of pixels wide, its logits small: each is compared by itself."""
    task = _outputs(("boxes", ("batch", 4)), ("area", ("batch", 1)), ("logit", ("batch", 1)))
    random = np.random.default_rng(0)
    reference = {
        "boxes": random.uniform(100, 500, (8, 4)), "area": random.uniform(1e4, 1e5, (8, 1)),
        "logit": random.standard_normal((8, 1)),
    }  # fmt: skip
    assert _violations(task, reference, reference) == ()
    assert "worst_cosine is -1" in _violations(task, reference, {**reference, wrong: -reference[wrong]})[0]
    assert "max_norm_difference" in _violations(task, reference, {**reference, wrong: 2 * reference[wrong]})[0]


def test_metrics_of_several_outputs_are_the_worst_of_each_and_means_over_all():
    comparison = _outputs(("a", ("batch", 2)), ("b", ("batch", 2))).comparison()
    ones, turned = np.ones((2, 2)), np.array([[1.0, 1.0], [1.0, -1.0]])
    comparison.add({"a": ones, "b": ones}, {"a": ones, "b": turned}, {})
    metrics = comparison.metrics()
    assert (metrics["worst_cosine"], metrics["rows"]) == (pytest.approx(0.0), 4)
    assert metrics["mean_cosine"] == pytest.approx(0.75)
    assert metrics["max_difference"] == 2.0


def test_an_output_of_one_number_per_item_is_compared_item_by_item():
    task = _outputs(("score", ("batch",)))
    reference = np.array([1000.0, 1, 1, 1, 1, 1, 1, 1])
    got = np.where(reference == 1, -1, reference)
    assert "worst_cosine is -1" in _violations(task, {"score": reference}, {"score": got})[0]
    one = np.where(np.arange(8) == 3, -1.0, 1.0)
    assert "worst_cosine is -1" in _violations(task, {"score": np.ones(8)}, {"score": one})[0]


def test_an_output_of_fixed_length_is_one_vector():
    task = _outputs(("vector", (3,)))
    assert _violations(task, {"vector": np.array([5.0, 3, 1e-3])}, {"vector": np.array([5.0, 3, -1e-3])}) == ()


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("uint8", [300, -1], r"'x' has the value -1, outside uint8's range 0\.\.255"),
        ("uint8", [300, 1], "value 300"),
        ("int64", [2**63, -1], "value 9223372036854775808, outside int64's range"),
        ("int64", [0, -(2**70)], "more than 64 bits"),
        ("float32", [10**5000], "more than 64 bits"),
        ("int32", [2**32 + 5], r"4294967301, outside int32's range -2147483648\.\.2147483647"),
        ("bool", [0, 2], r"value 2, outside bool's range 0\.\.1"),
        ("float16", [70000], "70000, which is too large for float16"),
        ("float32", [-1e300], "too large for float32"),
        ("bfloat16", [1e39], "too large for bfloat16"),
        ("bfloat16", [float("nan")], "NaN"),
    ],
)
def test_items_refuses_a_list_whose_numbers_do_not_fit_the_dtype(dtype, value, message, tmp_path):
    with pytest.raises(InvalidInputError, match=message):
        vector_task(dtype, tmp_path).items({"x": value})


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("uint8", [0, 255]),
        ("int32", [True, -5]),
        ("bool", [0, 1]),
        ("float64", [2**63, -1]),
        ("uint64", [2**64 - 1, 0]),
        ("float16", [1, 2.5]),
        ("bfloat16", [1.5, 2]),
    ],
)
def test_items_keeps_every_number_of_a_list_that_fits_the_dtype(dtype, value, tmp_path):
    array = vector_task(dtype, tmp_path).items({"x": value})[0]["x"]
    assert array.dtype == numpy_dtype(dtype)
    assert array.astype(np.float64).tolist() == [float(number) for number in value]


def vector_task(dtype, assets):
    specs = [(TensorSpec(name, dtype, ("batch",)),) for name in "xy"]
    return TASKS.get("tensors")({}, Signature((Dim("batch", 1, 2, 4),), *specs), assets)


@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
def test_comparison_counts_whole_numbers_one_by_one(dtype):
    """As rows of numbers the ids 101, 2054, 2003 and 101, 2055, 2003 have a cosine of 0.998."""
    spec = TensorSpec("y", np.dtype(dtype).name, ("batch", 3))
    task = TASKS.get("tensors")({}, Signature((Dim("batch", 1, 2, 8),), (spec,), (spec,)), Path())
    comparison = task.comparison()
    right = np.arange(12).reshape(4, 3).astype(dtype)
    wrong = right.copy()
    wrong[2, 1] = 0
    comparison.add({"y": right}, {"y": wrong}, {})
    assert comparison.metrics()["exact_share"] == pytest.approx(11 / 12)
    assert task.default_budget.violations(comparison.metrics()) != ()


def test_whole_numbers_are_counted_output_by_output():
    task = _outputs(("score", ("batch",)))
    comparison = task.comparison()
    ids, label = np.ones((2, 512), np.int64), np.ones(2, np.int64)
    comparison.add({"ids": ids, "label": label}, {"ids": ids, "label": label + 1}, {})
    assert comparison.metrics()["exact_share"] == 0.0


def test_numbers_along_a_dimension_of_their_own_are_one_vector():
    """Samples of a sound are no items: noise around zero is no change of direction."""
    task = _outputs(("wave", ("samples",)))
    random = np.random.default_rng(0)
    wave = random.standard_normal(8000)
    assert _violations(task, {"wave": wave}, {"wave": wave + 0.03 * random.standard_normal(8000)}) == ()


def test_one_wrong_token_of_an_output_with_classes_per_token_is_refused():
    dims = (Dim("batch", 1, 4, 8), Dim("sequence", 1, 8, 512))
    outputs = (TensorSpec("logits", "float32", ("batch", "sequence", 9)),)
    signature = Signature(dims, (TensorSpec("x", "float32", ("batch", "sequence")),), outputs)
    task, random = TASKS.get("tensors")({}, signature, Path()), np.random.default_rng(0)
    logits = random.standard_normal((4, 512, 9)) + 8 * (np.arange(9) == 0)  # one class is usual
    assert _violations(task, {"logits": logits}, {"logits": logits + 0.02 * random.standard_normal(logits.shape)}) == ()
    negated, rolled, last, others = (logits.copy() for _ in range(4))
    negated[1, 5] *= -1
    rolled[2, 7] = np.roll(rolled[2, 7], 1)
    last[:, -1] = 0
    others[..., 1:] = 0
    for wrong in (negated, rolled, last, others):
        assert _violations(task, {"logits": logits}, {"logits": wrong})


def test_parts_that_are_alike_or_next_to_nothing_are_no_reason_to_refuse_rounding():
    """Images, masks, channels of a detector: neighbours are alike, scales differ, backgrounds are tiny."""
    random = np.random.default_rng(0)
    task = TASKS.get("tensors")(
        {}, Signature((Dim("batch", 1, 4, 8),), (TensorSpec("x", "float32", ("batch", 4)),),
                      (TensorSpec("y", "float32", ("batch", 128, 128)),)), Path(),
    )  # fmt: skip
    smooth = np.cumsum(np.cumsum(random.standard_normal((8, 128, 128)), axis=1), axis=2)
    mask = np.full((8, 128, 128), 1e-5)
    mask[:, 40:60, 30:70] = 0.997
    detector = random.random((8, 128, 128)) * np.where(np.arange(128) < 4, 640.0, 1e-3)[None, :, None]
    for image in (smooth, mask, detector, detector.transpose(0, 2, 1)):
        for got in (
            image.astype(np.float16).astype(np.float64),
            image * (1 + 1e-3 * random.standard_normal(image.shape)),
        ):
            assert _violations(task, {"y": image}, {"y": got}) == ()
    for image in (detector, detector.transpose(0, 2, 1)):
        assert _violations(task, {"y": image}, {"y": np.where(image > 1, image, 0.0)})  # boxes only, no score


def test_channels_come_first_or_last():
    random = np.random.default_rng(0)
    task = TASKS.get("tensors")(
        {}, Signature((Dim("batch", 1, 4, 8),), (TensorSpec("x", "float32", ("batch", 4)),),
                      (TensorSpec("y", "float32", ("batch", 5, 300)),)), Path(),
    )  # fmt: skip
    scales, middles = [300, 300, 200, 200, 0.15], [640, 640, 300, 300, 0.6]
    right = random.standard_normal((8, 5, 300)) * np.array(scales)[:, None] + np.array(middles)[:, None]
    wrong = right.copy()
    wrong[:, 4] = 0
    for before, after in ((right, wrong), (right.transpose(0, 2, 1), wrong.transpose(0, 2, 1))):
        assert _violations(task, {"y": before}, {"y": before.astype(np.float16).astype(np.float64)}) == ()
        assert "max_spread_error" in _violations(task, {"y": before}, {"y": after})[0]


@pytest.mark.parametrize("mask", [-100.0, -1e4, -1e5, -1e9, float(np.finfo(np.float32).min)])
def test_masked_positions_of_an_output_may_have_another_low_number(mask):
    random = np.random.default_rng(0)
    dims = (Dim("batch", 1, 4, 8), Dim("sequence", 1, 8, 64))
    outputs = (TensorSpec("logits", "float32", ("batch", "sequence", 5)),)
    task = TASKS.get("tensors")(
        {}, Signature(dims, (TensorSpec("x", "float32", ("batch", "sequence")),), outputs), Path()
    )
    right = random.standard_normal((8, 64, 5)).astype(np.float32)
    masked = np.arange(64) >= random.integers(5, 64, 8)[:, None]
    right[masked] = mask
    half = np.where(right < -1e4, -1e4, right).astype(np.float16).astype(np.float32)
    assert _violations(task, {"logits": right}, {"logits": half}) == ()
    assert _violations(task, {"logits": right}, {"logits": np.where(right == mask, np.float32(0), right)})


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (np.arange(2000) < 13, np.zeros(2000, bool)),  # alarms that are never raised
        (np.arange(500) < 3, np.zeros(500, bool)),
        (np.zeros(2000, bool), np.arange(2000) < 13),  # … or always wrongly
        (np.where(np.arange(4096) < 36, 2, np.arange(4096) % 2), np.arange(4096) % 2),  # one class of three is gone
    ],
)
def test_a_rare_value_that_is_gone_is_refused(right, wrong):
    dtype = "bool" if right.dtype == bool else "int64"
    spec = TensorSpec("y", dtype, ("batch",))
    task = TASKS.get("tensors")({}, Signature((Dim("batch", 1, 2, 8),), (spec,), (spec,)), Path())
    comparison = task.comparison()
    for part in np.split(np.random.default_rng(0).permutation(right.size), 4):
        comparison.add({"y": right[part]}, {"y": wrong[part]}, {})
    metrics = comparison.metrics()
    assert metrics["exact_share"] > 0.99
    assert "of one value differ (allow that with budget=" in task.default_budget.violations(metrics)[0]
    assert Budget((*task.default_budget.limits, Limit("value_share", ">=", 0.0))).violations(metrics) == ()


def test_a_choice_may_turn_where_two_were_as_good():
    random = np.random.default_rng(0)
    right = random.integers(0, 10, 4000)
    turned = np.where(random.random(4000) < 0.005, (right + 1) % 10, right)
    spec = TensorSpec("y", "int64", ("batch",))
    task = TASKS.get("tensors")({}, Signature((Dim("batch", 1, 2, 8),), (spec,), (spec,)), Path())
    assert _violations(task, {"y": right}, {"y": turned}) == ()


def _task(outputs, dims=None):
    dims = dims or (Dim("batch", 1, 2, 64),)
    return TASKS.get("tensors")({}, Signature(dims, (TensorSpec("x", "float32", ("batch", 4)),), outputs), Path())


@pytest.mark.parametrize("axis", ["batch", "Squeeze_dim_0", 32])
def test_comparison_takes_a_number_per_item_for_a_row_whatever_its_axis_is_called(axis):
    """An exporter names the axis of an output after a node; of temperatures around 290 a constant would do as one."""
    comparison = _task((TensorSpec("y", "float32", (axis,)),)).comparison()
    right = 290 + 5 * np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    for batch in right:
        comparison.add({"y": batch}, {"y": np.full(32, 290, np.float32)}, {"x": np.zeros((32, 4), np.float32)})
    assert comparison.metrics()["max_spread_error"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("change", "passes"), [(lambda y: y + 0.1, True), (lambda y: y + 2, False), (lambda y: 290 + (y - 290) / 2, False)]
)
def test_a_regression_keeps_what_it_says_beside_an_offset(change, passes):
    task = _task((TensorSpec("y", "float32", ("batch", 1)),))
    comparison = task.comparison()
    right = 290 + 5 * np.random.default_rng(0).standard_normal((64, 1)).astype(np.float32)
    comparison.add({"y": right}, {"y": change(right)}, {"x": np.zeros((64, 4), np.float32)})
    assert (not task.default_budget.violations(comparison.metrics())) is passes


def test_comparison_of_answers_a_token_keeps_no_sums_for_every_length():
    """Of a vocabulary for every token these would take many times the memory of the answers."""
    dims = (Dim("batch", 1, 2, 64), Dim("sequence", 1, 8, 512))
    comparison = _task((TensorSpec("logits", "float32", ("batch", "sequence", 50)),), dims).comparison()
    for length in range(1, 60):
        one = np.random.default_rng(length).standard_normal((2, length, 50)).astype(np.float32)
        comparison.add({"logits": one}, {"logits": np.roll(one, 1, axis=-1)}, {"x": np.zeros((2, 4), np.float32)})
    assert not comparison._rows["logits"].spread._columns
    assert comparison.metrics()["max_spread_error"] > 1


@pytest.mark.parametrize("shape", [("edges",), ("b", "time"), (2, "batch")])
def test_numbers_that_belong_to_no_item_are_told_apart_too(shape):
    """Of answers around 100, one a graph's edge, a step or (quantiles first) a row: a cosine sees nothing of them."""
    task, random = _outputs(("y", shape)), np.random.default_rng(0)
    right, wrong = task.comparison(), task.comparison()
    for size in (5, 17, 40, 64):
        y = 100 + random.standard_normal([1 if one == "b" else one if isinstance(one, int) else size for one in shape])
        x = {"x": np.ones((7, 4))}
        right.add({"y": y}, {"y": y + 0.01}, x)
        wrong.add({"y": y}, {"y": np.full_like(y, 100) - 0.9 * (y - 100)}, x)
    assert right.metrics()["max_spread_error"] < 0.02
    assert wrong.metrics()["worst_cosine"] > 0.99
    assert wrong.metrics()["max_spread_error"] > 1.0
    assert not task.default_budget.violations(right.metrics())
    assert task.default_budget.violations(wrong.metrics())


@pytest.mark.parametrize("shape", [(2, "batch", 6), (2, 6), (2, 4, 5), ("batch", "time", 2, 3), (6,)])
def test_each_place_of_a_fixed_size_counts_by_itself(shape):
    """Heads that are stacked, the state of one thing: what never changes any more is not hidden by what does."""
    signature = Signature(
        (Dim("batch", 1, 8, 64), Dim("time", 1, 8, 64)),
        (TensorSpec("x", "float32", ("batch", "time", 8) if "batch" in shape else (8,)),),
        (TensorSpec("y", "float32", shape),),
    )
    task, random = TASKS.get("tensors")({}, signature, Path()), np.random.default_rng(0)
    place = (1, ...) if shape[0] == 2 else (..., 1) if shape == (6,) else (..., 1, 2)
    right, wrong = task.comparison(), task.comparison()
    for _ in range(16):
        sizes = [16 if isinstance(size, str) else size for size in shape]
        ref = (1000 * random.standard_normal(sizes)).astype(np.float32)
        ref[place] = 10 + np.tanh(ref[place] / 1000)
        got = ref.copy()
        got[place] = 10
        inputs = {"x": np.zeros((16, 16, 8) if "batch" in shape else (8,), np.float32)}
        wrong.add({"y": ref}, {"y": got}, inputs)
        right.add({"y": ref}, {"y": ref * np.float32(1.001)}, inputs)
    assert task.default_budget.violations(wrong.metrics())
    assert not task.default_budget.violations(right.metrics())


def test_a_marker_behind_masked_scores_is_compared_and_a_choice_there_is_not():
    task = _outputs(("scores", ("batch", 4)), ("items", ("batch", 4)))
    random = np.random.default_rng(0)
    scores = np.sort(random.standard_normal((16, 4)), axis=1)[:, ::-1].copy()
    scores[:, 2:] = -np.inf
    items = random.integers(0, 1000, (16, 4))
    marked = np.where(np.isinf(scores), -1, items)
    other = np.where(np.isinf(scores), random.integers(0, 1000, (16, 4)), items)
    for reference, share in ((items, 1.0), (marked, 0.0)):
        comparison = task.comparison()
        comparison.add({"scores": scores, "items": reference}, {"scores": scores, "items": other}, {})
        assert comparison.metrics()["exact_share"] == share


def test_a_fixed_number_of_items_is_no_axis_of_kinds():
    """A graph that was exported for four pictures: what is asked at a place hardly differs between requests."""
    signature = Signature((), (TensorSpec("x", "float32", (4, 8)),), (TensorSpec("y", "float32", (4, 3)),))
    comparison, random = TASKS.get("tensors")({}, signature, Path()).comparison(), np.random.default_rng(0)
    ref = random.standard_normal((4, 3)).astype(np.float32)
    for _ in range(16):
        near = ref * random.uniform(0.999, 1.001, ref.shape).astype(np.float32)
        comparison.add({"y": near}, {"y": near * np.float32(1.002)}, {"x": np.ones((4, 8), np.float32)})
    assert not TASKS.get("tensors").default_budget.violations(comparison.metrics())


def features(*names, width=4):
    specs = tuple(TensorSpec(name, "float32", ("batch", width)) for name in names)
    signature = Signature((Dim("batch", 1, 2, 8),), specs, (TensorSpec("y", "float32", ("batch", 1)),))
    return TASKS.get("tensors")({}, signature, Path())


def test_a_table_of_features_is_the_only_input():
    task, rows = features("x"), np.arange(12.0).reshape(3, 4)
    table = pd.DataFrame(rows, columns=list("abcd"))
    for given in (table, table.astype({"a": int, "b": "float32"}), table.astype(object), rows.astype(object)):
        (item,) = task.items(given)
        assert item["x"].dtype == np.float32
        np.testing.assert_array_equal(item["x"], rows)
    named = pd.DataFrame({"x": list(rows)})  # a column that is called as the input holds its rows
    np.testing.assert_array_equal(task.items(named)[0]["x"], rows)
    with pytest.raises(InvalidInputError, match="it has texts"):
        task.items(table.assign(a=["red", "blue", "red"]))
    with pytest.raises(InvalidInputError, match="dimension|axis|shape"):
        task.items(table[["a", "b"]])


def test_a_column_is_an_input_of_one_number_a_row():
    task = features("age", "income", width=1)
    table = pd.DataFrame({"age": [20, 30, 40], "income": [1e4, 2e4, 3e4]})
    (item,) = task.items(table)
    np.testing.assert_array_equal(item["income"], [[1e4], [2e4], [3e4]])
    np.testing.assert_array_equal(
        task.items({name: table[[name]].to_numpy("float32") for name in table})[0]["age"], item["age"]
    )
