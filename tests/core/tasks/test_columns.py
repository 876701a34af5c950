"""Requests of several texts each, in whatever container they come."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_tdeploy.core.columns import TEXT, TEXT_PAIR, Column, read_items, records_of, text_columns, texts_in
from mlflow_tdeploy.core.errors import InvalidInputError
from mlflow_tdeploy.core.wire import asked_in, asked_of

PAIR = (TEXT, TEXT_PAIR)
ASKED = (Column("question"), Column("context"))
RANKED = (Column("query"), Column("documents", many=True))
AB = [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    "inputs",
    [
        [{"text": "a", "text_pair": "b"}, {"text_pair": "d", "text": "c"}],
        [{"text": np.array("a"), "text_pair": np.array("b")}, {"text": "c", "text_pair": "d", "label": 1}],
        {"text": ["a", "c"], "text_pair": ["b", "d"]},
        {"sentence": np.array(["a", "c"]), "text_pair": pd.Series(["b", "d"])},
        [["a", "b"], ["c", "d"]],
        (("a", "b"), ["c", "d"]),
        np.array(AB),
        pd.Series(AB),
        pd.DataFrame(AB, columns=["text", "text_pair"]),
        pd.DataFrame([("b", 0, "a"), ("d", 1, "c")], columns=["text_pair", "label", "text"]),
        pd.Series([np.array(pair) for pair in AB]),
    ],
)
def test_pairs_are_read_from_every_container(inputs):
    assert read_items(inputs, PAIR) == AB


@pytest.mark.parametrize(
    ("inputs", "columns", "wanted"),
    [
        ({"text": "a", "text_pair": "b"}, PAIR, [("a", "b")]),
        ("a", PAIR, ["a"]),
        (["a", "b"], PAIR, ["a", "b"]),
        (pd.DataFrame({"text": ["a"], "label": [1]}), PAIR, ["a"]),
        ({"question": "q", "context": "c"}, ASKED, [("q", "c")]),
        ({"question": ["q", "r"], "context": "c"}, ASKED, [("q", "c"), ("r", "c")]),
        ([["q", "c"]], ASKED, [("q", "c")]),
        ({"question": np.array(["q", "r"]), "context": np.array("c")}, ASKED, [("q", "c"), ("r", "c")]),
        ({"premise": ["a"], "hypothesis": ["b"]}, PAIR, [("a", "b")]),
        ({"text": ["a"], "text_pair": ["b"]}, (TEXT, Column("text_pair", optional=True)), [("a", "b")]),
        ({"hypothesis": ["b"], "premise": ["a"]}, (Column("premise"), Column("hypothesis")), [("a", "b")]),
        ([np.array("a"), np.array("b")], PAIR, ["a", "b"]),
        (pd.DataFrame({"query": ["q"], "documents": [np.array(["a", "b"])]}), RANKED, [("q", ("a", "b"))]),
        (pd.DataFrame([["q", "c"]]), ASKED, [("q", "c")]),
        ({"query": "q", "documents": ["a", "b"]}, RANKED, [("q", ("a", "b"))]),
        ({"query": ["q", "r"], "documents": ["a", "b"]}, RANKED, [("q", ("a", "b")), ("r", ("a", "b"))]),
        ({"query": ["q", "r"], "documents": [["a", "b"], ["c"]]}, RANKED, [("q", ("a", "b")), ("r", ("c",))]),
        ([{"query": "q", "documents": np.array(["a", "b"])}], RANKED, [("q", ("a", "b"))]),
        ([("q", ["a", "b"])], RANKED, [("q", ("a", "b"))]),
        (pd.DataFrame({"query": ["q"], "documents": [["a", "b"]]}), RANKED, [("q", ("a", "b"))]),
    ],
)
def test_a_request_is_read_by_the_columns_of_the_task(inputs, columns, wanted):
    assert read_items(inputs, columns) == wanted


@pytest.mark.parametrize(
    ("inputs", "columns", "message"),
    [
        ([("a", "b"), "c"], PAIR, "Item 1 has no text_pair, and item 0 has one"),
        ([{"text": "a"}, {"text": "c", "text_pair": "d"}], PAIR, "Item 0 has no text_pair, and item 1 has one"),
        (pd.DataFrame({"text": ["a", "c"], "text_pair": ["b", None]}), PAIR, "Text_pair 1 is missing"),
        (pd.DataFrame({"text": ["a", pd.NA], "text_pair": ["b", "d"]}), PAIR, "Text 1 is missing"),
        ([{"text": "a", "text_pair": 3}], PAIR, "Text_pair 0 must be a string, got int"),
        ({"text": ["a"], "text_pair": ["b", "d"]}, PAIR, "of different lengths: 1 of text, 2 of text_pair"),
        ([("a", "b", "c")], PAIR, "Cannot read .'a', 'b', 'c'.*in order: text, text_pair"),
        (np.array([["a", "b", "c"]]), PAIR, r"shape \(1, 3\).*Columns in order: text, text_pair"),
        (pd.DataFrame(AB), PAIR, "which column holds the texts"),
        ({"text": [("a", "b", "c")]}, PAIR, "Text 0 must be a string, got tuple"),
        ({"text_pair": ["b"]}, PAIR, "which column holds the texts"),
        ([{"text_pair": "b"}], PAIR, "which column holds the texts"),
        (pd.DataFrame({"text_pair": ["b"]}), PAIR, "which column holds the texts"),
        ([("a", ["b", ["c"]])], ASKED, "Context 0 must be a string, got list"),
        (["a", ["b", ["c"]]], (TEXT,), "Text 1 must be a string, got list"),
        ([("a",)], (TEXT,), "Text 0 must be a string, got tuple"),
        (["a", ("b", "c")], (TEXT,), "Text 1 must be a string, got tuple"),
        ({"premise": ["a"], "hypothesis": ["b"]}, (TEXT,), "column 'hypothesis', and task 'x' reads no pairs"),
        ([], PAIR, "needs at least one text"),
        ([], ASKED, "needs at least one question and context"),
        ("q", ASKED, "Item 0 must have 'question' and 'context'"),
        (["q", "c"], ASKED, "Item 0 must have 'question' and 'context'"),
        ({"question": "q"}, ASKED, "needs 'question' and 'context'"),
        ([{"question": "q", "context": "c"}, {"question": "q"}], ASKED, "needs 'question' and 'context'"),
        (pd.DataFrame({"question": ["q"], "text": ["c"]}), ASKED, "needs 'question' and 'context'"),
        ({"query": "q", "documents": []}, RANKED, "request is empty"),
        ([{"query": "q", "documents": []}], RANKED, "Documents of item 0 must be a list of at least one text"),
        ([{"query": "q", "documents": "a"}], RANKED, "Documents of item 0 must be a list of at least one text"),
        ([{"query": "q", "documents": ["a", None]}], RANKED, "Documents of item 0: text 1 is missing"),
        (pd.DataFrame({"query": ["q", "q"], "documents": ["a", "b"]}), RANKED, "Documents of item 0 must be a list"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(inputs, columns, message):
    with pytest.raises(InvalidInputError, match=message):
        read_items(inputs, columns, "task 'x'")


sides = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=6))
def test_a_pair_is_the_same_in_every_container_and_on_the_wire(pairs):
    records = [dict(zip(("text", "text_pair"), pair, strict=True)) for pair in pairs]
    for inputs in (pairs, [list(pair) for pair in pairs], records, pd.DataFrame(records)):
        assert read_items(inputs, PAIR) == pairs
    assert read_items(asked_in(PAIR, asked_of(PAIR, pairs)), PAIR) == pairs


@given(st.lists(st.tuples(sides, st.lists(sides, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=4))
def test_lists_of_texts_are_the_same_on_the_wire(items):
    assert read_items(asked_in(RANKED, asked_of(RANKED, items)), RANKED) == items


def test_a_list_that_is_no_json_is_told_with_its_row():
    arrays = {"query": np.array([b"q"], object), "documents": np.array([b"a, b"], object)}
    with pytest.raises(InvalidInputError, match="'documents' of row 0 must be a list of texts in JSON, got 'a, b'"):
        asked_in(RANKED, arrays)


def test_tables_are_read_before_the_task_is_known():
    tasks = [(TEXT,), PAIR, ASKED, RANKED]
    assert text_columns(["label", "sentence", "text_pair"], tasks) == {"text": "sentence", "text_pair": "text_pair"}
    assert text_columns(["texts", "text"], tasks) == {"text": "text"}
    assert text_columns(["label", "a"], tasks) == {}
    assert records_of({"text": ["a", "b"]}) == ["a", "b"]
    assert records_of({"question": ["q"], "context": ["c"]}) == [{"question": "q", "context": "c"}]
    assert texts_in(("q", ("a", "b"))) == ["q", "a", "b"]
    assert texts_in("a") == ["a"]
