"""What activations are looked at on: every form that users have data in, each item once."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

import mlflow_tdeploy
from mlflow_tdeploy.build.calibration import MOST, Calibration, CalibrationData
from mlflow_tdeploy.build.verify_data import VerifyData
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.tasks import TASKS
from mlflow_tdeploy.core.tensors import Dim, Signature, TensorSpec
from tests.build.sources import linear_task
from tests.build.test_verify import classifier
from tests.core.text_assets import write_tokenizer

TEXTS = [f"text number {index} " * (index % 9 + 1) for index in range(300)]


class Reader:
    """As ONNX Runtime's quantizers take."""

    def __init__(self, items):
        self._items = iter(items)

    def get_next(self):
        return next(self._items, None)


class Dataset:
    """As those of Hugging Face's library: columns by name."""

    column_names = ("id", "text")

    def __getitem__(self, name):
        return {"id": list(range(20)), "text": TEXTS[:20]}[name]


@pytest.fixture
def task(tmp_path):
    write_tokenizer(tmp_path)
    return classifier(tmp_path)


def requests(count):
    return [{"x": np.full((2, 4), index, np.float32)} for index in range(count)]


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (TEXTS[:20], 20),
        (pd.DataFrame({"text": TEXTS[:20], "label": [1] * 20}), 20),
        (Dataset(), 20),
        ((text for text in TEXTS[:20]), 20),
        ((text for text in iter(lambda: "for ever", None)), MOST),
        (Reader(requests(7)), 7),
        (requests(7), 7),
    ],
)
def test_every_form_gives_its_items(given, count):
    assert len(CalibrationData.of(given).data.items) == count


@pytest.mark.parametrize("given", [[], (one for one in ()), Reader([]), pd.DataFrame({"text": []}), 7])
def test_nothing_and_what_is_no_data_say_so(given):
    with pytest.raises(InvalidInputError, match=r"empty|Data cannot be of type int"):
        CalibrationData.of(given)


def test_every_item_is_in_one_batch_the_same_each_time(task):
    data = VerifyData.of(TEXTS)
    *items, first, second = Calibration(task, data, most=1000).batches
    assert first["input_ids"].shape == second["input_ids"].shape == (4, 8), "joined to the usual sizes"
    assert sum(len(feeds["input_ids"]) for feeds in items) == 300
    drawn, again = (Calibration(task, data, most=50, seed=3) for _ in range(2))
    assert sum(len(feeds["input_ids"]) for feeds in drawn.batches[:-2]) == 50
    for one, other in zip(drawn.batches, again.batches, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
    assert drawn.record == {
        "data": "given", "sha256": data.sha256, "items": 50, "batches": len(drawn.batches), "seed": 3,
        "batch_tokens": 1024,
    }  # fmt: skip


def test_what_is_given_for_it_counts_else_what_is_checked_with(task, caplog):
    checked, given = VerifyData.of(TEXTS), CalibrationData.of(TEXTS[:40])
    assert Calibration.of(task, checked, given).data.texts == tuple(TEXTS[:40]), "not filled up with other texts"
    assert Calibration.of(task, checked, CalibrationData()).data is checked
    made_up = VerifyData.of(None).for_task(linear_task())
    assert Calibration.of(linear_task(), made_up, CalibrationData()) is None
    with caplog.at_level(logging.WARNING):
        few = Calibration.of(linear_task(), made_up, CalibrationData.of(requests(7)))
        assert len(few.batches) == 7
        few.warn_of_few()
    assert "7 items to calibrate with say little" in caplog.text


def test_how_many_by_which_seed_in_what_batches(task):
    checked = VerifyData.of(TEXTS)
    said = CalibrationData(TEXTS[:80], most=40, seed=5, batch_tokens=64)
    found = Calibration.of(task, checked, CalibrationData.of(said))
    assert {"items": 40, "seed": 5, "batch_tokens": 64}.items() <= found.record.items()
    assert all(feeds["input_ids"].size <= 64 for feeds in found.batches[:-2])
    of_those_to_check_on = Calibration.of(task, checked, CalibrationData(most=20))
    assert of_those_to_check_on.data is checked
    assert of_those_to_check_on.record["items"] == 20
    assert len(CalibrationData.of(CalibrationData(Reader(requests(7)), most=3)).data.items) == 3


@pytest.mark.parametrize("wrong", [{"most": 0}, {"seed": -1}, {"batch_tokens": 1.5}, {"most": True}])
def test_a_number_that_is_none_is_refused(wrong):
    with pytest.raises(InvalidInputError, match=f"{next(iter(wrong))} of CalibrationData must be an integer"):
        CalibrationData(**wrong)


def test_what_the_task_does_not_take_says_so(task):
    texts, arrays = CalibrationData.of(TEXTS), CalibrationData.of(requests(7))
    made_up = VerifyData.of(None).for_task(linear_task())
    with pytest.raises(InvalidInputError, match="texts to calibrate with: A task of texts takes such, got arrays"):
        Calibration.of(task, VerifyData.of(TEXTS), arrays)
    with pytest.raises(InvalidInputError, match="calibrated on arrays by input name, got other data"):
        Calibration.of(linear_task(), made_up, texts)
    with pytest.raises(InvalidInputError, match="Calibration request 1: "):
        Calibration.of(linear_task(), made_up, CalibrationData.of([*requests(1), {"z": np.zeros(3)}]))


def test_a_user_says_it_where_models_are_saved(tmp_path):
    with pytest.raises(MlflowException, match="calibration data is empty"):
        mlflow_tdeploy.save_model(tmp_path, tmp_path / "model", calibrate_with=[])
    assert not (tmp_path / "model").exists()


def test_records_are_calibrated_with_by_their_texts_and_not_by_their_keys(tmp_path):
    write_tokenizer(tmp_path)
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    outputs = tuple(TensorSpec(name, "float32", ("batch", "sequence")) for name in ("start_logits", "end_logits"))
    signature = Signature((Dim("batch", 1, 2, 4), Dim("sequence", 1, 8, 8)), inputs, outputs)
    asks = TASKS.get("question-answering")({"max_length": 8}, signature, tmp_path)
    given = {"question": ["good"] * 3, "context": ["bad"] * 3}
    records = [{"question": "good", "context": "bad"}] * 3
    known = {asks.tokenizer.token_to_id(word) for word in ("good", "bad")} | {0}
    for data in (given, records, pd.DataFrame(given), [("good", "bad")] * 3):
        found = Calibration.of(asks, VerifyData.of(None).for_task(asks), CalibrationData.of(data))
        assert {int(one) for batch in found.batches for one in np.unique(batch["input_ids"])} <= known
