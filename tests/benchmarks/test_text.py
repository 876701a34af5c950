"""The command's options and its last line."""

from pathlib import Path

import pytest

from benchmarks import text
from benchmarks.report import Figure, Results


def test_options_refuse_an_unknown_part():
    with pytest.raises(SystemExit):
        text._options(["--only", "nonsense"])


def test_options_take_several_parts(tmp_path):
    options = text._options(["--only", "text", "--only", "startup", "--quick", "--out", str(tmp_path / "r.json")])
    assert options.only == ["text", "startup"]
    assert options.quick
    assert options.out == tmp_path / "r.json"


def test_workplace_is_removed_when_none_is_given():
    with text._workplace(None) as folder:
        (folder / "x").write_text("x")
    assert not folder.exists()


def test_workplace_stays_when_one_is_given(tmp_path):
    with text._workplace(tmp_path / "kept") as folder:
        (folder / "x").write_text("x")
    assert (Path(folder) / "x").exists()


def test_verdict_counts_goals_and_names_the_missed():
    results = Results()
    results.add("x", [Figure("good", 1, "x", 2), Figure("bad", 3, "x", 2), Figure("fact", 1, "x")], {})
    assert "1 of 2 goals met" in text._verdict(results)
    assert "missed: bad" in text._verdict(results)
