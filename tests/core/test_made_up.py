"""Requests that nobody gave."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_tdeploy.core.made_up import make_up
from mlflow_tdeploy.core.tensors import TensorSpec

X = TensorSpec("x", "float32", ("batch", 3))
IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
RANDOM = np.random.default_rng(0)
ROWS = (RANDOM.random((16, 3)) * [60, 2e5, 1] + [18, 0, 0]).astype(np.float32)


def made(specs, shapes, items, tables=None, ragged=False, seed=0):
    named = {spec.name: shape for spec, shape in zip(specs, shapes, strict=True)}
    return make_up(specs, named, items, tables or {}, ragged=ragged, random=np.random.default_rng(seed))


def rows(array):
    return [tuple(row) for row in array.tolist()]


def test_rows_are_drawn_as_they_are_and_together_for_all_inputs():
    item = {"x": ROWS, "ids": RANDOM.integers(1000, 2000, (16, 5))}
    feeds = made((X, IDS), ((64, 3), (64, 16)), [item])
    drawn = [rows(ROWS).index(row) for row in rows(feeds["x"])]
    first = int(np.flatnonzero(item["ids"][drawn[0]] == feeds["ids"][0, 0])[0])
    assert (feeds["ids"] == item["ids"][drawn][:, (first + np.arange(16)) % 5]).all()
    assert len(set(drawn)) > 10


def test_rows_of_several_items_are_drawn_as_if_they_were_one():
    """A row at a time, numbers around 4500 differ by 1 and are not to be varied by a quarter."""
    given = (4500 + RANDOM.standard_normal((32, 3))).astype(np.float32)
    feeds = made((X,), ((64, 3),), [{"x": row[None]} for row in given])
    assert set(rows(feeds["x"])) <= set(rows(given))
    assert len(set(rows(feeds["x"]))) > 20


def test_a_few_rows_are_varied_within_what_they_are():
    """Logarithms stay finite, whole numbers (a category, a year) stay themselves, half precision does not overflow."""
    few = np.array([[3.0, 0.5, 60000.5], [7.0, 0.75, 0.1]])
    for seed in range(20):
        x = made((X,), ((8, 3),), [{"x": few}], seed=seed)["x"]
        assert set(x[:, 0]) <= {3.0, 7.0}
        assert len(set(x[:, 1])) == 8
        assert few.min() <= x[:, 1:].min()
        assert x.max() <= few.max()
    half = np.array([[60000.0, 59968.0, 3.5]], np.float16)
    assert np.isfinite(made((X,), ((64, 3),), [{"x": half}])["x"]).all()


@pytest.mark.parametrize(("value", "kept"), [(0.0, False), (1.0, False), (5e4, True)])
def test_an_example_of_zeros_or_ones_says_nothing(value, kept):
    x = made((X,), ((64, 3),), [{"x": np.full((2, 3), value, np.float32)}])["x"]
    assert (bool((x == value).all()), bool(x.std() > 0.5)) == (kept, not kept)


def test_named_features_are_kept_beside_each_other():
    specs = tuple(TensorSpec(name, "float32", ("batch", 1)) for name in ("age", "income", "member"))
    item = {name: np.array([[value]], np.float32) for name, value in (("age", 42), ("income", 5e4), ("member", 1))}
    feeds = made(specs, ((4, 1),) * 3, [item])
    assert {name: set(array.ravel().tolist()) for name, array in feeds.items()} == {
        "age": {42.0}, "income": {5e4}, "member": {1.0},
    }  # fmt: skip


def test_whole_numbers_are_of_the_whole_table_or_of_their_own_column():
    colour = TensorSpec("colour", "int64", ("batch", 2))
    item = {"ids": np.array([[5, 6, 7]]), "colour": np.array([[2, 49], [0, 7]])[:1]}
    feeds = made((IDS, colour), ((64, 16), (64, 2)), [item], {"ids": 1000, "colour": 50})
    assert len(np.unique(feeds["ids"])) > 500
    assert set(rows(feeds["colour"])) == {(2, 49)}
    padded = TensorSpec("ids", "int64", ("batch", 16))
    assert len(np.unique(made((padded,), ((64, 16),), [{"ids": np.arange(16)[None]}], {"ids": 1000})["ids"])) > 500


@pytest.mark.parametrize(
    ("dtype", "given", "keep", "drop"),
    [
        ("int64", None, 1, 0),
        ("int64", [[0, 0, 0]], 1, 0),  # there to be traced
        ("int64", [[1, 1, 1]], 1, 0),
        ("int64", [[1, 1, 0], [1, 1, 1]], 1, 0),
        ("bool", [[False, False, False]], False, True),  # torch's key_padding_mask
        ("bool", [[False, False, True], [False, True, True]], False, True),
        ("bool", [[True, True, False]], True, False),
        ("float32", [[0, 0, -1e9], [0, -1e9, -1e9]], 0, -1e9),  # is added to scores
    ],
)
def test_a_mask_keeps_what_comes_first_as_the_one_that_was_given(dtype, given, keep, drop):
    mask = TensorSpec("mask", dtype, ("batch", "sequence"))
    items = [] if given is None else [{"mask": np.array(given, dtype)}]
    dense = made((mask,), ((6, 9),), items)["mask"]
    assert (dense == keep).all()
    ragged = made((mask,), ((6, 9),), items, ragged=True)["mask"]
    assert ragged.dtype == np.dtype(dtype)
    assert set(np.unique(ragged).tolist()) == {keep, np.dtype(dtype).type(drop).item()}
    assert (ragged[:, 0] == keep).all()
    assert (ragged[0] == keep).all()
    assert ((ragged[:, 1:] != ragged[:, :-1]).sum(axis=1) <= 1).all()


def test_a_mask_of_another_form_is_taken_as_it_is():
    left = np.array([[0, 0, 1], [1, 1, 1]])
    mask = made((TensorSpec("mask", "int64", ("batch", "sequence")),), ((8, 3),), [{"mask": left}], ragged=True)
    assert set(rows(mask["mask"])) == set(rows(left))


def test_without_items_all_is_random():
    feeds = made((X, IDS, TensorSpec("flag", "bool", ("batch",))), ((64, 3), (64, 16), (64,)), [], {"ids": 30})
    assert feeds["x"].std() == pytest.approx(1, abs=0.2)
    assert set(np.unique(feeds["ids"])) == set(range(30))
    assert 10 < feeds["flag"].sum() < 54


def test_numbers_without_an_axis_stay_so():
    scale = TensorSpec("scale", "float32", ())
    assert made((scale,), ((),), [{"scale": np.array(2.5, np.float32)}])["scale"].shape == ()


@pytest.mark.parametrize(("value", "table", "asked"), [(0, 9, 9), (1, 9, 9), (0, None, 2), (5, None, 1)])
def test_one_whole_number_throughout_says_nothing_where_its_table_is_known(value, table, asked):
    """A graph is traced with zeros or ones; with zeros and no table 0 and 1 are asked, and nothing else is risked."""
    spec = TensorSpec("ids", "int64", ("batch", 4))
    found = made((spec,), ((64, 4),), [{"ids": np.full((2, 4), value)}], {} if table is None else {"ids": table})
    assert len(np.unique(found["ids"])) == asked


def test_whole_numbers_without_a_table_stay_those_that_were_given():
    """A year, an hour from 1 on, a length: what is below them may be no index."""
    spec = TensorSpec("year", "int64", ("batch",))
    given = np.random.default_rng(0).integers(1990, 2025, 64)
    assert set(made((spec,), ((200,),), [{"year": given}])["year"]) <= set(given)


@pytest.mark.parametrize("shape", [("time",), (1, "time"), (1, "time", 2)])
def test_what_is_in_an_item_keeps_its_order_where_there_is_one_item(shape):
    """Sound and position ids of a batch that is always 1: the first axis that varies is no axis of items."""
    spec = TensorSpec("x", "float32", shape)
    place = tuple(-1 if size == "time" else 1 for size in shape)
    given = ((np.arange(40, dtype=np.float32) * 7) % 40).reshape(place).repeat(shape[2] if len(shape) > 2 else 1, -1)
    wanted = tuple(64 if size == "time" else size for size in shape)
    x = made((spec,), (wanted,), [{"x": given}])["x"].reshape(64, -1)[:, 0]
    ordered = bool(np.isin(np.diff(x), (7, 7 - 40)).all())
    assert ordered is (len(shape) > 1)


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("dtype", ["int64", "float64", "float32"])
@pytest.mark.parametrize("wanted", [5, 24, 60])
def test_times_rise_on_at_any_length(wanted, dtype, rows):
    """Seconds: where they began again, or stood still, the logarithm of a difference would be none."""
    random = np.random.default_rng(0)
    specs = (TensorSpec("x", "float32", ("batch", "time")), TensorSpec("ts", dtype, ("batch", "time")))
    begin = 0 if dtype == "float32" else 1_700_000_000
    given = {
        "x": random.standard_normal((rows, 24)).astype(np.float32),
        "ts": (begin + random.integers(1, 900, (rows, 24)).cumsum(axis=1)).astype(dtype),
    }
    found = made(specs, ((16, wanted), (16, wanted)), [given])
    assert found["ts"].dtype == given["ts"].dtype
    assert (np.diff(found["ts"], axis=1) > 0).all()
    if wanted <= 24 and rows >= 8:
        together = {(x, ts) for row in range(8) for x, ts in zip(given["x"][row], given["ts"][row], strict=True)}
        seen = {pair for row in range(16) for pair in zip(found["x"][row], found["ts"][row], strict=True)}
        assert seen <= together  # a step's values stay together


def test_times_that_all_rows_share_keep_their_order():
    specs = (TensorSpec("t", "float32", ("time",)), TensorSpec("x", "float32", ("batch", "time")))
    random = np.random.default_rng(0)
    given = {"t": random.uniform(0.1, 1, 24).cumsum().astype(np.float32), "x": np.ones((8, 24), np.float32)}
    for wanted in (7, 24, 50):
        assert (np.diff(made(specs, ((wanted,), (4, wanted)), [given])["t"]) > 0).all()


def test_whole_numbers_that_only_happen_to_rise_stay_those_that_were_given():
    """Ids in order may be places in a table that has no more."""
    spec = TensorSpec("ids", "int64", ("batch", "count"))
    given = np.sort(np.random.default_rng(0).choice(50, (8, 6)), axis=1)
    found = made((spec,), ((8, 20),), [{"ids": given}])["ids"]
    assert found.max() < 50
    assert (np.diff(found, axis=1) >= 0).all()


@pytest.mark.parametrize("dtype", ["bool", "int64"])
def test_a_padding_is_one_whatever_it_is_called(dtype):
    """True behind each row's end, and everywhere a row's beginning is there: attention over nothing is no number."""
    spec = TensorSpec("src_pad", dtype, ("batch", "length"))
    given = (np.arange(10)[None] >= np.array([10, 4, 7])[:, None]).astype(dtype)
    for seed in range(5):
        for length in (1, 4, 64):
            found = made((spec,), ((6, length),), [{"src_pad": given}], seed=seed)["src_pad"]
            assert not found[:, 0].any()
            assert (np.diff(found.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize(("low", "whole"), [((0, 0), True), ((0, 500), False)])
def test_few_columns_of_one_table_are_asked_over_all_of_it_unless_each_has_its_part(low, whole):
    spec = TensorSpec("ids", "int64", ("batch", 2))
    random = np.random.default_rng(0)
    given = np.stack([random.integers(one, one + 400, 64) for one in low], axis=1)
    found = made((spec,), ((512, 2),), [{"ids": given}], {"ids": 1000})["ids"]
    assert bool((found.max(axis=0) > 900).all()) is whole


def test_a_flag_that_begins_somewhere_begins_in_every_row():
    """A 1 from some step on: a mean over what is flagged is none where nothing is."""
    spec = TensorSpec("is_response", "int64", ("batch", "length"))
    random = np.random.default_rng(0)
    given = (np.arange(20)[None] >= random.integers(2, 19, (32, 1))).astype(np.int64)
    for length in (4, 20, 40):
        found = made((spec,), ((16, length),), [{"is_response": given}])["is_response"]
        assert (found[:, 0] == 0).all()
        assert (found[:, -1] == 1).all()


@pytest.mark.parametrize("padding", [0, 7])
def test_what_only_ends_rows_is_their_padding(padding):
    """Attention over nothing but padding is no number: no row begins with it, and none is it throughout."""
    spec = TensorSpec("ids", "int64", ("batch", "length"))
    random = np.random.default_rng(0)
    given = random.integers(10, 60, (4, 9))
    given[1, 5:], given[2, 8:] = padding, padding
    for length in (1, 9, 24):
        dense, ragged = (
            made((spec,), ((64, length),), [{"ids": given}], {"ids": 60}, ragged=one)["ids"] for one in (False, True)
        )
        assert not (dense == padding).any()
        assert not (ragged[:, 0] == padding).any()
        assert bool((ragged == padding).any()) is (length > 1)
        assert ((ragged[:, 1:] == padding) >= (ragged[:, :-1] == padding)).all()
    assert len(np.unique(ragged)) > 50


def test_one_row_shows_its_padding_too():
    """Rows that are drawn from the middle of it would be padded throughout."""
    spec = TensorSpec("valid", "bool", ("batch", "time"))
    for wanted in (5, 16, 40):
        found = made((spec,), ((32, wanted),), [{"valid": np.arange(16)[None] < 4}])["valid"]
        assert found[:, 0].all()
        assert not found[:, -1].any()
        assert ((found[:, 1:] != found[:, :-1]).sum(axis=1) == 1).all()
        assert len(set(found.sum(axis=1).tolist())) > 2


def test_paddings_are_told_where_times_rise_on():
    """What is repeated beside them begins anew in the middle of a row, and no padding does."""
    random, ends = np.random.default_rng(0), np.array([[16], [9], [5], [12]])
    names = {"valid": "bool", "time": "float64", "ids": "int64"}
    specs = tuple(TensorSpec(name, dtype, ("batch", "step")) for name, dtype in names.items())
    valid = np.arange(16)[None] < ends
    given = {
        "valid": valid,
        "time": random.uniform(1, 2, (4, 16)).cumsum(axis=1),
        "ids": np.where(valid, random.integers(1, 50, (4, 16)), 0),
    }
    found = made(specs, ((8, 41),) * 3, [given], {"ids": 50}, ragged=True)
    assert (np.diff(found["time"], axis=1) > 0).all()
    for ends_rows in (~found["valid"], found["ids"] == 0):
        assert (np.diff(ends_rows.astype(int), axis=1) >= 0).all()
        assert ends_rows.any()


def test_whole_numbers_that_a_model_takes_no_further_begin_again():
    specs = (TensorSpec("hour", "int64", ("batch", "time")),)
    item = {"hour": np.tile(np.arange(24), (8, 1))}
    assert made(specs, ((4, 60),), [item])["hour"].max() > 23
    random = np.random.default_rng(0)
    found = make_up(specs, {"hour": (4, 60)}, [item], {}, ragged=False, random=random, repeated=("hour",))["hour"]
    assert set(found.ravel().tolist()) == set(range(24))
    assert set(np.diff(found, axis=1).ravel().tolist()) == {1, -23}


def test_of_what_ends_rows_the_padding_is_there_most():
    spec = TensorSpec("ids", "int64", ("batch", "time"))
    given = np.array([[5, 7, 9, 3], [4, 8, 50, 50], [4, 8, 6, 50]])
    found = made((spec,), ((64, 9),), [{"ids": given}], {"ids": 51}, ragged=True)["ids"]
    assert (np.diff((found == 50).astype(int), axis=1) >= 0).all()
    assert (found == 3)[:, :-1].any()


@pytest.mark.parametrize("given", [[[0, 1]], [[1, 0, 0, 0]]])
def test_ids_of_a_table_are_no_padding_whatever_the_first_ones_are(given):
    spec = TensorSpec("ids", "int64", ("batch", "time"))
    found = made((spec,), ((64, 16),), [{"ids": np.array(given)}], {"ids": 1000})["ids"]
    assert found.max() > 900
