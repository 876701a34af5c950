"""The report says what was met, hides nothing, and never leaves half a file."""

import json
import math

import pytest

from benchmarks.report import Figure, Results, number, summarize, table, write_json


@pytest.mark.parametrize(
    ("value", "direction", "met"),
    [(1.0, "at most", True), (1.01, "at most", False), (1.0, "at least", True), (0.99, "at least", False)],
)
def test_met_follows_the_direction_when_there_is_a_goal(value, direction, met):
    assert Figure("x", value, "x", 1.0, direction).met is met


def test_met_is_none_when_there_is_no_goal():
    assert Figure("x", 3.0, "ms").met is None


@pytest.mark.parametrize("direction", ["at most", "at least"])
def test_met_is_false_when_the_value_is_no_number(direction):
    assert Figure("x", math.nan, "x", 1.0, direction).met is False


def test_table_shows_value_goal_and_verdict_when_a_goal_is_missed():
    lines = table(
        [Figure("slow", 1.204, "x", 1.15), Figure("fine", 6.0, "x", 5, "at least"), Figure("fact", 12.3, "ms")]
    )
    slow, fine, fact = lines.splitlines()[1:]
    assert slow.split() == ["slow", "1.20", "x", "≤", "1.15", "x", "MISSED"]
    assert fine.split() == ["fine", "6.00", "x", "≥", "5.00", "x", "met"]
    assert fact.split() == ["fact", "12.3", "ms"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0123, "0.0123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (0.98765, "0.9877"),
        (math.inf, "-"),
    ],
)
def test_number_keeps_three_digits(value, text):
    assert number(value) == text


def test_number_rounds_no_miss_to_its_goal_when_just_below_one():
    assert number(0.9951) != number(1.0)


def test_summarize_gives_medians_in_ms():
    found = summarize({"a": [0.001, 0.003, 0.002]})["a"]
    assert found["rounds"] == 3
    assert found["median_ms"] == pytest.approx(2.0)
    assert found["min_ms"] == pytest.approx(1.0)


def test_missed_lists_only_missed_goals():
    results = Results()
    results.add("one", [Figure("a", 2, "x", 1), Figure("b", 1, "x", 1), Figure("c", 9, "x")], {"rounds": 3})
    assert [figure.name for figure in results.missed] == ["a"]
    assert results.sections["one"][1] == {"rounds": 3}


def test_write_json_holds_host_versions_and_figures(tmp_path):
    results = Results()
    results.add("latency", [Figure("a", math.nan, "x", 1.0)], {"ratios": {"a / b": 2.0}})
    write_json(results, tmp_path / "new" / "r.json")
    record = json.loads((tmp_path / "new" / "r.json").read_text())["latency"]
    assert record["host"]["cores"] >= 1
    assert record["versions"]["mlflow"]
    assert record["figures"] == [
        {"name": "a", "value": None, "unit": "x", "goal": 1.0, "direction": "at most", "note": "", "met": False}
    ]
    assert record["details"]["ratios"] == {"a / b": 2.0}


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"old": {}}')
    results = Results()
    results.add("x", [], {"bad": math.inf})
    with pytest.raises(ValueError, match="JSON"):
        write_json(results, path)
    assert path.read_text() == '{"old": {}}'


def test_write_json_keeps_sections_that_were_not_measured_now(tmp_path):
    for section, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        results = Results()
        results.add(section, [Figure("x", value, "s")], {})
        write_json(results, tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert {name: section["figures"][0]["value"] for name, section in record.items()} == {"a": 3.0, "b": 2.0}
