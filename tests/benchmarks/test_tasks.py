"""The benchmark of the tasks: what it asks is what the tasks read, and a run gives its figures."""

from __future__ import annotations

import pytest

from benchmarks import tasks
from benchmarks.data import glosses, photographs
from benchmarks.task_cases import CASES
from mlflow_tdeploy.core.columns import read_items
from mlflow_tdeploy.core.tasks import TASKS


@pytest.mark.parametrize("case", [one for one in CASES if not one.images], ids=lambda case: case.name)
def test_the_floor_gets_the_texts_of_each_item(case):
    texts = list(glosses()[:5])
    items = read_items(case.items(texts), TASKS.get(case.task).columns)
    rows = case.rows(case.items(texts))
    assert len(items) == 5
    assert len(rows) % 5 == 0
    each = len(rows) // 5
    for index, item in enumerate(items):
        whole = item if isinstance(item, str) else " ".join(item[0:1])
        for row in rows[index * each : (index + 1) * each]:
            assert whole in (row if isinstance(row, str) else row[0])


@pytest.mark.parametrize("case", [one for one in CASES if one.images], ids=lambda case: case.name)
def test_the_floor_gets_the_images_of_a_request(case):
    files = photographs(3)
    assert read_items(case.items(files), TASKS.get(case.task).columns) == case.rows(files) == files
    assert len(set(files)) == 3


@pytest.mark.slow
def test_a_smoke_run_prints_every_figure(capsys):
    assert tasks.main(["--quick", "--only", "text-classification"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "1 at once",
        "32 at once",
        "beside transformers' pipeline",
        "beside the floor",
        "answers made",
        "token",
    ):
        assert line in printed
