"""Texts with the right answers, as people's files hold them."""

from __future__ import annotations

import pytest

from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.labelled import Labelled


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("a.csv", "text,label\ngood,1\nbad,0\n", (1, 0)),
        ("a.CSV", "\ufefftext,label\ngood,yes\nbad,no\n", ("yes", "no")),
        ("a.tsv", "label\ttext\n1\tgood\nx1\tbad\n", ("1", "x1")),
        ("a.jsonl", '{"text": "good", "label": 1}\n\n{"text": "bad", "label": "0"}\n', (1, "0")),
    ],
)
def test_forms(tmp_path, name, content, labels):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert Labelled.read(tmp_path / name) == Labelled(("good", "bad"), labels)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    (tmp_path / "a.csv").write_text("sentence,label\ngood,1\n")
    with pytest.raises(InvalidInputError, match="'text' is not there, found sentence, label"):
        Labelled.read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,label\ngood\n")
    with pytest.raises(InvalidInputError):
        Labelled.read(tmp_path / "b.csv")
